"""Every recipe in one static table: its model, its default parallel layouts and why. Pure Python: loads no torch.

Recipe modules take their layouts from here, and so do `recipes list`, completion and the documentation's tables; a
test checks the table against the code. The memory figures behind each layout are computed by `footprint`; run
``python -m mixtral_recipes.recipes.footprint`` to see them.
"""

import dataclasses
from dataclasses import dataclass, field

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.topology import ModelShape, Topology

TASKS = ("pretrain", "finetune")
PRECISIONS = ("bf16", "fp8")
PEFT_SCHEMES = ("lora", "dora", "none")

# GPU name -> (memory in GB, GPUs per node). NVIDIA data sheets; GB200: 4 GPUs per compute tray of an NVL72 rack.
HARDWARE = {"h100": (80, 8), "h200": (141, 8), "b200": (180, 8), "gb200": (186, 4)}


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
        base: Hub id fine-tuning starts from, or the embedded model.
        instruct: Hub id of the Instruct variant, if there is one.
        layouts: Task (``pretrain``, ``performance``, ``peft``, ``full``, ``full_packed``), optionally followed by
            ``@hardware`` where another GPU wants another layout -> its layout.
        needs_gpu: Whether it can only run on GPUs.
        precisions: Precision choices, the default first.
        about: One line.
    """

    name: str
    model: str
    shape: ModelShape
    seq_length: int
    finetune_seq_length: int
    base: str
    instruct: str | None
    layouts: dict[str, Layout] = field(hash=False)
    needs_gpu: bool = True
    precisions: tuple[str, ...] = PRECISIONS
    about: str = ""

    def layout(self, task: str, hardware: str = "h100") -> Layout:
        """The default layout of a task on a kind of GPU.

        Args:
            task: ``pretrain``, ``performance``, ``peft``, ``full`` or ``full_packed``.
            hardware: A key of `HARDWARE`.

        Raises:
            RecipeError: hardware that is not in the table.
        """
        if hardware not in HARDWARE:
            raise RecipeError(f"hardware={hardware!r} is not known.{nearest(hardware, list(HARDWARE))}")
        fallbacks = {"full_packed": ("full_packed", "full"), "performance": ("performance", "pretrain")}
        gpus = {"gb200": ("gb200", "b200", "h100"), "b200": ("b200", "h100")}.get(hardware, (hardware, "h100"))
        for gpu in gpus:
            for name in fallbacks.get(task, (task,)):
                found = self.layouts.get(name if gpu == "h100" else f"{name}@{gpu}")
                if found:
                    return _on_nodes_of(found, hardware)
        raise RecipeError(f"{self.name} has no layout for {task!r}.")


def _on_nodes_of(layout: Layout, hardware: str) -> Layout:
    """The same number of GPUs on nodes of another size (GB200 has four per node)."""
    per_node = HARDWARE[hardware][1]
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
    """Sequence parallelism goes with tensor parallelism: Megatron's MoE layer refuses one without the other."""
    topology = Topology(nodes * gpus, tp, pp, vpp, cp, ep, etp, sequence_parallel=tp > 1)
    return Layout(nodes, gpus, topology, recompute, why)


_NEMO = "NeMo 2.0's recipe."
_IN_NODE = "expert TP 1, so that the experts' all-to-all over EP 8 stays inside a node"

_SHAPE_8X7B = ModelShape(32, 4096, 32, 8, 14336, 8, 4096)
_SHAPE_8X22B = ModelShape(56, 6144, 48, 8, 16384, 8, 4096)
_SHAPE_8X3B = ModelShape(32, 2560, 32, 8, 8960, 8, 4096)
_SHAPE_TINY = ModelShape(4, 128, 8, 4, 256, 8, 512)


def _long(shape: ModelShape, positions: int) -> ModelShape:
    return dataclasses.replace(shape, max_position_embeddings=positions)


# Columns: nodes, TP, PP, VPP, CP, EP, expert TP. "GB" is memory per GPU as `footprint` counts it.
_LAYOUTS_8X7B = {
    "pretrain": _layout(8, 1, 4, 8, 1, 8, why=_NEMO),
    "pretrain@h200": _layout(8, 1, 1, None, 1, 8, why="NVIDIA's published 8x7B layout for large memory (TP1 EP8)."),
    "pretrain@b200": _layout(8, 1, 1, None, 1, 8, why="NeMo performance summary 25.02, 8x7B on B200 (TP1 EP8)."),
    "performance": _layout(8, 8, 4, 8, 1, 1, why="NeMo 2.0's performance mode: EP1, TP8, SP."),
    "peft": _layout(1, 1, 1, None, 1, 8, why="NeMo 2.0's recipe: one node, EP8."),
    "full": _layout(
        4, 1, 4, 8, 1, 8, why="NeMo's sizes (EP8 x PP4 = 32), on the 4 nodes they need; NeMo's 8 GPUs cannot start."
    ),
    "full_packed": _layout(
        4, 4, 1, None, 1, 8, 1,
        why=f"8 packs per step leave one microbatch per rank, so no pipeline; TP4 for memory; {_IN_NODE}.",
    ),
    "full@h200": _layout(2, 2, 1, None, 1, 8, 1, why=f"Fits 2 nodes of 141 GB without a pipeline; {_IN_NODE}."),
    "full@b200": _layout(1, 1, 1, None, 1, 8, why="Weights, gradients and Adam fit one node of 180 GB."),
}  # fmt: skip

_LAYOUTS_TINY = {
    "pretrain": _layout(1, 1, 1, None, 1, 2, gpus=2, why="Two processes, four experts each."),
    "peft": _layout(1, 1, 1, None, 1, 2, gpus=2, why="Two processes, four experts each."),
    "full": _layout(1, 1, 1, None, 1, 2, gpus=2, why="Two processes, four experts each."),
}

_ENTRIES = (
    RecipeEntry(
        name="mixtral_8x7b",
        model="Mixtral 8x7B",
        shape=_SHAPE_8X7B,
        seq_length=4096,
        finetune_seq_length=2048,
        base="mistralai/Mixtral-8x7B-v0.1",
        instruct="mistralai/Mixtral-8x7B-Instruct-v0.1",
        layouts=_LAYOUTS_8X7B,
        about="Mixtral 8x7B at 4k tokens",
    ),
    RecipeEntry(
        name="mixtral_tiny",
        model="Mixtral tiny",
        shape=_SHAPE_TINY,
        seq_length=256,
        finetune_seq_length=256,
        base="embedded://mixtral_tiny",
        instruct=None,
        layouts=_LAYOUTS_TINY,
        needs_gpu=False,
        precisions=("fp32", "bf16", "fp8"),
        about="A 4-layer Mixtral that trains on a laptop's CPU",
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
        raise RecipeError(f"recipe {name!r} is not known.{nearest(name, names())}")
    return CATALOG[name]
