"""How samples become sequences, in NeMo's spelling."""

from dataclasses import dataclass

from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class PackedSequenceSpecs:
    """How samples are packed, in NeMo's spelling.

    Attributes:
        packed_sequence_size: Tokens per pack; -1 does not pack. Samples are cut to ``seq_length``, which may be less.
        tokenizer_model_name: Accepted for NeMo's recipes; the cache is keyed by the tokenizer's content.
        packed_train_data_path: NeMo's file of packs, which is not read: packs are built from the samples.
        packed_val_data_path: As above.
        packed_metadata_path: As above.
        pad_cu_seqlens: Give ``cu_seqlens`` the same number of entries in every microbatch (CUDA graphs need it).
    """

    packed_sequence_size: int = -1
    tokenizer_model_name: str | None = None
    packed_train_data_path: str | None = None
    packed_val_data_path: str | None = None
    packed_metadata_path: str | None = None
    pad_cu_seqlens: bool = False
