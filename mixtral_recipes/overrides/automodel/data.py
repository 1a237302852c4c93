"""The data set of an AutoModel file as a data module."""

from typing import Any

import nemo_run as run

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.overrides.automodel.values import Values, short_name
from mixtral_recipes.settings.classes import class_named

_SQUAD = ("squad", "rajpurkar/squad")


def data_of(values: Values, replaced: Any, packed: int) -> Any:
    """The data module, with the recipe's batch where the file says nothing."""
    target = str(short_name(values.take("dataset._target_", "")))
    roots = map(values.take, ("dataset.dataset_name", "dataset.path_or_dataset", "dataset.path_or_dataset_id"))
    root = next(filter(None, roots), None)
    if isinstance(root, list):
        raise RecipeError("dataset: use a single data set, a file or a folder; a list is not supported.")
    root = f"{root}:{values.take('dataset.name')}" if values.take("dataset.name") else root
    if target == "make_squad_dataset":
        config = run.Config(class_named("SquadDataModule"), dataset_root=None if root in _SQUAD else root)
    elif target in ("ColumnMappedTextInstructionDataset", "ColumnMappedTextInstructionIterableDataset"):
        config = _columns(values, root)
    elif target == "ChatDataset":
        template = values.take("dataset.chat_template")
        config = run.Config(class_named("ChatDataModule"), dataset_root=root, chat_template=template)
    elif target.startswith(("Mock", "build_unpacked")):
        samples = values.whole("dataset.num_samples", 10_000_000)
        vocab = values.take("dataset.vocab_size")
        config = run.Config(class_named("MockDataModule"), num_train_samples=samples, vocab_size=vocab)
    else:
        known = "make_squad_dataset, ColumnMappedTextInstructionDataset, ChatDataset, MockIterableDataset"
        what = f"dataset._target_={target} is not supported" if target else "dataset._target_ is not set"
        raise RecipeError(f"{what}; use one of {known}, or finetune --data.")
    if packed:
        specs = run.Config(class_named("PackedSequenceSpecs"), packed_sequence_size=packed)
        config.packed_sequence_specs, config.seq_length = specs, packed
    length = values.whole("dataset.seq_length", 0, least=0) or values.whole("dataset.seq_len", 0, least=0)
    if length and not packed:
        config.seq_length = length
    if target == "make_squad_dataset" and values.take("dataset.chat_template"):
        raise RecipeError(
            "dataset.chat_template: SQuAD is plain text, without a chat template; use a data set of messages."
        )
    return overrides.with_batch_of(replaced, config)


def _columns(values: Values, root: Any) -> Any:
    columns = {key: values.take(f"dataset.column_mapping.{key}") for key in ("context", "question", "answer")}
    given = {key: str(value) for key, value in columns.items() if value}
    if "answer" not in given or len(given) == 1:
        raise RecipeError("dataset.column_mapping must name answer, and context or question.")
    names = {("output" if key == "answer" else key): column for key, column in given.items()}
    return run.Config(
        class_named("FineTuningDataModule"),
        dataset_root=root,
        columns=names,
        prompt_template=" ".join(f"{{{name}}}" for name in names),
        dataset_kwargs={"answer_only_loss": bool(values.take("dataset.answer_only_loss_mask", True))},
    )
