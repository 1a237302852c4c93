"""What can be seen of a model before it is fetched or imported: its config.json and tokenizer, if they are here."""

from pathlib import Path

from mixtral_recipes import embedded
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
    if source.startswith(embedded.PREFIX):
        return embedded.resolve(source)
    try:
        if source.startswith("nemo://") and not locations.is_path(source):
            return locations.finished(source.removeprefix("nemo://")) / "context"
        place = locations.parse_source(source)
    except CheckpointError:
        return None
    if isinstance(place, Path):
        found = recognise(place)
        if found.form is Form.CHECKPOINT:
            return found.folder / "context"
        return found.folder if found.form is Form.HF else None
    kept = sorted(models_home().glob(f"{place.repo}@{(place.revision or '')[:12]}*/context/config.json"))
    return kept[-1].parent if kept else _cached(place)


def _cached(place: locations.HubId) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repo, "config.json", revision=place.revision)
    return Path(found).parent if isinstance(found, str) else None
