"""The sizes of a model and of a batch."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """The sizes that fix the shape of every weight of a Mixtral, and which layouts it allows (names are Megatron's)."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    num_moe_experts: int
    max_position_embeddings: int
    vocab_size: int = 32000
    make_vocab_size_divisible_by: int = 128
    kv_channels: int | None = None

    @staticmethod
    def of(config: Any) -> "ModelShape":
        """The sizes of a Mixtral configuration, whether already built or still a `run.Config` of one."""
        return ModelShape(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups or config.num_attention_heads,
            ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size or 4 * config.hidden_size,
            num_moe_experts=config.num_moe_experts or 1,
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
            kv_channels=config.kv_channels,
        )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """The vocabulary rounded up so that every tensor-parallel rank holds an equal share."""
        unit = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // unit) * unit


# The most that a size may be: far above every model there is, and low enough that a list of it fits.
LARGEST = {
    "num_layers": 1_000,
    "hidden_size": 1 << 20,
    "ffn_hidden_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_query_groups": 1 << 16,
    "kv_channels": 1 << 16,
    "num_moe_experts": 4_096,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
}

# The models' sizes, stated here only: `models/config.py` and the recipes' catalog read them.
# Source: mistralai/Mixtral-8x7B-v0.1 config.json.
MIXTRAL_8X7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    num_moe_experts=8,
    max_position_embeddings=4096,
)
# Source: mistralai/Mixtral-8x22B-v0.1 config.json.
MIXTRAL_8X22B = replace(MIXTRAL_8X7B, num_layers=56, hidden_size=6144, num_attention_heads=48, ffn_hidden_size=16384)
# Source: NeMo Framework Launcher, training/mixtral/mixtral_8x3b.yaml.
MIXTRAL_8X3B = replace(MIXTRAL_8X7B, hidden_size=2560, ffn_hidden_size=8960)
# Source: the embedded model's config.json.
MIXTRAL_TINY = ModelShape(
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=128,
    num_moe_experts=8,
    max_position_embeddings=512,
    vocab_size=1999,
    kv_channels=64,  # heads narrower than this hardly learn to match one of a few hundred words
)


@dataclass(frozen=True)
class BatchShape:
    """Sequences per step and their length.

    Attributes:
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences one data-parallel rank passes through the model at once.
        seq_length: Tokens per sequence.
        packed: Whether several samples share one sequence.
        fp8: Whether matrix products run in FP8.
    """

    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    packed: bool = False
    fp8: bool = False

    @staticmethod
    def of(data: Any, *, fp8: bool = False) -> "BatchShape":
        """The batch of a data module, whether already built or still a `run.Config` of one; a pack is a sequence."""
        specs = getattr(data, "packed_sequence_specs", None)
        pack_size = specs.packed_sequence_size if specs is not None else -1
        return BatchShape(
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            seq_length=pack_size if pack_size > 0 else data.seq_length,
            packed=pack_size > 0,
            fp8=fp8,
        )
