"""Import and export against ``cp`` and fsync of the same bytes, at the true widths of Mixtral with few layers.

    python benchmarks/conversion.py --shape 8x7b --layers 4 --repeats 5 --folder /big/disk

    python benchmarks/conversion.py --shape 8x7b --layers 2 --layers 8 --memory-only --folder /big/disk

Times are ratios within one run: each repeat copies, imports and exports in turn, to outputs that did not exist, from
inputs that are all in the page cache or, with ``--cold-input``, all out of it. Memory
is the peak of the process's anonymous pages (RssAnon), sampled from outside while a conversion runs by itself. With
``--memory-only`` the source is a file of holes and an import's zeros are made holes again, so that one copy of the
model is on the disk at a time; what the processes hold does not depend on the numbers they move.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from temporary import temporary_folder

from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.safetensors import INDEX, header_bytes, shard_name, split_shards
from mixtral_recipes.importers.mapping import canonical_shapes

SHAPES: dict[str, dict[str, int]] = {  # mistralai's config.json of each
    "8x7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 32000},
    "8x22b": {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "vocab_size": 32000},
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 2000},
}
_NOISE_BYTES = 64 << 20
SHARD_BYTES = 5 * 10**9


def write_source(folder: Path, shape: str, layers: int, *, holes: bool = False) -> int:
    """A synthetic bf16 checkpoint in the v4 layout, in shards of 5 GB, of noise or of holes; returns its bytes."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = canonical_shapes(hf_config.dims(config))
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    # Random bf16 in (-2, 2): sign, exponents below 128, any mantissa. Never NaN, and nothing a disk could compress.
    noise = np.random.default_rng(0).integers(0, 2**16, _NOISE_BYTES // 2, dtype=np.uint16) & 0xBFFF
    data = memoryview(noise.view(np.uint8))
    shards = split_shards(sizes, SHARD_BYTES)
    for index, names in enumerate(shards):
        with (folder / shard_name(index, len(shards))).open("wb") as file:
            file.write(header_bytes({name: ("BF16", shapes[name]) for name in names}))
            if holes:
                file.truncate(file.tell() + sum(sizes[name] for name in names))
                continue
            for name in names:
                left = sizes[name]
                while left:
                    count = min(left, len(data))
                    file.write(data[:count])
                    left -= count
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {name: shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(sizes.values())


def copy(source: Path, target: Path) -> float:
    """Seconds ``cp -r`` and an fsync of every file take."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def set_cache(folder: Path, *, cached: bool) -> None:
    """Bring a folder's files into the page cache, or make it forget them, once the disk has nothing left to write."""
    os.sync()  # deleting gigabytes is work for the disk too, and not the next measurement's
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while cached and file.read(_NOISE_BYTES):
                    pass
                if not cached:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(kind: str, source: Path, target: Path, *, sampled: bool = False) -> dict[str, float]:
    """Run one conversion in a fresh process: its seconds (imports of Python modules apart), its peak memory."""
    return in_own_process(__file__, ["--convert", kind, str(source), str(target)], sampled=sampled)


def in_own_process(script: str, arguments: list[str], *, sampled: bool) -> dict[str, float]:
    """Run a script, which prints JSON last; what it printed, and the peak of its anonymous memory if it is sampled."""
    command = [sys.executable, script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        try:
            while sampled and process.poll() is None:
                peak = max(peak, _anonymous(process.pid))
                time.sleep(0.005)
            output, _ = process.communicate()
        finally:
            process.kill()  # it writes where this process clears up
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return json.loads(output.splitlines()[-1]) | {"peak_anonymous_gib": peak / 2**30}


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def convert_here(kind: str, source: Path, target: Path) -> None:
    """The body of the process `convert` starts."""
    start = time.perf_counter()
    import torch.distributed.checkpoint  # noqa: F401

    from mixtral_recipes.checkpoints.format import reader, writer  # noqa: F401
    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
    from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint

    loaded = time.perf_counter()
    if kind == "import":
        import_checkpoint(str(source), target, progress=False)
    else:
        export_checkpoint(source, target, progress=False)
    print(json.dumps({"seconds": time.perf_counter() - loaded, "start_seconds": loaded - start}))


def measure(shape: str, layers: int, repeats: int, folder: Path, *, cached: bool) -> dict[str, Any]:
    """Times and memory at one size."""
    source, copied, imported, exported = (folder / name for name in ("source", "copied", "imported", "exported"))
    nbytes = write_source(source, shape, layers)
    times: dict[str, list[float]] = {"copy": [], "import": [], "export": []}
    memory = {}

    def time_copy() -> None:
        set_cache(source, cached=cached)
        times["copy"].append(copy(source, copied))
        shutil.rmtree(copied)

    def time_conversions() -> None:
        set_cache(source, cached=cached)
        times["import"].append(convert("import", source, imported)["seconds"])
        set_cache(imported, cached=cached)
        times["export"].append(convert("export", imported, exported)["seconds"])
        shutil.rmtree(exported)
        shutil.rmtree(imported)

    for repeat in range(repeats):
        # Neither side always comes first: a disk gives its first gigabytes after a rest faster.
        for timed in (time_copy, time_conversions) if repeat % 2 else (time_conversions, time_copy):
            timed()
        print(f"  {repeat}: " + "  ".join(f"{kind} {values[-1]:.2f} s" for kind, values in times.items()), flush=True)
    memory["import"] = convert("import", source, imported, sampled=True)["peak_anonymous_gib"]
    memory["export"] = convert("export", imported, exported, sampled=True)["peak_anonymous_gib"]
    for path in (source, imported, exported):
        shutil.rmtree(path)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "shape": shape,
        "layers": layers,
        "gigabytes": nbytes / 1e9,
        "input": "cached" if cached else "cold",
        "seconds": median,
        "every_second": times,
        "ratio_to_copy": {kind: median[kind] / median["copy"] for kind in ("import", "export")},
        "peak_anonymous_gib": memory,
    }


def measure_memory(shape: str, layers: int, folder: Path) -> dict[str, Any]:
    """Memory at one size, with one copy of the model on the disk at a time."""
    source, imported, exported = (folder / name for name in ("source", "imported", "exported"))
    nbytes = write_source(source, shape, layers, holes=True)
    memory = {"import": convert("import", source, imported, sampled=True)["peak_anonymous_gib"]}
    for path in (imported / "weights").glob("*.distcp"):
        subprocess.run(["fallocate", "--dig-holes", path], check=True)
    memory["export"] = convert("export", imported, exported, sampled=True)["peak_anonymous_gib"]
    return {"shape": shape, "layers": layers, "gigabytes": nbytes / 1e9, "peak_anonymous_gib": memory}


def main() -> None:
    """Measure every size asked for; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--layers", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--cold-input", action="store_true", help="evict every input from the page cache first")
    parser.add_argument("--memory-only", action="store_true", help="no times; needs room for one copy of the model")
    parser.add_argument("--convert", nargs=3, metavar=("KIND", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        kind, source, target = options.convert
        convert_here(kind, Path(source), Path(target))
        return
    results = []
    for shape in options.shape or ["8x7b", "8x22b"]:
        for layers in options.layers or [2, 4]:
            with temporary_folder(options.folder) as folder:
                print(f"{shape}, {layers} layers", flush=True)
                if options.memory_only:
                    results.append(measure_memory(shape, layers, folder))
                else:
                    results.append(measure(shape, layers, options.repeats, folder, cached=not options.cold_input))
    _print_table(results)
    print(json.dumps(results))


def _print_table(results: list[dict[str, Any]]) -> None:
    print("| shape | layers | GB | cp s | import s (ratio) | export s (ratio) | anonymous GiB, import / export |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        m = r["peak_anonymous_gib"]
        times = ["-", "-", "-"]
        if "seconds" in r:
            s, q = r["seconds"], r["ratio_to_copy"]
            times = [f"{s['copy']:.2f}", *(f"{s[kind]:.2f} ({q[kind]:.2f})" for kind in ("import", "export"))]
        cells = [r["shape"], r["layers"], f"{r['gigabytes']:.1f}", *times, f"{m['import']:.2f} / {m['export']:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
