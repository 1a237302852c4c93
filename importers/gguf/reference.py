"""A checkpoint's logits by transformers, one layer in memory at a time, in a process of its own.

    python -m mixtral_recipes.importers.gguf.reference QUESTION.json ANSWER.npz

The model is built without weights; each layer gets its own when its turn comes and gives them back behind it. So the
model that an export is compared with never is in memory as a whole.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.checkpoints.format.rows import Rows, read_rows
from mixtral_recipes.importers.convert.exported import ExportedModel
from mixtral_recipes.importers.mapping import StoredParts, hf_tensors, shape_of
from mixtral_recipes.importers.own_process import in_own_process
from mixtral_recipes.layout.shapes import ModelShape

if TYPE_CHECKING:
    import numpy as np


def logits(model: ExportedModel, sequences: Sequence[Sequence[int]], folder: Path) -> "list[np.ndarray]":
    """Logits in fp32, [tokens, vocabulary] for each sequence; adapters merged.

    Args:
        model: The model; its files were compared with their hashes before.
        sequences: Token ids.
        folder: For files in between.

    Raises:
        CheckpointError: transformers cannot run it.
    """
    import numpy as np

    question, answer = folder / "sequences.json", folder / "transformers.npz"
    asked = {"checkpoint": str(model.checkpoint), "base": model.base and str(model.base), "into": model.into}
    question.write_text(json.dumps(asked | {"sequences": [list(ids) for ids in sequences]}))
    in_own_process("transformers cannot run the checkpoint", __name__, [str(question), str(answer)])
    with np.load(answer) as found:
        return [found[f"logits{number}"] for number in range(len(sequences))]


def bytes_needed(dims: ModelShape) -> int:
    """Memory of the largest part that is loaded at once: a layer, or the embeddings, in fp32."""
    layer = dims.num_moe_experts * 3 * math.prod(shape_of("F H", dims)) + 4 * math.prod(shape_of("Q H", dims))
    return 4 * max(layer, math.prod(shape_of("V H", dims)))


def _main(question: str, answer: str) -> None:
    import numpy as np
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    asked = json.loads(Path(question).read_text())
    sequences, base = asked["sequences"], asked["base"]
    exported = ExportedModel(Path(asked["checkpoint"]), Path(base) if base else None, asked["into"], "F32")
    rows = exported.rows(verified=True)
    config: Any = MixtralConfig(**exported.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(config)
    model.eval().model.rotary_emb = MixtralRotaryEmbedding(config)
    wanted = hf_tensors(exported.dims, fused=True)
    for name, module in [
        ("model.embed_tokens", model.model.embed_tokens),
        *((f"model.layers.{number}", layer) for number, layer in enumerate(model.model.layers)),
        ("model.norm", model.model.norm),
        ("lm_head", model.lm_head),
    ]:

        def fill(module: Any, _: Any, name: str = name) -> None:
            state = {
                full.removeprefix(f"{name}."): _tensor(parts, rows)
                for full, parts in wanted.items()
                if full.startswith(f"{name}.")
            }
            module.load_state_dict(state, assign=True)

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(lambda module, _, __: module.to("meta") and None)
    longest = max(map(len, sequences))
    # Padding stands behind, where a causal model does not see it.
    ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences])
    with torch.no_grad():
        found = model(ids, use_cache=False).logits.float().numpy()
    cut = zip(found, sequences, strict=True)
    np.savez(answer, **{f"logits{number}": row[: len(tokens)] for number, (row, tokens) in enumerate(cut)})


def _tensor(parts: StoredParts, rows: Mapping[str, Rows]) -> Any:
    """A tensor in fp32 from the rows it consists of."""
    import torch

    whole = torch.empty(parts.shape, dtype=torch.float32)
    out = memoryview(whole.view(-1).view(torch.uint8).numpy()).cast("B")
    nbytes = len(out) // len(parts.names)
    for number, name in enumerate(parts.names):
        read_rows(rows[name], 0, rows[name].rows, out[number * nbytes : (number + 1) * nbytes], "F32")
    return whole


if __name__ == "__main__":
    _main(*sys.argv[1:])
