"""A written GGUF file compared with the checkpoint: every tensor, how text is split, and the next tokens."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtral_recipes.checkpoints.format.reading import close_inputs
from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, Rows, read_rows
from mixtral_recipes.data.tokenizer_conversion import PROBES
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem
from mixtral_recipes.importers.convert.exported import ExportedModel
from mixtral_recipes.importers.gguf import llama, reference
from mixtral_recipes.importers.gguf.extra import package
from mixtral_recipes.importers.gguf.reader import StoredFile
from mixtral_recipes.importers.gguf.types import LARGEST_ERROR, Quantization
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.system.files import temporary_folder
from mixtral_recipes.system.machine import available_memory, io_threads

# What both models go on from; plain English, of which every Mixtral has seen some.
TEXTS = (
    "The river rises in the mountains, flows through three countries and ends in a wide delta. In spring it floods.",
    "Question: In which year was the bridge built, and who paid for it? Answer: It was built in 1894, and the city",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(",
    "Dear Anna, thank you for the letter of 3 May. I have read it twice and I agree with almost all of it, but",
)
_LONGEST = 64
_MOSTLY_CLEAR = 0.5  # of the places; a model with fewer is one whose weights are random still
# Squares. A row in another's place is about 2 off; of one that is nearly 0 (a token no text has) rounding leaves
# nothing.
_ANOTHER, _FAINT = 0.5, 1e-4
_CHUNK_BYTES = 16 << 20  # of values in float32


@dataclass(frozen=True)
class Measured:
    """How far a file is from its checkpoint.

    Attributes:
        errors: By type: the largest error of a tensor, as a share of its root mean square.
        tensors: By type: how many there are.
        next_tokens: How far its next tokens are.
    """

    errors: dict[str, float]
    tensors: dict[str, int]
    next_tokens: "NextTokens"

    def as_dict(self) -> dict[str, Any]:
        return {
            "tensors": {kind: {"count": self.tensors[kind], "error": self.errors[kind]} for kind in self.errors},
            **vars(self.next_tokens),
        }


@dataclass(frozen=True)
class NextTokens:
    """Two models' next tokens over the same texts.

    Attributes:
        kl: Mean KL divergence from the checkpoint's distribution to the file's, in nats.
        kl_median: Its median: one flipped expert does not show in it.
        kl_unrelated: Mean KL divergence between the checkpoint's distributions of neighbouring places.
        top1: Share of places where both think the same token likeliest.
        clear: Share of places where the checkpoint's likeliest token is twice as likely as its second.
        top1_clear: ``top1`` of those; 1 where there are none.
        tokens: How many places were compared.
    """

    kl: float
    kl_median: float
    kl_unrelated: float
    top1: float
    clear: float
    top1_clear: float
    tokens: int

    @staticmethod
    def of(expected: np.ndarray, found: np.ndarray) -> "NextTokens":
        """Compare logits, [places, vocabulary] each."""
        ours = torch.log_softmax(torch.from_numpy(expected).double(), -1)
        theirs = torch.log_softmax(torch.from_numpy(found).double(), -1)

        def divergence(other: torch.Tensor) -> torch.Tensor:
            return (ours.exp() * (ours - other)).sum(-1).clamp(min=0)

        same = ours.argmax(-1) == theirs.argmax(-1)
        best, second = ours.topk(2, -1).values.unbind(-1)
        clear = best - second > math.log(2)
        return NextTokens(
            kl=divergence(theirs).mean().item(),
            kl_median=divergence(theirs).median().item(),
            kl_unrelated=divergence(ours.roll(1, 0)).mean().item(),
            top1=same.double().mean().item(),
            clear=clear.double().mean().item(),
            top1_clear=same[clear].double().mean().item() if clear.any() else 1.0,
            tokens=len(ours),
        )


def refuse_without_memory(dims: ModelShape) -> None:
    """Find out before hours of writing that the comparison could not be made.

    Raises:
        EnvironmentProblem: a layer in fp32 has no room.
    """
    needed, free = reference.bytes_needed(dims) * 5 // 4, available_memory()
    if free is not None and free < needed:
        raise EnvironmentProblem(
            f"comparing the file with the checkpoint needs {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} "
            "GB are free; free some, or pass --no-check."
        )


def compare(
    file: Path,
    sources: Mapping[str, Rows],
    *,
    model: ExportedModel,
    tokenizer: Any,
    quantization: Quantization,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Compare a file with what it was made from.

    Args:
        file: The GGUF file.
        sources: The rows each of its tensors was made from, in the file's order.
        model: The checkpoint, for its logits.
        tokenizer: The transformers tokenizer.
        quantization: What the file should be.
        on_bytes: Called with the number of bytes each time some are read.

    Raises:
        CheckpointError: a tensor, the tokens of a text, or the next tokens differ by more than the type explains.
    """
    errors, counts = _compare_tensors(StoredFile(file), sources, on_bytes)
    with temporary_folder() as name:
        next_tokens = _compare_tokens(file, model, tokenizer, Path(name))
    found = Measured(errors, counts, next_tokens)
    _refuse(found.next_tokens, quantization)
    return found


def _compare_tensors(
    stored: StoredFile, sources: Mapping[str, Rows], on_bytes: Callable[[int], None]
) -> tuple[dict[str, float], dict[str, int]]:
    if stored.tensors.keys() != sources.keys():
        other = sorted(stored.tensors.keys() ^ sources.keys())
        raise CheckpointError(
            f"{stored.path.name} was written incorrectly: {other[0]} is in only one of the file and the checkpoint."
        )
    errors: dict[str, float] = {}
    counts: dict[str, int] = {}
    try:
        with ThreadPoolExecutor(io_threads()) as pool:
            jobs = {name: pool.submit(_error, stored, name, rows, on_bytes) for name, rows in sources.items()}
            for name, job in jobs.items():
                kind = stored.tensors[name].tensor_type.name
                error = job.result()
                if not error <= LARGEST_ERROR[kind]:
                    raise CheckpointError(
                        f"{name} as {kind} differs from the checkpoint by {error:.2g} of its size, and rounding "
                        f"explains at most {LARGEST_ERROR[kind]:g}; its weights do not suit this type, so choose a "
                        "larger one."
                    )
                errors[kind] = max(error, errors.get(kind, 0.0))
                counts[kind] = counts.get(kind, 0) + 1
    finally:
        close_inputs()
    return errors, counts


def _error(stored: StoredFile, name: str, rows: Rows, on_bytes: Callable[[int], None]) -> float:
    """Norm of the difference over norm of the tensor.

    Raises:
        CheckpointError: a row is another's, however little it weighs in the whole.
    """
    columns = rows.row_bytes // ITEM_BYTES[rows.dtype]
    is_vector = columns == 1
    step = rows.rows if is_vector else max(1, _CHUNK_BYTES // (4 * columns))
    norms, off = np.empty(rows.rows), np.empty(rows.rows)
    for start in range(0, rows.rows, step):
        count = min(step, rows.rows - start)
        wanted = np.empty((count, columns), dtype=np.float32)
        read_rows(rows, start, count, memoryview(wanted.view(np.uint8)).cast("B"), "F32")
        found = stored.values(name, 0, 1).T if is_vector else stored.values(name, start, start + count)
        norms[start : start + count] = np.square(wanted).sum(1)
        off[start : start + count] = np.square(np.subtract(wanted, found, out=wanted)).sum(1)
        on_bytes(count * rows.row_bytes)
    counts = norms >= _FAINT * norms.mean()
    wrong = np.flatnonzero(counts & (off > _ANOTHER * norms))
    if len(wrong) and not is_vector:
        raise CheckpointError(f"{name}, row {wrong[0]}: differs from the checkpoint; the file was written incorrectly.")
    return (off.sum() / norms.sum()) ** 0.5 if norms.any() else float(off.any())


def _compare_tokens(file: Path, model: ExportedModel, tokenizer: Any, folder: Path) -> NextTokens:
    texts = [*PROBES, *TEXTS]
    wanted = [list(tokenizer(text)["input_ids"]) for text in texts]
    longest = min(_LONGEST, StoredFile(file).field("llama.context_length"))
    sequences = [ids[:longest] for ids in wanted[len(PROBES) :]]
    ran = llama.run(file, texts, sequences, folder)
    for text, ours, theirs in zip(texts, wanted, ran.tokens, strict=True):
        if ours != theirs:
            raise CheckpointError(
                f"llama.cpp splits {text!r} into {theirs}, the checkpoint's tokenizer into {ours}; it cannot split "
                "text the way this tokenizer does. Pass --no-check to write the file anyway."
            )
    expected = reference.logits(model, sequences, folder)
    return NextTokens.of(np.concatenate(expected), np.concatenate(ran.logits))


def _refuse(found: NextTokens, quantization: Quantization) -> None:
    most = min(quantization.divergence, quantization.relative * found.kl_unrelated)
    agrees = found.clear < _MOSTLY_CLEAR or found.top1_clear >= quantization.agreement
    if found.kl <= most and agrees:
        return
    raise CheckpointError(
        f"{quantization.name}: the file's next tokens diverge from the checkpoint's by {found.kl:.2e} nats, and "
        f"{found.top1_clear:.0%} of the clear ones agree; this type's limits are {most:.2e} and "
        f"{quantization.agreement:.0%}. Choose a larger type, or pass --no-check."
    )


def required_packages(*, check: bool, quantization: Quantization) -> None:
    """Refuse at the start what would fail at the end.

    Raises:
        EnvironmentProblem: a package is not installed.
    """
    package("gguf")
    if check or quantization.by_llama_cpp:
        package("cyllama")
