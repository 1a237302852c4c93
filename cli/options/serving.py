"""A server: where it listens, whom it lets in, how much it takes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class ServerOptions:
    """How a model is served."""

    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="What clients must send; or MIXTRAL_RECIPES_TOKEN. Needed where --host is not this machine's own.",
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", metavar="NAME", help="What clients call it; default: MODEL's last part."),
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts continued together on a process.")
    ] = 8
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", metavar="N", min=2, help="Most tokens of prompt and answer; default: all."),
    ] = None
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=0, help="Prompts that may wait; more are refused (429).")
    ] = 128
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="megatron (here) or vllm (its command); default: by size."),
    ] = None
    exec_: Annotated[bool, typer.Option("--exec", help="Run vLLM's command instead of printing it.")] = False

    def name_of(self, model: str) -> str:
        """What clients call a MODEL."""
        return self.served_model_name or Path(model.rstrip("/")).name
