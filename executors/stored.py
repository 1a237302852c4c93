"""A recipe on its way to the processes that run it: fiddle JSON that loads without nemo_run."""

import base64
import zlib
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system import files

RANK_MODULE = "mixtral_recipes.executors.rank"  # what loads it


def store(recipe: Any, path: Path) -> None:
    """Write the recipe as fiddle JSON that loads without nemo_run, mode 0600.

    Raises:
        LaunchError: the recipe holds something that cannot be stored, or that only this script defines.
    """
    from fiddle.experimental import serialization

    try:
        text = serialization.dump_json(_plain(recipe))
    except Exception as error:
        raise LaunchError(f"the recipe cannot be stored for its processes: {error}") from error
    if '"__main__"' in text:
        raise LaunchError(
            "the recipe uses a class or function defined in the script itself; move it to a module that the job can "
            "import, or use run.run(recipe, executor=...), which sends the script along."
        )
    files.private_folder(path.parent)
    files.write_text(path, text, private=True)


def _plain(recipe: Any) -> Any:
    """A copy with fiddle's own Config and Partial in place of nemo_run's subclasses of them."""
    import fiddle as fdl
    from fiddle import daglish

    def convert(value: Any, state: Any) -> Any:
        for plain in (fdl.Partial, fdl.Config):
            if isinstance(value, plain):
                parts = state.flattened_map_children(value)
                return plain.__unflatten__(parts.values, parts.metadata)
        return state.map_children(value) if state.is_traversable(value) else value

    return daglish.MemoizedTraversal.run(convert, recipe)


def load_recipe(path: Path) -> Any:
    """The recipe stored in a file, by ``launch`` (fiddle JSON) or by nemo_run (the same, compressed and in base64)."""
    from fiddle.experimental import serialization

    text = path.read_text()
    if not text.lstrip().startswith("{"):
        text = zlib.decompress(base64.urlsafe_b64decode(text)).decode()
        if '"__main__"' in text or '"__external_main__"' in text:
            from nemo_run.run.experiment import maybe_load_external_main

            maybe_load_external_main(str(path.parent.parent.parent))
    return serialization.load_json(text)
