"""``mixtral-recipes export``."""

from pathlib import Path
from typing import Annotated, Any

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
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; for GGUF, a file.")],
    target: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help=f"{exports.summaries()}. Default: by OUTPUT's ending, or hf."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="NAME", help="v4 (default; as released Mixtrals) or v5 (fused experts)."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file; 5GB by default.")
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            metavar="TYPE",
            help="Of GGUF: f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0.",
        ),
    ] = None,
    dtype: Dtype = None,
    base: Base = None,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="Do not compare a merged model's logits with base and adapter's, nor a GGUF file with its checkpoint.",
        ),
    ] = False,
    merge_into: Annotated[
        str | None,
        typer.Option(
            "--merge-into",
            metavar="WEIGHTS",
            help="Of a QLoRA adapter: original (default), or 4bit (8bit): the dequantised weights it was trained over.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    json: Json = False,
) -> None:
    """Export a checkpoint: Hugging Face, NeMo 2.0, GGUF, or an adapter."""
    import time

    from mixtral_recipes.checkpoints.lineage import record
    from mixtral_recipes.importers.convert.merge_check import MergeCheck
    from mixtral_recipes.importers.convert.quantized_base import words
    from mixtral_recipes.system.files import size_of

    start = time.perf_counter()
    target = target or exports.format_of(output)
    told: dict[str, Any] = {}
    made = exports.export(
        checkpoint_folder(checkpoint),
        output,
        target,
        told=told,
        quantization=quantization,
        layout=layout,
        max_shard_size=max_shard_size,
        dtype=dtype,
        overwrite=overwrite,
        base=base_folder(base),
        no_check=no_check or None,
        merge_into=merge_into,
    )
    seconds = time.perf_counter() - start
    nbytes = size_of(made)
    result = {exports.made(target): str(made), "bytes": nbytes, "seconds": round(seconds, 3)} | told
    written = record.read_or_none(made)
    checked = written.origin.get("merge_check") if written else None
    if checked:
        result["merge_check"] = checked
        note(f"Checked: {MergeCheck.of(checked).words}.")
    into = written.origin.get("merged_into") if written else None
    if into:
        result["merged_into"] = into
        note(f"The adapters were merged into {words(into)}.")
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(made, push_to_hub, private=not public)
    note(f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s")
    for line in _in_words(told):
        note(line)
    if json:
        print_json(result)
    else:
        say(made)


def _in_words(told: dict[str, Any]) -> list[str]:
    """What a format's function told, in lines for a person."""
    check = told.get("check")
    lines = []
    if check:
        kinds = [f"{kind} {entry['count']} ({entry['error']:.1e})" for kind, entry in check["tensors"].items()]
        lines.append(f"Compared with the checkpoint: tensors (largest error) {', '.join(kinds)}")
        lines.append(
            f"Next tokens: KL {check['kl']:.1e} nats (median {check['kl_median']:.1e}), the same likeliest in "
            f"{check['top1']:.1%} of {check['tokens']} places"
        )
    if told.get("commands"):
        lines += ["For Ollama:", *(f"  {command}" for command in told["commands"])]
    return lines + [f"Note: {note}." for note in told.get("notes", ())]
