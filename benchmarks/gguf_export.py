"""A GGUF in F16 against ``cp`` and fsync of as many bytes, and memory, at the true widths of Mixtral with few layers.

    python benchmarks/gguf_export.py --layers 1 --repeats 3 --folder /big/disk
    python benchmarks/gguf_export.py --layers 2 --layers 8 --memory-only --folder /big/disk

Times are ratios within one run: each repeat copies and exports in turn, to outputs that did not exist, from inputs in
the page cache. They are of writing alone (``--no-check``); ``--types`` adds other types. Memory is the peak of the
process's anonymous pages (RssAnon), sampled from outside. With ``--memory-only`` the checkpoint's zeros are holes, so
that one copy of the model is on the disk at a time; what the process holds does not depend on the numbers it moves. The
vocabulary is the embedded tokenizer's.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import conversion
from temporary import temporary_folder

from mixtral_recipes import embedded

TINY = embedded.resolve("embedded://mixtral_tiny")
conversion.SHAPES |= {name: sizes | {"vocab_size": 1999} for name, sizes in conversion.SHAPES.items()}


def make_checkpoint(folder: Path, shape: str, layers: int, *, holes: bool) -> tuple[Path, int]:
    """An imported checkpoint with a tokenizer, and the bytes of its weights; the source is removed."""
    source, checkpoint = folder / "source", folder / "checkpoint"
    nbytes = conversion.write_source(source, shape, layers, holes=holes)
    for file in TINY.glob("*token*"):
        shutil.copyfile(file, source / file.name)
    conversion.convert("import", source, checkpoint)
    shutil.rmtree(source)
    if holes:
        for path in (checkpoint / "weights").glob("*.distcp"):
            subprocess.run(["fallocate", "--dig-holes", path], check=True)
    return checkpoint, nbytes


def export(checkpoint: Path, target: Path, kind: str, *, sampled: bool = False) -> dict[str, float]:
    """One export in a fresh process: its seconds (imports of Python modules apart), its peak memory."""
    return conversion.in_own_process(__file__, ["--export", str(checkpoint), str(target), kind], sampled=sampled)


def export_here(checkpoint: Path, target: Path, kind: str) -> None:
    """The body of the process `export` starts."""
    import gguf  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from mixtral_recipes.importers.gguf.export import export_gguf

    start = time.perf_counter()
    export_gguf(checkpoint, target, quantization=kind, no_check=True, progress=False)
    print(json.dumps({"seconds": time.perf_counter() - start}))


def measure(shape: str, layers: int, repeats: int, kinds: list[str], folder: Path) -> dict[str, Any]:
    """Times and memory at one size."""
    checkpoint, nbytes = make_checkpoint(folder, shape, layers, holes=False)
    target, copied = folder / "out" / "model.gguf", folder / "copied"
    times: dict[str, list[float]] = {"copy": [], **{kind: [] for kind in kinds}}

    def time_copy() -> None:
        conversion.set_cache(checkpoint, cached=True)
        times["copy"].append(conversion.copy(checkpoint / "weights", copied))
        shutil.rmtree(copied)

    def time_exports() -> None:
        for kind in kinds:
            conversion.set_cache(checkpoint, cached=True)
            target.parent.mkdir()
            times[kind].append(export(checkpoint, target, kind)["seconds"])
            shutil.rmtree(target.parent)

    for repeat in range(repeats):
        for timed in (time_copy, time_exports) if repeat % 2 else (time_exports, time_copy):
            timed()
        print(f"  {repeat}: " + "  ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()), flush=True)
    target.parent.mkdir()
    memory = export(checkpoint, target, "f16", sampled=True)["peak_anonymous_gib"]
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": shape,
        "layers": layers,
        "gigabytes": nbytes / 1e9,
        "seconds": median,
        "every_second": times,
        "ratio_to_copy": {kind: median[kind] / median["copy"] for kind in kinds},
        "peak_anonymous_gib": memory,
    }


def measure_memory(shape: str, layers: int, folder: Path) -> dict[str, Any]:
    """Memory at one size, with one copy of the model on the disk at a time."""
    checkpoint, nbytes = make_checkpoint(folder, shape, layers, holes=True)
    found = export(checkpoint, folder / "model.gguf", "f16", sampled=True)
    return {
        "shape": shape,
        "layers": layers,
        "gigabytes": nbytes / 1e9,
        "peak_anonymous_gib": found["peak_anonymous_gib"],
    }


def main() -> None:
    """Measure every size asked for; print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=conversion.SHAPES, action="append")
    parser.add_argument("--layers", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--types", nargs="*", default=["f16"], help="types to time; f16 by default")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--memory-only", action="store_true", help="no times; needs room for one copy of the model")
    parser.add_argument("--export", nargs=3, metavar=("CHECKPOINT", "TARGET", "TYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        checkpoint, target, kind = options.export
        export_here(Path(checkpoint), Path(target), kind)
        return
    results = []
    for shape in options.shape or ["8x7b"]:
        for layers in options.layers or [2, 8]:
            with temporary_folder(options.folder) as folder:
                print(f"{shape}, {layers} layers", flush=True)
                if options.memory_only:
                    results.append(measure_memory(shape, layers, folder))
                else:
                    results.append(measure(shape, layers, options.repeats, options.types, folder))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
