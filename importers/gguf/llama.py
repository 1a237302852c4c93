"""What llama.cpp does with a GGUF file, in a process of its own: it ends itself on what it does not like.

python -m mixtral_recipes.importers.gguf.llama quantize SOURCE TARGET FILE_TYPE THREADS
python -m mixtral_recipes.importers.gguf.llama run FILE QUESTION.json ANSWER.npz
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixtral_recipes.importers.gguf.extra import package
from mixtral_recipes.importers.own_process import in_own_process

if TYPE_CHECKING:
    import numpy as np


def quantize(
    source: Path, target: Path, file_type: int, threads: int, *, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Quantize a GGUF file.

    Args:
        source: One in 16 bits.
        target: The file to make.
        file_type: What it becomes, in ``llama_ftype``.
        threads: How many llama.cpp uses.
        on_bytes: Called with the number of bytes each time some were written.

    Raises:
        CheckpointError: llama.cpp could not; with its last line.
    """
    seen = 0

    def look() -> None:
        nonlocal seen
        size = target.stat().st_size if target.exists() else 0
        on_bytes(size - seen)
        seen = size

    in_own_process(
        "llama.cpp could not quantize",
        __name__,
        ["quantize", str(source), str(target), str(file_type), str(threads)],
        meanwhile=look,
    )


def run(file: Path, texts: Sequence[str], sequences: Sequence[Sequence[int]], folder: Path) -> "Run":
    """Let llama.cpp split texts and go through token sequences, on the CPU.

    Args:
        file: The GGUF file.
        texts: Texts to split, special tokens put around them.
        sequences: Token ids.
        folder: For files in between.

    Raises:
        CheckpointError: llama.cpp cannot load or run the file.
    """
    import numpy as np

    question, answer = folder / "question.json", folder / "llama.npz"
    question.write_text(json.dumps({"texts": list(texts), "sequences": [list(ids) for ids in sequences]}))
    in_own_process("llama.cpp cannot run the file", __name__, ["run", str(file), str(question), str(answer)])
    with np.load(answer) as found:
        logits = [found[f"logits{number}"] for number in range(len(sequences))]
        return Run([found[f"tokens{number}"].tolist() for number in range(len(texts))], logits)


class Run(NamedTuple):
    """What llama.cpp said: the tokens of each text, and the logits of each sequence, [tokens, vocabulary] float32."""

    tokens: list[list[int]]
    logits: "list[np.ndarray]"


def _library() -> Any:
    package("cyllama")
    from cyllama.llama import llama_cpp

    llama_cpp.ggml_backend_load_all()
    return llama_cpp


def _quantize(source: str, target: str, file_type: str, threads: str) -> None:
    library = _library()
    how = library.LlamaModelQuantizeParams()
    how.ftype, how.nthread = int(file_type), int(threads)
    library.model_quantize(source, target, how)


def _run(file: str, question: str, answer: str) -> None:
    import numpy as np

    library = _library()
    asked = json.loads(Path(question).read_text())
    how = library.LlamaModelParams()
    how.n_gpu_layers = 0
    model = library.LlamaModel(file, how)
    vocabulary = model.get_vocab()
    found: dict[str, Any] = {}
    for number, text in enumerate(asked["texts"]):
        found[f"tokens{number}"] = np.array(vocabulary.tokenize(text, True, True), dtype=np.int64)
    longest = max(map(len, asked["sequences"]))
    settings = library.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(32, longest)
    context = library.LlamaContext(model, settings)
    for number, ids in enumerate(asked["sequences"]):
        context.kv_cache_clear()
        batch = library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(token, place, [0], True)
        context.decode(batch)
        rows = [context.get_logits_ith(place) for place in range(len(ids))]
        found[f"logits{number}"] = np.array(rows, dtype=np.float32)
    np.savez(answer, **found)


if __name__ == "__main__":
    {"quantize": _quantize, "run": _run}[sys.argv[1]](*sys.argv[2:])
