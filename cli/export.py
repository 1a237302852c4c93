"""``mixtral-recipes export``."""

from pathlib import Path
from typing import Annotated

import typer

from mixtral_recipes.cli.options.checkpoint import (
    Base,
    Checkpoint,
    Dtype,
    Overwrite,
    Public,
    PushToHub,
    base_folder,
    checkpoint_folder,
)
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import note, print_json, say
from mixtral_recipes.importers import exports


def command(
    *,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    target: Annotated[str, typer.Option("--format", metavar="NAME", help=f"{exports.summaries()}.")] = "hf",
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="NAME", help="v4 (default; as released Mixtrals) or v5 (fused experts)."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file; 5GB by default.")
    ] = None,
    dtype: Dtype = None,
    base: Base = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare a merged model's logits with base and adapter's.")
    ] = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    json: Json = False,
) -> None:
    """Export a checkpoint: Hugging Face, NeMo 2.0, or an adapter alone."""
    import time

    from mixtral_recipes.checkpoints.lineage import record
    from mixtral_recipes.importers.convert.merge_check import MergeCheck
    from mixtral_recipes.system.files import size_of

    start = time.perf_counter()
    folder = exports.export(
        checkpoint_folder(checkpoint),
        output,
        target,
        layout=layout,
        max_shard_size=max_shard_size,
        dtype=dtype,
        overwrite=overwrite,
        base=base_folder(base),
        no_check=no_check or None,
    )
    seconds = time.perf_counter() - start
    nbytes = size_of(folder)
    result = {exports.made(target): str(folder), "bytes": nbytes, "seconds": round(seconds, 3)}
    written = record.read_or_none(folder)
    checked = written.origin.get("merge_check") if written else None
    if checked:
        result["merge_check"] = checked
        note(f"Checked: {MergeCheck.of(checked).words}.")
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(folder, push_to_hub, private=not public)
    note(f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s")
    if json:
        print_json(result)
    else:
        say(folder)
