"""``mixtral-recipes export``."""

from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.checkpoint import Checkpoint, Overwrite, Public, PushToHub, refuse_public
from mixtral_recipes.cli.options.export import FormOptions
from mixtral_recipes.cli.options.groups import argument
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import in_gb, note, print_json, say
from mixtral_recipes.executors.runs.checkpoints import base_folder, checkpoint_folder
from mixtral_recipes.importers import exports


def command(
    *,
    checkpoint: Checkpoint,
    output: Annotated[Path, argument("OUTPUT", "Folder to write; for GGUF, a file.")],
    form: FormOptions,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    json: Json = False,
) -> None:
    """Export a checkpoint: Hugging Face, NeMo 2.0, GGUF, or an adapter."""
    import time

    from mixtral_recipes.system.files import size_of

    refuse_public(public, push_to_hub)
    start = time.perf_counter()
    told: dict[str, Any] = {}
    target = form.target or exports.format_of(output)
    made = exports.export(
        checkpoint_folder(checkpoint),
        output,
        target,
        told=told,
        quantization=form.quantization,
        layout=form.layout,
        max_shard_size=form.max_shard_size,
        dtype=form.dtype,
        overwrite=overwrite,
        base=base_folder(form.base),
        no_check=form.no_check or None,
        merge_into=form.merge_into,
    )
    seconds = time.perf_counter() - start
    nbytes = size_of(made)
    result = {exports.made(target): str(made), "bytes": nbytes, "seconds": round(seconds, 3)} | told | _merged(made)
    if push_to_hub:
        from mixtral_recipes.importers.hf.hub import upload

        result["hub"] = upload(made, push_to_hub, private=not public)
    note(f"{in_gb(nbytes)} in {seconds:.1f} s")
    for line in _in_words(told):
        note(line)
    if json:
        print_json(result)
    else:
        say(made)


def _merged(made: Path) -> dict[str, Any]:
    """What the lineage says of adapters that were merged into what was made, said to the user and for the result."""
    from mixtral_recipes.checkpoints.lineage import record
    from mixtral_recipes.importers.convert.merge_check import MergeCheck
    from mixtral_recipes.importers.convert.quantized_base import words

    written = record.read_or_none(made)
    origin = written.origin if written else {}
    found = {key: origin[key] for key in ("merge_check", "merged_into") if origin.get(key)}
    if "merge_check" in found:
        note(f"Checked: {MergeCheck.of(found['merge_check']).words}.")
    if "merged_into" in found:
        note(f"The adapters were merged into {words(found['merged_into'])}.")
    return found


def _in_words(told: dict[str, Any]) -> list[str]:
    """What a format's function told, in lines for a person."""
    check = told.get("check")
    lines = []
    if check:
        kinds = [f"{kind} {entry['count']} ({entry['error']:.1e})" for kind, entry in check["tensors"].items()]
        lines.append(f"Compared with the checkpoint: tensors (largest error) {', '.join(kinds)}")
        lines.append(
            f"Next tokens: KL {check['kl']:.1e} nats (median {check['kl_median']:.1e}), the same most likely token in "
            f"{check['top1']:.1%} of {check['tokens']} places"
        )
    if told.get("commands"):
        lines += ["For Ollama:", *(f"  {command}" for command in told["commands"])]
    return lines + [f"Note: {note}." for note in told.get("notes", ())]
