"""Every recipe in one static table: its model, its default parallel layouts and why. Pure Python: loads no torch.

Recipe modules take their layouts from here, and so do `recipes list`, completion and the documentation's tables; a
test checks the table against the code. `planner/` counts the memory behind each layout, and `outline.default_layout`
chooses by it for numbers of GPUs that stand not here.
"""

import dataclasses
from dataclasses import dataclass, field

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.shapes import MIXTRAL_8X3B, MIXTRAL_8X7B, MIXTRAL_8X22B, MIXTRAL_TINY, ModelShape
from mixtral_recipes.layout.topology import Topology

TASKS = ("pretrain", "finetune")
PRECISIONS = ("bf16", "fp8")
PEFT_SCHEMES = ("lora", "dora", "qlora", "none")

# The cards (`layout/cards.py`) that default layouts were chosen for.
HARDWARE = ("h100", "h200", "b200", "gb200")
PRETRAIN_STEPS = 1_168_251  # NeMo 2.0


@dataclass(frozen=True)
class Layout:
    """A default layout.

    Attributes:
        num_nodes: Nodes.
        num_gpus_per_node: Processes per node.
        topology: The parallel sizes on that many processes.
        recompute: Whether every layer is recomputed in the backward pass.
        why: Its source, or the arithmetic that chose it.
    """

    num_nodes: int
    num_gpus_per_node: int
    topology: Topology
    recompute: bool = False
    why: str = ""


@dataclass(frozen=True)
class RecipeEntry:
    """What is known about a recipe without building it.

    Attributes:
        name: Recipe name; its module is ``mixtral_recipes.recipes.<name>``.
        model: The model's name.
        shape: The model's sizes.
        seq_length: Tokens per sequence in pretraining; fine-tuning uses `finetune_seq_length`.
        finetune_seq_length: Tokens per sequence in fine-tuning.
        base: Hub id fine-tuning starts from, or the embedded model; None if it is not published.
        instruct: Hub id of the Instruct variant, if there is one.
        layouts: Task (``pretrain``, ``performance``, ``peft``, ``full``, ``full_packed``), optionally followed by
            ``@hardware`` where a GPU needs a layout of its own -> its layout.
        needs_gpu: Whether it can only run on GPUs.
        precisions: Precision choices, the default first.
        pretrain_steps: Optimizer steps of pretraining.
        finetune_steps: Of fine-tuning.
        pretrain_batch: Sequences per step.
        finetune_batch: Of fine-tuning, padded.
        packed_batch: Of fine-tuning, packed.
        micro_batch: Sequences at once, where they are not packed.
    """

    name: str
    model: str
    shape: ModelShape
    seq_length: int
    finetune_seq_length: int
    base: str | None
    instruct: str | None
    layouts: dict[str, Layout] = field(hash=False)
    needs_gpu: bool = True
    precisions: tuple[str, ...] = PRECISIONS
    pretrain_steps: int = PRETRAIN_STEPS
    finetune_steps: int = 1000
    pretrain_batch: int = 512
    finetune_batch: int = 128
    packed_batch: int = 8
    micro_batch: int = 1

    def layout(self, task: str, hardware: str = "h100") -> Layout:
        """The default layout of a task on a kind of GPU.

        Args:
            task: ``pretrain``, ``performance``, ``peft``, ``full`` or ``full_packed``.
            hardware: A key of `HARDWARE`.

        Raises:
            RecipeError: hardware that is not in the table.
        """
        if hardware not in HARDWARE:
            raise RecipeError(f"hardware={hardware!r} is not supported.{nearest(hardware, HARDWARE)}")
        fallbacks = {"full_packed": ("full_packed", "full"), "performance": ("performance", "pretrain")}
        gpus = {"gb200": ("gb200", "b200", "h100"), "b200": ("b200", "h100")}.get(hardware, (hardware, "h100"))
        for gpu in gpus:
            for name in fallbacks.get(task, (task,)):
                found = self.layouts.get(name if gpu == "h100" else f"{name}@{gpu}")
                if found:
                    return _on_nodes_of(found, hardware)
        raise RecipeError(f"{self.name} has no layout for {task!r}.")

    def layouts_of(self, tasks: tuple[str, ...]) -> list[Layout]:
        """Every default layout of some tasks, on any kind of GPU."""
        return [layout for key, layout in self.layouts.items() if key.partition("@")[0] in tasks]


def _on_nodes_of(layout: Layout, hardware: str) -> Layout:
    """The same number of GPUs on nodes of another size (GB200 has four per node)."""
    per_node = cards.card(hardware).per_node
    if layout.num_gpus_per_node <= per_node:
        return layout
    nodes = layout.num_nodes * layout.num_gpus_per_node // per_node
    return dataclasses.replace(layout, num_nodes=nodes, num_gpus_per_node=per_node)


def _layout(
    nodes: int,
    tp: int,
    pp: int,
    vpp: int | None,
    cp: int,
    ep: int,
    etp: int | None = None,
    *,
    gpus: int = 8,
    recompute: bool = False,
    why: str,
) -> Layout:
    """Sequence parallelism is on with tensor parallelism: Megatron's MoE layer needs it there."""
    topology = Topology(nodes * gpus, tp, pp, vpp, cp, ep, etp, sequence_parallel=tp > 1)
    return Layout(nodes, gpus, topology, recompute, why)


_NEMO = "NeMo 2.0's recipe."
_NEMO_FAST = "NeMo 2.0's performance mode: EP1, TP8, SP."
_IN_NODE = "expert TP 1, so that the experts' all-to-all over EP 8 stays inside a node"


# Columns: nodes, TP, PP, VPP, CP, EP, expert TP. Memory: docs/reference/recipes/.
_LAYOUTS_8X7B = {
    "pretrain": _layout(8, 1, 4, 8, 1, 8, why=_NEMO),
    "pretrain@h200": _layout(8, 1, 1, None, 1, 8, why="With 141 GB, a rank's layers fit without a pipeline."),
    "pretrain@b200": _layout(8, 1, 1, None, 1, 8, why="NeMo performance summary 25.02, 8x7B on B200: TP1 EP8."),
    "performance": _layout(8, 8, 4, 8, 1, 1, why=_NEMO_FAST),
    "peft": _layout(1, 1, 1, None, 1, 8, why="NeMo 2.0's recipe: one node, EP8."),
    "full": _layout(4, 1, 4, 8, 1, 8, why="NeMo's EP8 x PP4 on the 32 GPUs it needs; on NeMo's 8 it cannot start."),
    "full_packed": _layout(
        4, 4, 1, None, 1, 8, 1, why=f"8 packs per step are too few for a pipeline, so TP4 for memory; {_IN_NODE}."
    ),
    "full@h200": _layout(2, 2, 1, None, 1, 8, 1, why=f"Fits 2 nodes of 141 GB without a pipeline; {_IN_NODE}."),
    "full@b200": _layout(1, 1, 1, None, 1, 8, why="Weights, gradients and Adam's state fit one node of 180 GB."),
}
_LAYOUTS_8X7B_16K = {
    "pretrain": _layout(4, 4, 2, None, 4, 1, why=_NEMO),
    "pretrain@h200": _layout(4, 1, 1, None, 4, 8, why="141 GB need no TP; CP4 and EP8 stay inside a node."),
    "pretrain@b200": _layout(4, 1, 1, None, 2, 8, why="With 180 GB, half the context parallelism is enough."),
    "performance": _layout(4, 8, 2, None, 2, 1, why=f"{_NEMO_FAST} CP2, so that TP8 still fits 32 GPUs."),
    "peft": _layout(1, 2, 1, None, 4, 8, 1, why="One node: TP2 x CP4 leaves 2048 tokens per rank, as at 2k; EP8."),
    "full": _layout(
        4, 2, 4, 8, 4, 8, 1, why=f"TP2 x CP4 leaves 2048 tokens per rank; PP4 for the weights; {_IN_NODE}."
    ),
}
_LAYOUTS_8X7B_64K = {
    "pretrain": _layout(16, 8, 4, None, 4, 1, why=_NEMO),
    "pretrain@h200": _layout(16, 2, 1, None, 8, 8, 1, why=f"TP2 x CP8 leaves 4096 tokens per rank; {_IN_NODE}."),
    "pretrain@b200": _layout(16, 1, 1, None, 8, 8, why="CP8 leaves 8192 tokens per rank; CP and EP inside a node."),
    "performance": _layout(16, 8, 4, None, 4, 1, why=f"{_NEMO_FAST} The recipe's own layout has them already."),
    "peft": _layout(2, 8, 1, None, 2, 8, 1, why=f"TP8 in a node, CP2 across two: 4096 tokens per rank; {_IN_NODE}."),
    "full": _layout(8, 8, 4, 8, 2, 8, 1, why=f"As for adapters, with PP4 for gradients and Adam's state; {_IN_NODE}."),
}
_LAYOUTS_8X22B = {
    "pretrain": _layout(16, 2, 4, 14, 2, 8, why=_NEMO),
    "pretrain@h200": _layout(16, 2, 4, 14, 1, 8, 1, why=f"141 GB need no context parallelism at 4k; {_IN_NODE}."),
    "pretrain@b200": _layout(16, 1, 4, 14, 1, 8, why="180 GB need no tensor or context parallelism at 4k."),
    "performance": _layout(16, 8, 4, 14, 2, 1, why=_NEMO_FAST),
    "peft": _layout(
        8, 8, 1, None, 1, 8, 1, why=f"NeMo's TP8 EP8 with the sequence parallelism its MoE layer needs; {_IN_NODE}."
    ),
    "full": _layout(
        8, 8, 4, 14, 1, 8, 1,
        why=f"NeMo's TP8 PP4 EP8, which needs 256 GPUs with expert TP 8 and 32 with 1; {_IN_NODE}.",
    ),
    "full@h200": _layout(4, 8, 4, 14, 1, 8, 1, why="The same layout, one copy: it fits 32 GPUs of 141 GB."),
}  # fmt: skip
_LAYOUTS_8X22B_16K = {
    "pretrain": _layout(16, 4, 4, 14, 4, 8, 1, why=f"TP4 x CP4 leaves 1024 tokens per rank, as at 4k; {_IN_NODE}."),
    "pretrain@h200": _layout(16, 2, 4, 14, 4, 8, 1, why=f"TP2 x CP4 fills a node: 2048 tokens per rank; {_IN_NODE}."),
    "pretrain@b200": _layout(16, 2, 4, 14, 2, 8, 1, why=f"180 GB hold 4096 tokens per rank; {_IN_NODE}."),
    "performance": _layout(16, 8, 4, 14, 2, 1, why=_NEMO_FAST),
    "peft": _layout(8, 8, 1, None, 2, 8, 1, why=f"TP8 in a node, CP2 across two: 1024 tokens per rank; {_IN_NODE}."),
    "full": _layout(
        16, 8, 4, 14, 2, 8, 1, why=f"As for adapters, with PP4 for gradients and Adam's state; {_IN_NODE}."
    ),
}
_LAYOUTS_8X22B_64K = {
    "pretrain": _layout(
        16, 2, 4, 14, 2, 8, recompute=True, why=f"{_NEMO} Its 16k tokens per rank fit 80 GB only when recomputed."
    ),
    "pretrain@h200": _layout(
        16, 4, 4, 14, 8, 8, 1, why=f"TP4 x CP8 leaves 2048 tokens per rank: no recomputation; {_IN_NODE}."
    ),
    "pretrain@b200": _layout(16, 4, 4, 14, 4, 8, 1, why=f"180 GB hold 4096 tokens per rank; {_IN_NODE}."),
    "performance": _layout(16, 8, 4, 14, 2, 1, recompute=True, why=f"{_NEMO_FAST} Recomputed, as without it."),
    "peft": _layout(8, 8, 1, None, 8, 8, 1, why=f"TP8 in a node, CP8 across eight: 1024 tokens per rank; {_IN_NODE}."),
    "full": _layout(
        16, 8, 4, 14, 4, 8, 1, recompute=True,
        why=f"TP8 x CP4 x PP4 fills 128 GPUs; 2048 tokens per rank, recomputed; {_IN_NODE}.",
    ),
}  # fmt: skip
_LAYOUTS_8X3B = {
    "pretrain": _layout(4, 1, 1, None, 1, 8, why="18 B parameters fit without a pipeline; EP8 inside a node."),
    "performance": _layout(4, 8, 1, None, 1, 1, why=_NEMO_FAST),
    "peft": _layout(1, 1, 1, None, 1, 8, why="One node, EP8, as for 8x7B."),
    "full": _layout(1, 1, 1, None, 1, 8, why="18 B parameters with Adam's state fit one node."),
}

_LAYOUTS_TINY = {
    "pretrain": _layout(1, 1, 1, None, 1, 2, gpus=2, why="Two processes, four experts each."),
    "peft": _layout(1, 1, 1, None, 1, 2, gpus=2, why="Two processes, four experts each."),
    "full": _layout(1, 1, 1, None, 1, 2, gpus=2, why="Two processes, four experts each."),
}

_8X7B = ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1")
_8X22B = ("mistralai/Mixtral-8x22B-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1")


def _entry(
    name: str,
    model: str,
    shape: ModelShape,
    seq_length: int,
    checkpoints: tuple[str | None, str | None],
    layouts: dict[str, Layout],
) -> RecipeEntry:
    """A large model's entry: fine-tuning at 2k tokens (NeMo's), or at the full length for the long variants."""
    finetune_seq_length = 2048 if seq_length == 4096 else seq_length
    # NeMo's 64k variants leave max_position_embeddings at 4096; here it follows the sequence length.
    shape = dataclasses.replace(shape, max_position_embeddings=seq_length)
    return RecipeEntry(name, model, shape, seq_length, finetune_seq_length, *checkpoints, layouts=layouts)


_ENTRIES = (
    _entry("mixtral_8x7b", "Mixtral 8x7B", MIXTRAL_8X7B, 4096, _8X7B, _LAYOUTS_8X7B),
    _entry("mixtral_8x7b_16k", "Mixtral 8x7B", MIXTRAL_8X7B, 16384, _8X7B, _LAYOUTS_8X7B_16K),
    _entry("mixtral_8x7b_64k", "Mixtral 8x7B", MIXTRAL_8X7B, 65536, _8X7B, _LAYOUTS_8X7B_64K),
    _entry("mixtral_8x22b", "Mixtral 8x22B", MIXTRAL_8X22B, 4096, _8X22B, _LAYOUTS_8X22B),
    _entry("mixtral_8x22b_16k", "Mixtral 8x22B", MIXTRAL_8X22B, 16384, _8X22B, _LAYOUTS_8X22B_16K),
    _entry("mixtral_8x22b_64k", "Mixtral 8x22B", MIXTRAL_8X22B, 65536, _8X22B, _LAYOUTS_8X22B_64K),
    _entry("mixtral_8x3b", "Mixtral 8x3B", MIXTRAL_8X3B, 4096, (None, None), _LAYOUTS_8X3B),
    RecipeEntry(
        name="mixtral_tiny",
        model="Mixtral tiny",
        shape=MIXTRAL_TINY,
        seq_length=256,
        finetune_seq_length=256,
        base="embedded://mixtral_tiny",
        instruct=None,
        layouts=_LAYOUTS_TINY,
        needs_gpu=False,
        precisions=("fp32", "bf16", "fp8"),
        # Found by trying (two cores, LoRA of dim 32 on all linear layers): docs/reference/recipes/mixtral_tiny.md.
        pretrain_steps=400,
        finetune_steps=120,
        pretrain_batch=32,
        finetune_batch=32,
        packed_batch=8,  # packs of 256 tokens, about two samples each
        micro_batch=16,
    ),
)

CATALOG: dict[str, RecipeEntry] = {entry.name: entry for entry in _ENTRIES}


def names() -> list[str]:
    """Every recipe's name, in the table's order."""
    return list(CATALOG)


def entry(name: str) -> RecipeEntry:
    """The entry of a recipe.

    Raises:
        RecipeError: no such recipe; names the closest.
    """
    if name not in CATALOG:
        refuse_call(name)
        raise RecipeError(f"unknown recipe {name!r}.{nearest(name, names())}")
    return CATALOG[name]


def refuse_call(name: str) -> None:
    """Refuse arguments where a recipe is only named.

    Raises:
        RecipeError: there are some, as ``nemo llm --factory`` takes them.
    """
    if "(" in name:
        raise RecipeError(
            f"recipe {name}: use {name.partition('(')[0]} alone, and pass its arguments as options (--num-nodes 2) "
            "and settings (trainer.max_steps=10)."
        )
