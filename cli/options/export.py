"""The form an export takes."""

from dataclasses import dataclass
from typing import Annotated

import typer

from mixtral_recipes.cli.options.checkpoint import Base, Dtype
from mixtral_recipes.importers import exports


@dataclass
class FormOptions:
    """What is written, and over which base."""

    target: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help=f"{exports.summaries()}. Default: by OUTPUT's ending, or hf."),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="NAME", help="v4 (default; as released Mixtrals) or v5 (fused experts)."),
    ] = None
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file; 5GB by default.")
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            metavar="TYPE",
            help="Type of a GGUF file: f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0.",
        ),
    ] = None
    dtype: Dtype = None
    base: Base = None
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="Do not compare a merged model's logits with base and adapter's, nor a GGUF file with its checkpoint.",
        ),
    ] = False
    merge_into: Annotated[
        str | None,
        typer.Option(
            "--merge-into",
            metavar="WEIGHTS",
            help="What a QLoRA adapter is merged into: original (default), or 4bit (8bit), the dequantised weights it "
            "was trained on.",
        ),
    ] = None
