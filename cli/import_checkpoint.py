"""``mixtral-recipes import``."""

from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.checkpoint import Base, Dtype, Overwrite, Public, PushToHub, refuse_public
from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import in_gb, note, print_json, say

_SHOWN = 8  # names of files


def command(
    *,
    source: Annotated[
        str, argument("SOURCE", "A model's or adapter's folder, hf://org/name, hf://org/name@revision, nemo:///path.")
    ],
    output: Annotated[
        Path | None, option("--output FOLDER", "Folder to write; default: one in $MIXTRAL_RECIPES_HOME.")
    ] = None,
    dtype: Dtype = None,
    base: Base = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    json: Json = False,
) -> None:
    """Import a model or adapter: HF, Mistral, PEFT, NeMo, Megatron-LM.

    Writes a Megatron checkpoint that loads in any parallel layout.
    """
    import time

    from mixtral_recipes.checkpoints.format.manifest import read_manifest
    from mixtral_recipes.errors import some_of
    from mixtral_recipes.importers.resolve import import_any
    from mixtral_recipes.system.files import size_of
    from mixtral_recipes.system.ranks import launched_rank

    refuse_public(public, push_to_hub)
    start = time.perf_counter()
    folder = import_any(source, output, base=base, dtype=dtype, overwrite=overwrite)
    seconds = time.perf_counter() - start
    if launched_rank() != 0:
        return
    nbytes = size_of(folder)
    result: dict[str, Any] = {"checkpoint": str(folder), "bytes": nbytes, "seconds": round(seconds, 3)}
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(folder, push_to_hub, private=not public)
    manifest = read_manifest(folder)
    if left := manifest.get("left_behind"):
        result["left_behind"] = left
        adapter = manifest["kind"] == "adapter"
        why = (
            "only an adapter's weights and settings are imported" if adapter else "nothing in the model refers to them"
        )
        note(f"Not imported, because {why}: {some_of(left, _SHOWN)}.")
    note(f"{in_gb(nbytes)} in {seconds:.1f} s")
    if json:
        print_json(result)
    else:
        say(folder)
