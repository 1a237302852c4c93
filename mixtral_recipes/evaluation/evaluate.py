"""A model's scores, next to those of the models it was trained from, in one table."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.checkpoints.lineage.links import mismatch
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.evaluation import samples
from mixtral_recipes.evaluation.asked import NO_HARNESS, Asked
from mixtral_recipes.evaluation.loss import loss_on
from mixtral_recipes.evaluation.perplexity import documents, perplexity
from mixtral_recipes.evaluation.recorded_data import data_of, place_of, trained_by
from mixtral_recipes.evaluation.samples import AFTER, BASE, BEFORE, COLUMNS, HeldOut
from mixtral_recipes.evaluation.scores import evaluate_squad, held_out_questions
from mixtral_recipes.inference.generate import generate, shortened
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.system.packages import package
from mixtral_recipes.training.distributed import free_memory

if TYPE_CHECKING:
    from mixtral_recipes.evaluation.tasks import Tasks


@dataclass
class Evaluation:
    """What was found.

    Attributes:
        scores: Model (``after`` is the one that was named, ``before`` what its training started from, ``base`` what
            that came from) -> what was measured (``squad``, ``loss``, ``perplexity``, ``tasks``) -> numbers.
        samples: Held-out questions, each with ``question``, ``expected`` and what each model said.
        predictions: The named model's answers to SQuAD's questions, by id.
    """

    scores: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]
    predictions: dict[str, str]


def evaluate(
    checkpoint: Path,
    asked: Asked,
    topology: Topology,
    *,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure a model, and what it was trained from; all ranks call it together.

    Args:
        checkpoint: A checkpoint of ours.
        asked: What is measured.
        topology: As `inference.model.join` returned it.
        dtype: As `InferenceModel.load`.
        say: Called with what the reader should know.

    Raises:
        CheckpointError: a checkpoint is damaged, or what a run started from is another model by now.
        DataError: a data set cannot be read.
        RecipeError: what is asked does not fit the model.
    """
    record = lineage.of_checkpoint(checkpoint)
    work = _Measuring.of(asked, record)  # before a large model is loaded for nothing
    if asked.data is not None:
        for line in work.held_out():
            say(line)
    for name, model, as_it_was in _models(checkpoint, record, topology, dtype, asked.compare, say):
        say(f"measuring: {name}")
        with as_it_was:
            work.measure(name, model)
    scores = {name: work.scores[name] for name in COLUMNS if name in work.scores}
    return Evaluation(scores, [one.record() for one in work.samples], work.predictions)


def _models(
    checkpoint: Path,
    record: Lineage,
    topology: Topology,
    dtype: str | None,
    compare: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[str, InferenceModel, AbstractContextManager[None]]]:
    """The models to measure, one after the other in memory; an adapter's base is the same one without adapters."""
    model = InferenceModel.load(checkpoint, topology, dtype=dtype)
    yield AFTER, model, nullcontext()
    if not compare:
        return
    rest = _starts(record, say)
    if model.adapted and rest:
        _, *rest = rest
        yield BEFORE, model, model.without_adapters()
        names = [BASE]
    else:
        names = [BEFORE, BASE]
    del model
    found = [*rest[:1], *rest[1:][-1:]]  # the nearest, and the first of all
    for name, folder in zip(names, found, strict=False):
        free_memory()
        yield name, InferenceModel.load(folder, topology, dtype=dtype), nullcontext()


def _starts(record: Lineage, say: Callable[[str], None]) -> list[Path]:
    """The models a model was trained from, nearest first, as far as they are on this machine.

    Raises:
        CheckpointError: another model is where one was.
    """
    found: list[Path] = []
    for parent in (parent for one in record.ancestors() for parent in one.parents):
        if parent.role not in ("base", "start") or parent.record.kind not in ("model", "training"):
            continue
        place = Path(parent.path or "")
        if not (place / "manifest.json").is_file():
            say(
                f"The model this one was trained from is no longer at {parent.path or 'a known place'}; it is left out."
            )
            continue
        problem = mismatch(parent.record.identity, identity_of(place))
        if problem:
            raise CheckpointError(
                f"{place} is not the model that training started from: {problem}; put that model back, or leave "
                "--compare out."
            )
        found.append(place)
    return list(dict.fromkeys(found))


@dataclass
class _Measuring:
    """What is asked of each model in turn, read once."""

    asked: Asked
    data: DataModule | None
    tasks: "Tasks | None"
    limit_batches: int | None
    samples: list[HeldOut] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, asked: Asked, record: Lineage) -> "_Measuring":
        """Find what is asked about; data sets are read by `setup`."""
        if asked.text is not None:
            next(iter(documents(asked.text)), None)
        tasks = None
        if asked.tasks:
            package("lm_eval", NO_HARNESS)
            from mixtral_recipes.evaluation.tasks import Tasks

            tasks = Tasks.find(asked.tasks, asked.include_path)
        if not asked.wants_data:
            return cls(asked, None, tasks, None)
        run = trained_by(record)
        own = run is not None and asked.data is None
        limit = run.recipe.get("trainer.limit_val_batches") if own and run is not None else None
        return cls(asked, data_of(run, asked.data), tasks, limit)

    def held_out(self) -> Iterator[str]:
        """What is said of data of which a part only is measured."""
        for pipeline in self.data.pipelines() if self.data is not None else []:
            if "validation" not in pipeline.source.splits:
                yield (
                    f"{pipeline.source.spec} is the training data and has no validation split; the "
                    f"{100 * pipeline.val_proportion:g} % that the run held out are measured."
                )

    def setup(self, model: InferenceModel) -> None:
        """Read the data set as the first of the models reads it; no sequence is longer than its positions."""
        if self.data is not None and not self.scores:  # nothing was measured yet
            self.data.seq_length = min(self.data.seq_length, model.config.max_position_embeddings)
            self.data.setup(model.tokenizer)
            self.samples = samples.held_out(self.data, model.tokenizer)

    def measure(self, name: str, model: InferenceModel) -> None:
        """Measure one model."""
        self.setup(model)
        asked, found = self.asked, self.scores.setdefault(name, {})
        if self.data is not None:
            if asked.loss:
                losses = loss_on(model, self.data, self.limit_batches)
                found["loss"] = {"data": place_of(self.data), "val_loss": losses.loss} | (
                    {"val_loss_by_source": losses.by_source} if losses.by_source else {}
                )
            self._answer(name, model)
            squad = next((one for one in self.data.sources_set_up if isinstance(one, SquadDataModule)), None)
            if squad is not None and asked.questions != 0:
                found["squad"] = self._squad(name, model, squad)
        if asked.text is not None:
            found["perplexity"] = perplexity(
                model, asked.text, window=asked.window, stride=asked.stride, batch_size=asked.batch_size
            )
        if self.tasks is not None:
            from mixtral_recipes.evaluation.tasks import run_tasks

            found["tasks"] = run_tasks(
                model, self.tasks, few_shot=asked.few_shot, limit=asked.limit, batch_size=asked.batch_size
            )

    def _squad(self, name: str, model: InferenceModel, data: SquadDataModule) -> dict[str, Any]:
        questions = held_out_questions(data, self.asked.questions)
        scores = evaluate_squad(
            model,
            questions,
            batch_size=self.asked.batch_size,
            max_new_tokens=self.asked.max_new_tokens,
            no_answer=data.no_answer,
        )
        predictions = scores.pop("predictions")
        if name == AFTER:
            self.predictions = predictions
        return {"data": place_of(data)} | scores

    def _answer(self, name: str, model: InferenceModel) -> None:
        """Let a model answer the questions that are shown."""
        most = self.asked.max_new_tokens
        prompts = shortened(model, [one.prompt for one in self.samples], most, head=1)
        for one, said in zip(self.samples, generate(model, prompts, Sampling(most)), strict=True):
            one.answers[name] = said.text.strip()
