"""Packing speed, bins and balance, beside TRL's packing, plain first-fit and textbook best-fit-decreasing.

    python benchmarks/packing.py                        # a hundred thousand, one and ten million lengths
    python benchmarks/packing.py --sizes 1000000 --capacity 4096 --json out.json

Columns: seconds; bins; bins over the volume bound (tokens / capacity); bins over textbook best-fit-decreasing (up to a
million lengths); seconds of TRL's ``pack_dataset`` over ours on the same table, tokens moved into packs by both; plain
first-fit's bins over ours; and the cost of waiting: eight data-parallel ranks take neighbouring packs, and each
microbatch lasts as long as its costliest pack (sum of squared lengths), over the mean, in our order and in a shuffled
one.
"""

import argparse
import bisect
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.packing import Balanced, Packs, pack

RANKS = 8
STEP = 64
_TRL_UP_TO = 1_000_000
_FIRST_FIT_UP_TO = 100_000


def lognormal(draw: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Instruction data: median an eighth of the pack, a long tail."""
    return np.clip(draw.lognormal(np.log(capacity / 8), 0.8, count), 1, capacity).astype(np.int64)


def uniform(draw: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Every length alike."""
    return draw.integers(1, capacity + 1, count)


def heavy_tailed(draw: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Pareto with index 1.1: a few samples hold most tokens."""
    return np.clip((draw.pareto(1.1, count) + 1) * capacity / 50, 1, capacity).astype(np.int64)


def squad_like(draw: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """SQuAD in NeMo's prompt: about 170 tokens, 60 around that, none below 40."""
    return np.clip(draw.normal(170, 60, count), 40, capacity).astype(np.int64)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "lognormal": lognormal,
    "uniform": uniform,
    "heavy-tailed": heavy_tailed,
    "squad-like": squad_like,
}


def best_of(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest processor time of several runs (other processes do not count), and the result."""
    times, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return min(times), result


def textbook_bins(lengths: np.ndarray, capacity: int) -> int:
    """Best-fit-decreasing one sample at a time, on a sorted list of the rooms that occur."""
    rooms: list[int] = []
    counts = [0] * (capacity + 1)
    bins = 0
    for length in np.sort(lengths)[::-1].tolist():
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bins += 1
            left = capacity - length
        else:
            room = rooms[at]
            counts[room] -= 1
            if not counts[room]:
                rooms.pop(at)
            left = room - length
        if not counts[left]:
            bisect.insort(rooms, left)
        counts[left] += 1
    return bins


def first_fit_bins(lengths: np.ndarray, capacity: int) -> int:
    """Plain first-fit in the samples' order, on a tree of the most room in each half."""
    leaves = 1 << (len(lengths) - 1).bit_length()
    tree = [capacity] * (2 * leaves)
    used = 0
    for length in lengths.tolist():
        node = 1
        while node < leaves:
            node *= 2
            if tree[node] < length:
                node += 1
        used = max(used, node - leaves + 1)
        tree[node] -= length
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return used


def table_of(lengths: np.ndarray) -> Any:
    """An Arrow table with one list column, one byte per token."""
    import pyarrow as pa

    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = pa.array(np.zeros(int(offsets[-1]), np.int8))
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), values)})


def pack_table(table: Any, capacity: int) -> Any:
    """Pack a table as TRL does: lengths from the column, tokens moved into packs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(0).combine_chunks()
    packs = pack(pc.call_function("list_value_length", [column]).to_numpy(), capacity)
    moved = column.take(pa.array(packs.samples))
    return pa.ListArray.from_arrays(pc.take(moved.offsets, pa.array(packs.starts)), moved.values)


def trl_pack(table: Any, capacity: int) -> Any:
    """TRL's best-fit-decreasing on the same table."""
    from trl.data_utils import _pack_bfd  # pyright: ignore[reportMissingImports]

    return _pack_bfd(table, capacity)


def waiting(packs: Packs, lengths: np.ndarray) -> tuple[float, float]:
    """Time of all microbatches over the mean rank's, in the balanced and in a shuffled order."""
    costs = packs.sums(np.square(lengths.astype(np.float64)))
    steps = len(costs) // STEP * STEP
    if not steps:
        return float("nan"), float("nan")
    orders = (Balanced(costs, STEP, seed=0)(0)[:steps], np.random.default_rng(0).permutation(len(costs))[:steps])
    rows = [costs[order].reshape(-1, RANKS) for order in orders]
    balanced, shuffled = (float(row.max(1).sum() * RANKS / row.sum()) for row in rows)
    return balanced, shuffled


def measure(name: str, count: int, capacity: int, repeats: int, *, trl: bool) -> dict[str, Any]:
    """One row."""
    lengths = DISTRIBUTIONS[name](np.random.default_rng(0), count, capacity)
    seconds, packs = best_of(lambda: pack(lengths, capacity), repeats)
    row: dict[str, Any] = {
        "lengths": name,
        "count": count,
        "capacity": capacity,
        "seconds": seconds,
        "bins": len(packs),
        "over_bound": len(packs) / (lengths.sum() / capacity),
    }
    row["waiting_balanced"], row["waiting_shuffled"] = waiting(packs, lengths)
    if count <= 1_000_000:
        row["over_textbook"] = len(packs) / textbook_bins(lengths, capacity)
    if count <= _FIRST_FIT_UP_TO:
        row["first_fit_over_ours"] = first_fit_bins(lengths, capacity) / len(packs)
    if trl and count <= _TRL_UP_TO and lengths.sum() < 1 << 31:
        table = table_of(lengths)
        ours, moved = best_of(lambda: pack_table(table, capacity), 1)
        theirs, packed = best_of(lambda: trl_pack(table, capacity), 1)
        row |= {"trl_over_ours": theirs / ours, "trl_bins_over_ours": len(packed) / len(moved)}
    return row


def main() -> None:
    """Print a table, and write the rows as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--capacity", type=int, nargs="+", default=[2048, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    trl = importlib.util.find_spec("trl") is not None
    columns = ("seconds", "bins", "over_bound", "over_textbook", "trl_over_ours", "trl_bins_over_ours",
               "first_fit_over_ours", "waiting_balanced", "waiting_shuffled")  # fmt: skip
    print(f"{'lengths':<13}{'count':>11}{'capacity':>9}" + "".join(f"{column[:14]:>15}" for column in columns))
    rows = []
    for count in options.sizes:
        for capacity in options.capacity:
            for name in DISTRIBUTIONS:
                row = measure(name, count, capacity, options.repeats, trl=trl)
                rows.append(row)
                cells = "".join(f"{_cell(row.get(column)):>15}" for column in columns)
                print(f"{name:<13}{count:>11,}{capacity:>9}{cells}", flush=True)
    for count in options.sizes:
        times = [row["seconds"] for row in rows if row["count"] == count]
        print(
            f"{count:,} lengths: median {statistics.median(times):.3f} s, slowest {max(times):.3f} s (processor time)"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    main()
