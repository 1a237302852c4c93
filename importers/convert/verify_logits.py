"""Compare a checkpoint's logits with transformers', each model in a process of its own.

Two processes because Megatron on a CPU replaces parts of torch (`cpu/device.py`) that transformers must find as
they are, and because the two models then need not be in memory together.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.own_process import in_own_process
from mixtral_recipes.system.files import temporary_folder

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = 3
TOKENS = 16
# fp32 sums in another order: four layers of a small Mixtral differ by 1e-6, 32 layers by a few 1e-5.
TOLERANCE = 1e-3


def compare_logits(checkpoint: Path, source: Path | None) -> tuple[str, None]:
    """Run both models in fp32 on the same tokens.

    Args:
        checkpoint: The Megatron checkpoint.
        source: The Hugging Face folder to compare with; None exports the checkpoint to a temporary one.

    Raises:
        CheckpointError: the largest difference exceeds `TOLERANCE` of the largest logit, or a model cannot run.
    """
    with temporary_folder() as folder:
        if source is None:
            from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint

            source = export_checkpoint(checkpoint, Path(folder) / "hf", progress=False, no_check=True)
        ours = _run("megatron", checkpoint, Path(folder) / "ours.pt")
        theirs = _run("transformers", source, Path(folder) / "theirs.pt")
        import torch

        a, b = torch.load(ours, weights_only=True), torch.load(theirs, weights_only=True)
    difference = (a - b).abs().max().item()
    scale = b.abs().max().item()
    detail = f"largest difference {difference:.2e} of logits up to {scale:.2f}, {PROMPTS} prompts of {TOKENS} tokens"
    if not difference <= TOLERANCE * scale:
        raise CheckpointError(f"logits: {detail}; rounding explains at most {TOLERANCE:g} of the largest.")
    return detail, None


def _run(kind: str, model: Path, output: Path) -> Path:
    failure = f"logits: the model in {model} could not run in {kind}"
    in_own_process(failure, "mixtral_recipes.importers.convert.verify_logits", [kind, str(model), str(output)])
    return output


def _tokens(vocab_size: int) -> "Tensor":
    import torch

    return torch.randint(vocab_size, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))


def _megatron(checkpoint: Path, output: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if not torch.cuda.is_available():
        from mixtral_recipes.cpu import device as cpu_device

        cpu_device.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mixtral_recipes.checkpoints.load import load_model
    from mixtral_recipes.importers.hf import config as hf_config
    from mixtral_recipes.models.builder import build_model
    from mixtral_recipes.models.config import MixtralConfig

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    fields = hf_config.to_megatron(json.loads((checkpoint / "context" / "config.json").read_text()))
    config = MixtralConfig(**fields, seq_length=TOKENS, bf16=False, params_dtype=torch.float32)
    model = build_model(config)[0].eval()
    load_model([model], checkpoint)
    device = next(model.parameters()).device
    tokens = _tokens(config.vocab_size).to(device)
    positions = torch.arange(TOKENS, device=device).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    torch.save(logits[..., : config.vocab_size].float().cpu(), output)
    dist.destroy_process_group()


def _transformers(folder: Path, output: Path) -> None:
    import torch
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(_tokens(model.config.vocab_size)).logits
    torch.save(logits, output)


if __name__ == "__main__":
    {"megatron": _megatron, "transformers": _transformers}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
