"""What can be seen of a model before it is fetched or imported: its config.json and tokenizer, if they are here."""

import glob
from pathlib import Path

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers import locations
from mixtral_recipes.importers.recognise import Form, recognise
from mixtral_recipes.system.home import models_home


def peek(source: str) -> Path | None:
    """The folder with config.json and tokenizer of the model that `resolve.resolve` would give.

    Args:
        source: As `resolve.resolve` takes it.

    Returns:
        A folder of a checkpoint or of a Hugging Face model; None where the model is not on this machine, or in a form
        that says so only when it is imported.
    """
    try:
        if (name := locations.import_name(source)) is not None:
            return locations.finished(name) / "context"
        place = locations.parse_source(source)
    except CheckpointError:
        return None
    if isinstance(place, Path):
        found = recognise(place)
        if found.form is Form.CHECKPOINT:
            return found.folder / "context"
        return found.folder if found.form is Form.HF else None
    name = glob.escape(f"{place.repo}@{(place.revision or '')[:12]}")
    kept = sorted(models_home().glob(f"{name}*/context/config.json"))
    return kept[-1].parent if kept else _cached(place)


def still_to_come(source: str) -> str | None:
    """What must happen before a run can start from a model, in words; None where it is on this machine.

    Args:
        source: As `resolve.resolve` takes it, and `resolve.check_source` passed it.
    """
    if peek(source) is not None:
        return None
    if (name := locations.import_name(source)) is not None:
        return f"{source} is not imported yet; before the run starts: mixtral-recipes import hf://{name}"
    if isinstance(locations.parse_source(source), Path):
        return None
    return f"{source} is not on this machine yet; it will be downloaded and imported when the run starts."


def _cached(place: locations.HubId) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repo, "config.json", revision=place.revision)
    return Path(found).parent if isinstance(found, str) else None
