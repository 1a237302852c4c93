"""Which type each tensor of a GGUF file has, and how far from the checkpoint it may be."""

from dataclasses import dataclass

from mixtral_recipes.errors import CheckpointError, nearest
from mixtral_recipes.importers.mapping import StoredParts


@dataclass(frozen=True)
class Quantization:
    """A type of file.

    Attributes:
        name: What users call it.
        file_type: Its name in gguf's ``LlamaFileType`` and llama.cpp's ``llama_ftype``.
        matrix: The type of its matrices; llama.cpp gives some of a K-quant's another.
        by_llama_cpp: Whether llama.cpp quantizes it, from a file in 16 bits; the others are written at once.
        divergence: The largest mean KL divergence from the checkpoint's next tokens that passes, in nats.
        relative: The same as a share of how far the checkpoint's next tokens are from those one place on: what
            divergence means depends on how sure a model is.
        agreement: The smallest share of likeliest tokens that are the checkpoint's which passes, where those are clear;
            of a model to which few are, nothing is asked.
    """

    name: str
    file_type: str
    matrix: str
    by_llama_cpp: bool
    divergence: float
    relative: float
    agreement: float


# Several times what a small model with random weights shows, whose experts and next tokens are nearly tied: one flipped
# expert moves a token further than any rounding. With rows, experts or angles in the wrong place nothing is left.
QUANTIZATIONS = {
    found.name: found
    for found in (
        Quantization("f16", "MOSTLY_F16", "F16", False, 0.005, 0.1, 0.98),
        Quantization("bf16", "MOSTLY_BF16", "BF16", False, 0.02, 0.3, 0.95),
        Quantization("q8_0", "MOSTLY_Q8_0", "Q8_0", False, 0.03, 0.4, 0.95),
        Quantization("q6_k", "MOSTLY_Q6_K", "Q6_K", True, 0.04, 0.4, 0.93),
        Quantization("q5_k_m", "MOSTLY_Q5_K_M", "Q5_K", True, 0.1, 0.5, 0.9),
        Quantization("q4_k_m", "MOSTLY_Q4_K_M", "Q4_K", True, 0.2, 0.6, 0.8),
        Quantization("q4_0", "MOSTLY_Q4_0", "Q4_0", False, 0.3, 0.7, 0.75),
    )
}

# The largest error of a tensor, as a share of its root mean square: about twice that of normally distributed weights;
# that of Q8_0 is what no weights exceed (half a step, a 127th of the largest of 32).
LARGEST_ERROR = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 0.0224,
    "Q6_K": 0.04,
    "Q5_K": 0.08,
    "Q5_0": 0.1,
    "Q5_1": 0.1,
    "Q4_K": 0.16,
    "Q4_0": 0.18,
    "Q4_1": 0.18,
}


def quantization_of(name: str) -> Quantization:
    """A type of file by its name, in either case.

    Raises:
        CheckpointError: there is none of that name.
    """
    found = QUANTIZATIONS.get(name.lower())
    if found is None:
        raise CheckpointError(f"--quantization {name} is not a known type.{nearest(name.lower(), [*QUANTIZATIONS])}")
    return found


def tensor_type(name: str, parts: StoredParts, quantization: Quantization) -> str:
    """The type a tensor is written in.

    Norms and the router stay in 32 bits, as llama.cpp's own conversion has them. Where matrices have four bits, the
    output layer has eight and so have keys and values of a model with 8 experts: small, and they decide much.

    Source: llama.cpp `llama-quant.cpp`, llama_tensor_get_type (the output layer is Q6_K there).
    """
    if len(parts.shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    is_small = name == "output.weight" or name.endswith(("attn_k.weight", "attn_v.weight"))
    return "Q8_0" if quantization.matrix == "Q4_0" and is_small else quantization.matrix


def check_rows(tensors: dict[str, StoredParts], quantization: Quantization, sizes: dict[str, int]) -> None:
    """Refuse a model whose rows cannot be cut into the type's blocks: llama.cpp would silently use other types.

    Args:
        tensors: The file's.
        quantization: The type.
        sizes: Weights in a block, by type.

    Raises:
        CheckpointError: names the tensors, and the types that would do.
    """

    def unfit(kind: Quantization) -> list[str]:
        types = {name: tensor_type(name, parts, kind) for name, parts in tensors.items()}
        return [name for name, parts in tensors.items() if parts.shape[-1] % sizes[types[name]]]

    found = unfit(quantization)
    if found:
        rows = tensors[found[0]].shape[-1]
        others = f", and so have {len(found) - 1} more tensors" if len(found) > 1 else ""
        fit = ", ".join(name for name, kind in QUANTIZATIONS.items() if not unfit(kind))
        raise CheckpointError(
            f"--quantization {quantization.name}: {found[0]} has rows of {rows} weights{others}, but this type needs "
            f"row lengths that are multiples of {sizes[quantization.matrix]}; use {fit}."
        )
