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
from mixtral_recipes.cli.output import note, print_json


def command(
    *,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder to write.")],
    target: Annotated[str, typer.Option("--format", metavar="NAME", help="hf.")] = "hf",
    layout: Annotated[
        str, typer.Option("--layout", metavar="NAME", help="v4 (as released Mixtrals) or v5 (fused experts).")
    ] = "v4",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file.")
    ] = "5GB",
    dtype: Dtype = None,
    base: Base = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    json: Json = False,
) -> None:
    """Export a checkpoint to a Hugging Face folder."""
    import time

    from mixtral_recipes.errors import CheckpointError, nearest
    from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
    from mixtral_recipes.system.files import size_of

    if target != "hf":
        raise CheckpointError(f"--format {target} is not known.{nearest(target, ['hf'])}")
    start = time.perf_counter()
    folder = export_checkpoint(
        checkpoint_folder(checkpoint),
        output,
        layout=layout,
        max_shard_size=max_shard_size,
        dtype=dtype,
        overwrite=overwrite,
        base=base_folder(base),
    )
    seconds = time.perf_counter() - start
    nbytes = size_of(folder)
    result = {"model": str(folder), "bytes": nbytes, "seconds": round(seconds, 3)}
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(folder, push_to_hub, private=not public)
    note(f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s")
    if json:
        print_json(result)
    else:
        print(folder)
