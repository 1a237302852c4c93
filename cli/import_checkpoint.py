"""``mixtral-recipes import``."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[str, typer.Argument(help="hf://org/name[@revision], or a model folder.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; by default one under $MIXTRAL_RECIPES_HOME.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default what the source has.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the finished checkpoint to this Hub repository (org/name).")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a repository that is created public.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Import a Hugging Face Mixtral into a Megatron checkpoint that loads under any parallel layout."""
    import time

    from mixtral_recipes.cli.output import note, print_json
    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
    from mixtral_recipes.importers.processes import is_first

    start = time.perf_counter()
    folder = import_checkpoint(source, output, dtype=dtype, overwrite=overwrite)
    seconds = time.perf_counter() - start
    if not is_first():
        return
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    result = {"checkpoint": str(folder), "bytes": nbytes, "seconds": round(seconds, 3)}
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(folder, push_to_hub, private=not public)
    note(f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s")
    if as_json:
        print_json(result)
    else:
        print(folder)
