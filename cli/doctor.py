"""``mixtral-recipes doctor``: what this machine has, what it lacks, and how to mend it."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

from mixtral_recipes.cli.options.groups import option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import note, print_checks, print_json, print_table, say, table

if TYPE_CHECKING:
    from mixtral_recipes.executors.precisions import Outcome


def command(
    *,
    slurm: Annotated[bool, option("--slurm", "Fail if Slurm is missing; otherwise that is only noted.")] = False,
    gpu: Annotated[bool, option("--gpu", "Also train ten steps in every number format of this machine's GPU.")] = False,
    json: Json = False,
) -> None:
    """Check this machine.

    Looks at Python, torch, CUDA, NCCL, Megatron, Transformer Engine, Slurm, containers, folders and disk room.
    """
    from mixtral_recipes.errors import EnvironmentProblem
    from mixtral_recipes.executors.checks import check_machine
    from mixtral_recipes.executors.precisions import what_is_lacking

    card, lacks = what_is_lacking() if gpu else ("", {})
    found = check_machine(insist_on_slurm=slurm)
    if not json:
        print_checks(found)
    bad = [check.name for check in found if check.verdict == "bad"]
    result: dict[str, object] = {"checks": [dataclasses.asdict(check) for check in found]}
    if gpu:
        outcomes = _train(card, lacks)
        bad += [outcome.format for outcome in outcomes if outcome.verdict == "bad"]
        result |= {"gpu": card, "formats": [dataclasses.asdict(outcome) for outcome in outcomes]}
        if not json:
            print_outcomes(card, outcomes)
    if json:
        print_json(result)
    if bad:
        raise EnvironmentProblem(f"not ready: {', '.join(bad)}; see above for how to fix it.")


def _train(card: str, lacks: dict[str, str]) -> "list[Outcome]":
    from mixtral_recipes.executors.precisions import FORMATS, STEPS, try_formats

    tried = [name for name in FORMATS if name not in lacks]
    note(f"Training {STEPS} steps of a small Mixtral on {card} in {', '.join(tried)}, each in its own process.")
    return try_formats(FORMATS, lacks, say=note)


def print_outcomes(card: str, outcomes: "list[Outcome]") -> None:
    """A row for each number format: whether it works, how fast, how far its losses are from bf16's."""
    say("")
    columns = ("on " + card, "", "tokens/s", "with warm-up", "first loss", "last loss", "from bf16", "")
    words = {"good": "ok", "note": "not here", "bad": "BAD"}
    rows = [
        (
            outcome.format,
            words[outcome.verdict],
            _number(outcome.tokens_per_second, ",.0f"),
            _number(outcome.tokens_per_second_with_warmup, ",.0f"),
            _number(outcome.losses[0] if outcome.losses else None, ".4f"),
            _number(outcome.losses[-1] if outcome.losses else None, ".4f"),
            _number(outcome.apart, ".2%"),
            outcome.reason,
        )
        for outcome in outcomes
    ]
    print_table(table(columns, rows))
    for computed_by in dict.fromkeys(outcome.computed_by for outcome in outcomes if outcome.computed_by):
        say(computed_by)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
