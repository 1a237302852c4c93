"""A job on its way to its processes: a recipe as fiddle JSON, which loads without nemo_run, or a pickled call.

A call's objects are built, and may be of classes that only the calling script defines; cloudpickle sends those along.
The file is our own, in a folder that only its owner can write.
"""

import base64
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system import files

RANK_MODULE = "mixtral_recipes.executors.rank"  # what loads it
CALL = "call.pickle"


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
            "the recipe uses a class or function that is defined in the script itself; move it to a module that the "
            "job can import, or use run.run(recipe, executor=...), which sends the script along."
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


def store_call(call: Callable[[], Any], path: Path) -> None:
    """Write a call, and where this process finds its modules, mode 0600.

    Raises:
        LaunchError: it holds something that belongs to this process.
    """
    import cloudpickle

    script = sys.modules.get("__external_main__")  # nemo_run's name for the user's script, which no rank can import
    if script is not None:
        cloudpickle.register_pickle_by_value(script)
    try:
        pickled = cloudpickle.dumps(call)
    except Exception as error:
        raise LaunchError(
            f"the recipe cannot be sent to its processes ({type(error).__name__}: {error}); keep open files, locks and "
            "processes out of it until `setup()`, or start this script with torchrun."
        ) from error
    finally:
        if script is not None:
            cloudpickle.unregister_pickle_by_value(script)
    files.private_folder(path.parent)
    with files.replacing(path, private=True) as temporary:
        temporary.write_bytes(pickle.dumps({"path": sys.path, "call": pickled}))


def load_call(path: Path) -> Callable[[], Any]:
    """The call `store_call` wrote; modules are looked for where the process that wrote it looked."""
    stored = pickle.loads(path.read_bytes())
    sys.path[:] = stored["path"]
    return pickle.loads(stored["call"])


def store_result(result: Any, call: Path) -> None:
    """Write what a stored call returned, beside it."""
    with files.replacing(_result_of(call), private=True) as temporary:
        temporary.write_bytes(pickle.dumps(result))


def load_result(call: Path) -> Any:
    """What `store_result` wrote."""
    return pickle.loads(_result_of(call).read_bytes())


def _result_of(call: Path) -> Path:
    return call.with_name("result.pickle")


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
