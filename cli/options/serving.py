"""A server: where it listens, whom it lets in, how much it takes on."""

from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.cli.options.groups import field


@dataclass
class ServerOptions:
    """How a model is served."""

    host: str = field("--host ADDRESS", "Where to listen.", "127.0.0.1")
    port: int = field("--port N", "0 picks a free one.", 8000, min=0, max=65535)
    token_file: Path | None = field(
        "--token-file FILE",
        "Token that clients must send; or MIXTRAL_RECIPES_TOKEN. Required unless --host is this machine's own.",
    )
    served_model_name: str | None = field(
        "--served-model-name NAME", "What clients call it; default: MODEL's last part."
    )
    batch_size: int = field("--batch-size N", "Prompts continued together in a process.", 8, min=1, max=4096)
    context_length: int | None = field(
        "--context-length N", "Maximum tokens of prompt and answer; default: the model's.", min=2
    )
    queue: int = field("--queue N", "Prompts that may wait; more are refused (429).", 128, min=0)
    engine: str | None = field("--engine NAME", "megatron (here) or vllm (its command); default: by size.")
    exec_: bool = field("--exec", "Run vLLM's command instead of printing it.")

    def name_of(self, model: str) -> str:
        """What clients call a MODEL."""
        return self.served_model_name or Path(model.rstrip("/")).name
