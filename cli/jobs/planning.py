"""From `plan`'s options to its answer."""

import dataclasses
import itertools
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.cli.jobs.data_settings import columns_in, module_settings, of_records
from mixtral_recipes.cli.options.planning import AskOptions, GoalOptions, Task, WorkOptions
from mixtral_recipes.cli.options.recipe import option_of
from mixtral_recipes.cli.output import console, note, print_table, table
from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.cards import Card
from mixtral_recipes.layout.shapes import MIXTRAL_TINY
from mixtral_recipes.planner import calibration, plan, verdict
from mixtral_recipes.planner.memory import CATEGORIES
from mixtral_recipes.planner.plan import Plan
from mixtral_recipes.planner.search import MOST_GPUS, Candidate, counts, search, smallest
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.recipes import catalog
from mixtral_recipes.recipes.outline import Question, outline
from mixtral_recipes.system import machine

# By the size of the vocabulary, where it is not Mixtral 8x7B's.
_TOKENIZERS = {MIXTRAL_TINY.vocab_size: "embedded://mixtral_tiny", 32768: "mistral://mixtral-8x22b-instruct"}
_HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0, "": 1.0}


@dataclass
class Answer:
    """What `plan` found.

    Attributes:
        title: The job in a line.
        card: The GPU, corrected by what was measured.
        plan: The plan.
        notes: What else is to be said.
        more: Further parts of the JSON object.
    """

    title: str
    card: Card
    plan: Plan
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The whole answer."""
        return self.plan.as_json() | ({"notes": self.notes} if self.notes else {}) | self.more

    def bars(self) -> dict[str, dict[str, float]]:
        """Layout -> GB by category, of every layout shown."""
        shown = [("as asked", self.plan.chosen), *((_sizes(one), one) for one in self.plan.alternatives)]
        return {name: {kind: getattr(one.memory, kind) for kind in CATEGORIES} for name, one in shown}

    def show(self) -> None:
        """Print it."""
        one, out = self.plan.chosen, console()
        memory, time = one.memory, one.time
        fits = "fits" if memory.fits else "does NOT fit"
        out.print(f"{self.title}", markup=False)
        out.print(
            f"{fits}: {memory.total:.1f} of {memory.capacity:.1f} GB on the fullest GPU (pipeline stage "
            f"{memory.stage}), {self.card.title}",
            markup=False,
        )
        shown = [(name, getattr(memory, name)) for name in CATEGORIES if getattr(memory, name) >= 0.005]
        print_table(table(("memory", "GB"), [(name, f"{size:.2f}") for name, size in shown]))
        out.print()
        low, high = time.low, time.high
        rows = [
            ("seconds per step", f"{time.step:.3g} ({low:.3g} to {high:.3g})"),
            ("tokens/s per GPU", f"{one.tokens_per_second:,.0f}"),
            ("TFLOP/s per GPU", f"{plan.tflops(one):.3g}"),
            ("steps", f"{self.plan.steps:,}"),
            ("hours", _amount(self.plan.hours)),
            ("GPU-hours", _amount(self.plan.gpu_hours)),
            ("disk per checkpoint", f"{plan.checkpoint_gb(one.job):,.1f} GB, {self.plan.kept_checkpoints} kept"),
        ]
        if self.plan.price is not None:
            rows.append(("price", f"{self.plan.gpu_hours * self.plan.price:,.2f}"))
        print_table(table(("time", ""), rows))
        if self.plan.alternatives:
            out.print("\nthe best layouts by search", markup=False)
            print_table(table(_COLUMNS, [_row(_sizes(other), other) for other in self.plan.alternatives]))
        if self.plan.changes:
            out.print("\nwhat a change would give", markup=False)
            print_table(table(_COLUMNS, [_row(name, other) for name, other in self.plan.changes]))
        for text in self.notes:
            out.print(f"\n{text}", markup=False, soft_wrap=True)


_COLUMNS = ("layout", "GB", "fits", "s/step", "tokens/s per GPU")


def _amount(number: float) -> str:
    """Tenths, and of less than ten three digits."""
    return f"{number:,.1f}" if number >= 10 else f"{number:.3g}"


def _row(name: str, one: Candidate) -> tuple[str, ...]:
    fits = "yes" if one.memory.fits else "no"
    return name, f"{one.memory.total:.1f}", fits, f"{one.time.step:.3g}", f"{one.tokens_per_second:,.0f}"


def _sizes(one: Candidate) -> str:
    extra = f" MBS{one.job.batch.micro_batch_size}" if one.job.batch.micro_batch_size > 1 else ""
    return one.job.topology.describe() + extra + (" recomputed" if one.job.recompute.granularity else "")


def answer(ask: AskOptions, work: WorkOptions, goal: GoalOptions, overrides: list[str]) -> Answer:
    """Answer `plan`.

    Raises:
        RecipeError: a job that cannot be, an option that decides nothing, or a goal that cannot be reached.
    """
    _refuse_what_decides_nothing(ask, work, goal)
    learned = [*([_calibrate()] if goal.calibrate else ()), *([_learn(goal.from_run)] if goal.from_run else ())]
    for text in learned:
        note(text)
    card = calibration.corrected(cards.card(_card_here(ask) if ask.hardware is None else ask.hardware))
    of_data = of_records(overrides) if work.data else []
    name, recipe = _recipe(ask, card, [text for text in overrides if text not in of_data])
    job = Workload.of(recipe)
    if card.name == "cpu":
        job = job.on_cpu()
    steps, notes, more = int(recipe.trainer.max_steps), [], {}
    if work.data:
        tokenizer = _tokenizer_of(recipe, job.shape.vocab_size)
        job, steps, data_notes, more = _through_data(job, tokenizer, work.data, of_data, work.epochs or 1.0)
        notes += data_notes
    job = _reach(job, card, goal, steps)
    verdict.check_formats(job, card)
    verdict.check_layout_of(job, card)
    kept = int(getattr(recipe.log.ckpt, "save_top_k", 1) or 0) + 1
    made = plan.plan(job, card, steps, kept_checkpoints=kept, price=work.price)
    refused = verdict.refusal(job, card)
    notes += [text for text in (refused, verdict.warning(job, card)) if text]
    if work.advice:
        from mixtral_recipes.planner import advice

        given = advice.advise(made.chosen, card, more.get("data"))
        more["advice"] = [dataclasses.asdict(one) for one in given]
        notes += [str(one) for one in given]
    if goal.simulate:
        from mixtral_recipes.planner import simulate

        note("simulating the first and last pipeline stage")
        more["simulation"] = simulate.compare(job, card)
        notes.append(simulate.describe(more["simulation"]))
    return Answer(_title(name, job, card), card, made, notes, more)


def _refuse_what_decides_nothing(ask: AskOptions, work: WorkOptions, goal: GoalOptions) -> None:
    finds = {"--smallest": goal.smallest, "--max-gpus": goal.max_gpus, "--deadline": goal.deadline}
    for option in (option for option, asked in finds.items() if asked):
        for size in ("num_nodes", "num_gpus_per_node"):
            if size in ask.arguments:
                raise RecipeError(
                    f"{option_of(size)} cannot be combined with {option}, which finds the number of GPUs; leave it "
                    "out, or set a limit with --max-gpus N."
                )
    given = {"recipe": ask.recipe, "task": ask.task} | ask.arguments
    tuning = ("peft_scheme", "packed_sequence")
    if ask.yaml is not None:
        wrong, why = given.keys() - {"hardware"}, "cannot be combined with a recipe file; use PATH=VALUE"
    elif ask.task is Task.pretrain:
        wrong, why = tuning, "applies only to fine-tuning; leave it out, or use --task finetune"
    else:
        wrong, why = ("performance_mode",), "applies only to pretraining; use --task pretrain"
    for name, value in given.items():
        if name in wrong and value is not None:
            raise RecipeError(f"{option_of(name)} {why}.")
    if work.epochs is not None and not work.data:
        raise RecipeError("--epochs counts passes over --data; pass --data, or set trainer.max_steps=N.")


def _title(name: str, job: Workload, card: Card) -> str:
    trained = "all weights"
    if job.adapters:
        scheme = "QLoRA" if job.adapters.quantized else "DoRA" if job.adapters.magnitudes else "LoRA"
        trained = f"{scheme} of rank {job.adapters.dim}"
    batch = job.batch
    return (
        f"{name}, {trained}: {job.topology.world_size} x {card.title}, {job.topology.describe()}, "
        f"{batch.global_batch_size} x {batch.seq_length} tokens per step"
    )


def _card_here(ask: AskOptions) -> str:
    if ask.recipe == "mixtral_tiny" and not machine.gpu_count():
        return "cpu"
    return cards.named(machine.gpu_name()) or "h100"


def _recipe(ask: AskOptions, card: Card, overrides: list[str]) -> tuple[str, Any]:
    """What to call the recipe, and its outline; the whole, with torch, where an outline cannot hold what was asked."""
    from mixtral_recipes.overrides import outline_paths

    if ask.yaml is not None:
        from mixtral_recipes.overrides.yaml_file import read_recipe

        return ask.yaml.name, _whole(read_recipe(ask.yaml), overrides)
    if ask.recipe is None:
        raise RecipeError(f"choose a recipe with --recipe: {', '.join(catalog.names())}.")
    if "." in ask.recipe:
        from mixtral_recipes.overrides.loading import load_own

        return ask.recipe, _whole(load_own(ask.recipe, ask.task, **ask.arguments), overrides)
    task = (ask.task or Task.finetune).value
    arguments: dict[str, Any] = ask.arguments | {"hardware": card.name}
    question = Question(ask.recipe, task, **arguments)
    found = outline(question)
    try:
        outline_paths.apply(found, overrides)
    except outline_paths.NeedsRecipe:
        from mixtral_recipes.overrides.loading import load

        found = _whole(load(ask.recipe, task, **arguments), overrides)
    else:
        found.trainer.plugins.check()
    return f"{question.recipe}.{task}", found


def _whole(recipe: Any, overrides: list[str]) -> Any:
    import fiddle as fdl

    from mixtral_recipes.overrides import paths
    from mixtral_recipes.settings.check import check_settings

    paths.apply(recipe, overrides)
    for notice in check_settings(fdl.get_callable(recipe), fdl.ordered_arguments(recipe)):
        warnings.warn(notice, MixtralRecipesWarning, stacklevel=2)
    plugins: Any = fdl.build(recipe.trainer.plugins)
    plugins.check()
    return recipe


def _reach(job: Workload, card: Card, goal: GoalOptions, steps: int) -> Workload:
    """The job in the layout that reaches a goal; as it is without one."""
    if not (goal.smallest or goal.max_gpus or goal.deadline):
        return job
    if goal.smallest and goal.deadline:
        raise RecipeError(
            "--smallest cannot be combined with --deadline, which finds the fewest GPUs that finish in time."
        )
    most = goal.max_gpus or MOST_GPUS
    if goal.smallest:
        found = smallest(job, card, most=most)
        if found:
            return found.job
        raise RecipeError(f"--smallest: no layout of up to {most} x {card.title} fits; {_least(job, card, most)}")
    hours = _hours(goal.deadline) if goal.deadline else 0.0
    every: list[Candidate] = []
    for size in counts(card.per_node, most):
        every += itertools.islice(search(job, card, size), 1)
        if goal.deadline and every and every[-1].time.step * steps / 3600 <= hours:
            return every[-1].job
    if not every:
        raise RecipeError(f"--max-gpus {most}: no layout fits; {_least(job, card, most)}")
    best = min(every, key=lambda one: one.time.step)
    if not goal.deadline:
        return best.job
    raise RecipeError(
        f"--deadline {goal.deadline}: {steps:,} steps take {best.time.step * steps / 3600:,.1f} hours on "
        f"{best.job.topology.world_size} x {card.title}, the fastest of up to {most}; allow more time or GPUs, or use "
        "fewer steps (trainer.max_steps=N)."
    )


def _least(job: Workload, card: Card, most: int) -> str:
    near = verdict.leanest(job.on(dataclasses.replace(job.topology, world_size=most)), card)
    if near is None:
        return f"no layout of {most} GPUs runs with global_batch_size={job.batch.global_batch_size}."
    return f"the leanest layout needs {near.memory.total:.0f} GB, but the GPU has {card.memory_gb:.0f} GB."


def _hours(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([mhd]?)", text.strip().lower())
    if match:
        return float(match[1]) * _HOURS[match[2]]
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9}):(\d\d)(?::\d\d)?", text.strip())
    if match:
        return 24 * int(match[1] or 0) + int(match[2]) + int(match[3]) / 60
    raise RecipeError(
        f"--deadline {text} is not allowed; use hours, or a number with m, h or d, such as 90m, 36h or 5d."
    )


def _tokenizer_of(recipe: Any, vocab_size: int) -> Any:
    """What data is counted with: the tokenizer that the recipe names, or that of its base, without a download."""
    import fiddle as fdl

    from mixtral_recipes.data.tokenizer_choice import chosen_tokenizer

    named = getattr(recipe.model, "tokenizer", None)  # an outline has none
    named = fdl.build(named) if isinstance(named, fdl.Buildable) else named
    return chosen_tokenizer(named) or chosen_tokenizer(_TOKENIZERS.get(vocab_size, "mistral://mixtral-8x7b"))


def _through_data(
    job: Workload, tokenizer: Any, specs: list[str], settings: list[str], epochs: float
) -> tuple[Workload, int, list[str], dict[str, Any]]:
    """The job with its data's lengths, and the steps that its passes take.

    A pass over several data sets takes as many samples as they have together, by their shares where these are given.
    """
    from mixtral_recipes.data.recognise import shares

    names, weights = shares(specs)
    if settings and len(names) > 1:
        raise RecipeError(f"{settings[0]}: settings for reading records need a single --data.")
    counted = [_counted(name, settings, tokenizer, job.batch.seq_length) for name in names]
    samples = sum(size for size, _ in counted)
    share = [weight / sum(weights) for weight in weights] if weights else [size / samples for size, _ in counted]
    mean = sum(part * tokens / size for part, (size, tokens) in zip(share, counted, strict=True))
    job = dataclasses.replace(job, lengths=mean)
    steps = plan.steps_for(samples, job, epochs)
    facts: dict[str, Any] = {"samples": samples, "tokens": round(samples * mean), "mean_tokens": round(mean, 1)}
    if len(names) > 1:
        parts = zip(names, share, counted, strict=True)
        facts["sources"] = [{"data": n, "share": round(s, 4), "samples": c[0], "tokens": c[1]} for n, s, c in parts]
    passes = "1 epoch" if epochs == 1 else f"{epochs:g} epochs"
    text = f"data: {samples:,} samples of {mean:,.0f} tokens on average, {steps:,} steps for {passes}."
    filled = mean / job.batch.seq_length
    if not job.batch.packed and filled < 0.5:
        text += (
            f" Unpacked, about {100 * (1 - min(filled, 1)):.0f} % of a full sequence would be padding; use --packed."
        )
    return job, steps, [text], {"data": facts}


def _counted(name: str, settings: list[str], tokenizer: Any, seq_length: int) -> tuple[int, int]:
    """Samples that would be trained on, and their tokens after what is too long was cut."""
    from mixtral_recipes.data.check.check import check
    from mixtral_recipes.data.recognise import recognize
    from mixtral_recipes.system.progress import progress_bar

    recognized = recognize(name, columns_in(settings))
    wanted = module_settings(recognized, settings)
    with progress_bar("counting", None, unit="records") as advance:
        report = check(recognized, tokenizer, seq_length=seq_length, settings=wanted, progress=advance)
    found = report.tallies.get("train")
    if found is None or not found.samples:
        raise RecipeError(f"--data {name} has no usable training record; see `mixtral-recipes data check {name}`.")
    return found.samples, found.tokens


def _calibrate() -> str:
    from mixtral_recipes.planner import measure

    note("measuring this machine; this takes about a minute")
    return calibration.keep(*measure.this_machine())


def _learn(run: str) -> str:
    """Correct the card's speed by a run.

    Raises:
        RecipeError: the run was not predicted, or has too few steps.
    """
    from mixtral_recipes.executors.runs.records import run_folder
    from mixtral_recipes.reports.record import read_run

    record = read_run(run_folder(run))
    both = record.against_plan().get("step_seconds")
    if both is None:
        raise RecipeError(f"--from-run {run} has no prediction with measured steps; use a run of at least three steps.")
    return calibration.learn(str(record.plan["hardware"]), both["predicted"], both["measured"])
