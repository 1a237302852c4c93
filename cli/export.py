"""``mixtral-recipes export``."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or nemo://ID.")],
    output: Annotated[Path, typer.Argument(help="Model folder to write; must not exist.")],
    target: Annotated[str, typer.Option("--format", help="hf.")] = "hf",
    layout: Annotated[str, typer.Option(help="v4 (as released Mixtrals) or v5 (fused experts).")] = "v4",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default what the checkpoint has.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the finished model to this Hub repository (org/name).")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a repository that is created public.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Export a checkpoint to a Hugging Face model folder."""
    import time

    from mixtral_recipes.cli.output import note, print_json
    from mixtral_recipes.errors import CheckpointError, nearest
    from mixtral_recipes.importers import locations
    from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint

    if target != "hf":
        raise CheckpointError(f"--format {target} is not known.{nearest(target, ['hf'])}")
    start = time.perf_counter()
    folder = export_checkpoint(
        locations.checkpoint(checkpoint),
        output,
        layout=layout,
        max_shard_size=max_shard_size,
        dtype=dtype,
        overwrite=overwrite,
    )
    seconds = time.perf_counter() - start
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    result = {"model": str(folder), "bytes": nbytes, "seconds": round(seconds, 3)}
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(folder, push_to_hub, private=not public)
    note(f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s")
    if as_json:
        print_json(result)
    else:
        print(folder)
