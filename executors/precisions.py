"""Ten steps of a small Mixtral in every number format of this machine: `doctor --gpu`.

Each format is a command of its own, as a user would start it: what one leaves in Megatron, Transformer Engine or on the
card cannot touch the next, and one that crashes or hangs is told like one that works.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.executors import probes
from mixtral_recipes.system.files import read_json, temporary_folder

STEPS = 10
TIMEOUT_S = 600
# Random weights and the same batches: over ten steps formats differ by rounding, and more than this is not rounding.
APART = 0.05
_BASELINE = "bf16"
_BF16 = ("--precision", "bf16")
FORMATS: dict[str, tuple[str, ...]] = {
    "fp32": ("--precision", "fp32"),
    "bf16": _BF16,
    "fp8 delayed": (*_BF16, "trainer.plugins.fp8=hybrid", "trainer.plugins.fp8_recipe=delayed"),
    "fp8 tensorwise": (*_BF16, "trainer.plugins.fp8=hybrid", "trainer.plugins.fp8_recipe=tensorwise"),
    "fp8 blockwise": (*_BF16, "trainer.plugins.fp8=e4m3", "trainer.plugins.fp8_recipe=blockwise"),
    "mxfp8": (*_BF16, "trainer.plugins.fp8=e4m3", "trainer.plugins.fp8_recipe=mxfp8"),
}
# 380 million parameters: products large enough to keep a card busy, states that fit any that trains.
SMALL: dict[str, object] = {
    "model.config.num_layers": 4, "model.config.hidden_size": 1024, "model.config.num_attention_heads": 16,
    "model.config.num_query_groups": 4, "model.config.kv_channels": 64, "model.config.ffn_hidden_size": 3584,
    "model.config.max_position_embeddings": 1024, "model.config.init_method_std": 0.02, "data.seq_length": 1024,
    "data.micro_batch_size": 4, "data.global_batch_size": 16, "optim.config.lr": 3e-4,
}  # fmt: skip

# What each format lacks here, by name; nothing of it needs the card's memory.
_LACKS = """
import json, torch
from mixtral_recipes.errors import MixtralRecipesError
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.training.precision import check_device
lacks = {}
for name, fields in json.loads(FIELDS).items():
    try:
        check_device(MegatronMixedPrecision(**fields))
    except MixtralRecipesError as error:
        lacks[name] = str(error)
card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
answer = json.dumps([card, lacks])
"""


@dataclass
class Outcome:
    """How one number format did.

    Attributes:
        format: Its name in `FORMATS`.
        verdict: ``good``, ``note`` (this card or installation does not have it) or ``bad``.
        reason: Why it is not good.
        tokens_per_second: Of the steps after the warm-up.
        tokens_per_second_with_warmup: Of all steps.
        losses: Of each step.
        apart: Largest difference of a step's loss from bf16's, as a share of bf16's; None where one of them is missing.
        computed_by: Layers, attention and cuDNN; empty on a CPU.
    """

    format: str
    verdict: str
    reason: str = ""
    tokens_per_second: float | None = None
    tokens_per_second_with_warmup: float | None = None
    losses: tuple[float, ...] = ()
    apart: float | None = None
    computed_by: str = ""


def what_is_lacking() -> tuple[str, dict[str, str]]:
    """The first GPU's name, and format -> why this machine cannot run it.

    Raises:
        EnvironmentProblem: torch finds no GPU, or does not import.
    """
    fields = {name: dict(_fields(options)) for name, options in FORMATS.items()}
    code = _LACKS.replace("FIELDS", repr(json.dumps(fields)))
    answer = probes.ask([{"card": code}])["card"]
    if not answer.good:
        raise EnvironmentProblem(f"the GPU cannot be queried: {answer.text}; see mixtral-recipes doctor.")
    card, lacks = json.loads(answer.text)
    if card is None:
        raise EnvironmentProblem(
            "--gpu trains on a GPU, but torch finds none on this machine; run mixtral-recipes doctor to see why."
        )
    return card, lacks


def _fields(options: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Fields of trainer.plugins that a format's options set."""
    for option in options:
        path, is_override, value = option.partition("=")
        if is_override:
            yield path.removeprefix("trainer.plugins."), value
    if "fp32" in options:
        yield "precision", "32"


def try_formats(
    formats: Iterable[str],
    lacks: Mapping[str, str],
    *,
    accelerator: str = "gpu",
    steps: int = STEPS,
    model: Mapping[str, object] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Train in each format, one after the other.

    Args:
        formats: Names in `FORMATS`.
        lacks: Those that are not tried, and why.
        accelerator: As ``trainer.accelerator``.
        steps: Of each.
        model: Overrides of the recipe mixtral_tiny; None uses `SMALL`.
        say: Told how each ended, at once; with ``--debug`` also all that one that failed said.
    """
    found = []
    with temporary_folder() as folder:
        for name in formats:
            if name in lacks:
                found.append(Outcome(name, "note", lacks[name]))
                continue
            fields = dict(SMALL if model is None else model) | {
                "trainer.accelerator": accelerator, "trainer.max_steps": steps, "trainer.val_check_interval": 0,
                "trainer.limit_val_batches": 1, "trainer.enable_checkpointing": "false",
                "optim.lr_scheduler.warmup_steps": 0,
            }  # fmt: skip
            found.append(_try(name, [f"{path}={value}" for path, value in fields.items()], Path(folder), say))
            say(f"{name}: {found[-1].reason or 'trained'}")
    return compared(found)


def _try(name: str, overrides: Sequence[str], folder: Path, say: Callable[[str], None]) -> Outcome:
    run, debug = name.replace(" ", "-"), ["--debug"] if os.environ.get("MIXTRAL_RECIPES_DEBUG") else []
    command = [
        sys.executable, "-m", "mixtral_recipes.cli.main", "pretrain", "--recipe", "mixtral_tiny", "--executor",
        "direct", "--num-gpus-per-node", "1", "--dir", str(folder), "--name", run, *FORMATS[name], *overrides, *debug,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=os.environ | {"MIXTRAL_RECIPES_HOME": str(folder / "home")}, capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(name, "bad", f"no result within {TIMEOUT_S} s")
    result = read_json(folder / run / "result.json")
    if done.returncode or result is None:
        if debug:
            say(done.stderr)
        return Outcome(name, "bad", _last_word(done.stderr) or f"ended with exit code {done.returncode}")
    events = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / run)
    return Outcome(
        name,
        "good",
        tokens_per_second=result["tokens_per_second"],
        tokens_per_second_with_warmup=result["tokens_per_second_with_warmup"],
        losses=tuple(event["loss"] for event in events if event["kind"] == "train"),
        computed_by=next(event for event in events if event["kind"] == "start")["environment"].get("kernels", ""),
    )


def _last_word(stderr: str) -> str:
    """Our error if there is one, else the last line: a library's exception, or what the driver said."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (ours or lines or [""])[-1][:300]


def compared(outcomes: list[Outcome]) -> list[Outcome]:
    """Outcomes with their losses' distance from bf16's; one that is too far is not good."""
    base = next((outcome.losses for outcome in outcomes if outcome.format == _BASELINE), ())
    for outcome in outcomes:
        if not base or len(outcome.losses) != len(base):
            continue
        outcome.apart = max(abs(loss - other) / abs(other) for loss, other in zip(outcome.losses, base, strict=True))
        if not outcome.apart <= APART:  # written so that NaN is too far, too
            outcome.verdict = "bad"
            outcome.reason = (
                f"its losses differ from bf16's by {outcome.apart:.1%}; rounding explains at most {APART:.0%}"
            )
    return outcomes
