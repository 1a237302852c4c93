"""GPUs and how fast they are: data sheets, and what is really reached of them.

Sources of the data sheets: NVIDIA's product pages (A100, H100 SXM, H200 SXM, HGX B200, GB200 NVL72, L40S, GeForce RTX
4090 and 5090), dense figures. Memory is what CUDA shows of the nominal size.
"""

from dataclasses import dataclass

from mixtral_recipes.errors import RecipeError, nearest


@dataclass(frozen=True)
class Card:
    """One kind of processor, its links, and how much of both a training step reaches.

    Attributes:
        name: Key in `CARDS`.
        title: What people call it.
        memory_gb: Usable memory, 10^9 bytes.
        bf16_tflops: Dense peak, 10^12 operations per second.
        fp8_tflops: Dense peak in FP8; None where there is none.
        memory_tbps: Memory bandwidth, 10^12 bytes per second.
        link_gbps: To the other GPUs of a node, 10^9 bytes per second and direction.
        network_gbps: To other nodes, for each GPU, likewise.
        per_node: GPUs of a node.
        linked: GPUs that reach each other over the node's links: those of a node, or of a rack that NVLink spans.
        product_share: Of the peak, what large bf16 products reach for minutes.
        fp8_share: Of the FP8 peak, likewise, with what scaling costs.
        attention_share: Of what attention's kernels reach on Hopper, as a share of the peak.
        multiprocessors: Each computes a tile of a product's result.
        mxfp8: Whether it multiplies FP8 with a scale for each 32 numbers.
        launch_us: Time of the host for one kernel, 10^-6 s.
    """

    name: str
    title: str
    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_tbps: float
    link_gbps: float
    network_gbps: float
    per_node: int
    linked: int = 8
    product_share: float = 0.74
    fp8_share: float = 0.54
    attention_share: float = 1.0
    multiprocessors: int = 132
    mxfp8: bool = False
    launch_us: float = 7.0


_GIB = 1.073741824

# Blackwell's exponentials are as many as Hopper's, for over twice the products: attention reaches less of the peak.
# Fitted on NeMo's rows of B200, as its share in FP8.
_BLACKWELL = {"fp8_share": 0.48, "attention_share": 0.75, "multiprocessors": 148, "mxfp8": True}
_AMPERE = {"product_share": 0.66, "multiprocessors": 108}
_L40S = {"product_share": 0.60, "multiprocessors": 142}
_ADA = {"product_share": 0.85, "multiprocessors": 128}
_RTX5090 = {"product_share": 0.85, "multiprocessors": 170, "mxfp8": True}
_CPU = {"product_share": 0.7, "multiprocessors": 0, "launch_us": 10.0}

CARDS = {
    card.name: card
    for card in (
        Card("h100", "H100 SXM 80 GB", 79.2 * _GIB, 989, 1979, 3.35, 450, 50, 8),
        Card("h200", "H200 SXM 141 GB", 139.8 * _GIB, 989, 1979, 4.8, 450, 50, 8),
        Card("b200", "B200 180 GB", 178.3 * _GIB, 2250, 4500, 8.0, 900, 50, 8, **_BLACKWELL),
        Card("gb200", "GB200 186 GB", 184.0 * _GIB, 2500, 5000, 8.0, 900, 50, 4, linked=72, **_BLACKWELL),
        Card("a100", "A100 SXM 80 GB", 79.2 * _GIB, 312, None, 2.0, 300, 25, 8, **_AMPERE),
        Card("a100-40", "A100 SXM 40 GB", 39.4 * _GIB, 312, None, 1.55, 300, 25, 8, **_AMPERE),
        Card("l40s", "L40S 48 GB", 44.4 * _GIB, 362, 733, 0.864, 32, 12.5, 8, **_L40S),
        Card("rtx4090", "GeForce RTX 4090 24 GB", 23.5 * _GIB, 165, 330, 1.01, 25, 3, 8, **_ADA),
        Card("rtx5090", "GeForce RTX 5090 32 GB", 31.4 * _GIB, 210, 419, 1.79, 50, 3, 8, **_RTX5090),
        Card("cpu", "CPU", 16.0, 0.1, None, 0.02, 2, 0.5, 1, linked=1, **_CPU),
    )
}


def card(name: str) -> Card:
    """A card by its name.

    Raises:
        RecipeError: no such card; names the closest.
    """
    if name.lower() not in CARDS:
        raise RecipeError(f"hardware={name!r} is not a known GPU.{nearest(name, list(CARDS))}")
    return CARDS[name.lower()]


def named(title: str | None) -> str | None:
    """The card that a driver calls so (``NVIDIA H100 80GB HBM3``), or None."""
    words = (title or "").lower().replace("geforce", "").replace("-", " ")
    if "a100" in words and "40gb" in words.replace(" ", ""):
        return "a100-40"
    for name in ("gb200", "b200", "h200", "h100", "a100", "l40s"):
        if name in words:
            return name
    for number in ("4090", "5090"):
        if number in words:
            return f"rtx{number}"
    return None
