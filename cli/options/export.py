"""The form an export takes."""

from dataclasses import dataclass

from mixtral_recipes.cli.options.checkpoint import Base, Dtype
from mixtral_recipes.cli.options.groups import field
from mixtral_recipes.importers import exports


@dataclass
class FormOptions:
    """What is written, and over which base."""

    target: str | None = field("--format NAME", f"{exports.summaries()}. Default: by OUTPUT's ending, or hf.")
    layout: str | None = field("--layout NAME", "v4 (default; as released Mixtrals) or v5 (fused experts).")
    max_shard_size: str | None = field("--max-shard-size SIZE", "Largest weight file; 5GB by default.")
    quantization: str | None = field(
        "--quantization TYPE", "Type of a GGUF file: f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0."
    )
    dtype: Dtype = None
    base: Base = None
    no_check: bool = field(
        "--no-check",
        "Do not compare a merged model's logits with base and adapter's, nor a GGUF file with its checkpoint.",
    )
    merge_into: str | None = field(
        "--merge-into WEIGHTS",
        "What a QLoRA adapter is merged into: original (default), or 4bit (8bit), the dequantised weights it was "
        "trained on.",
    )
