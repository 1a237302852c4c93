"""Builds the card that is not there: libraries that take the place of CUDA's in a process started with `environment`.

They stand in front of the real ones by LD_PRELOAD. What this folder's C++ defines does something; every other function
that torch, Transformer Engine and Triton could ask CUDA's libraries for does nothing and says that all went well.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
_CUDA = re.compile(r"(__)?(cuda|cu[A-Z]|cublas|cudnn|nvrtc|nccl|nvml)\w+")
_TAKEN = ("libcudart.so.13", "libcudnn.so.9", "libcublas.so.13", "libcublasLt.so.13", "libnvrtc.so.13")


def build(folder: Path) -> None:
    """Compile into a folder, which takes about fifteen seconds, for the torch and Transformer Engine of this Python.

    Raises:
        RuntimeError: CUDA's headers are not here.
    """
    toolkit = toolkit_headers()
    if toolkit is None:
        raise RuntimeError("CUDA's headers are needed: nvcc is not on PATH")
    site_packages, transformer_engine = _place("torch").parent, _place("transformer_engine")
    nvidia = site_packages / "nvidia"
    headers = [f"-I{toolkit}", *(f"-I{nvidia / name / 'include'}" for name in ("cudnn", "nccl"))]
    headers += ["-idirafter", str(nvidia / "cu13/include")]
    objects = [folder / f"{source.stem}.o" for source in sorted(HERE.glob("*.cpp"))]
    for each in objects:
        _run("g++", "-std=c++20", "-O3", "-fPIC", "-w", *headers, "-c", HERE / f"{each.stem}.cpp", "-o", each)
    torch = sorted((site_packages / "torch/lib").glob("lib*.so"))
    users = [*torch, *transformer_engine.glob("wheel_lib/*transformer_engine*.so")]
    real = [*(nvidia / "cu13/lib" / name for name in _TAKEN), nvidia / "cudnn/lib/libcudnn.so.9"]
    asked = _names(users, "--dynamic", "--undefined-only")
    asked |= _names(filter(Path.exists, real), "--dynamic", "--defined-only")
    asked |= {match.group() for match in _CUDA.finditer((toolkit / "cuda.h").read_text())}  # what Triton compiles asks
    asked |= set(re.findall(r"nvml[A-Z]\w+", (site_packages / "torch/lib/libc10_cuda.so").read_text("latin-1")))
    rest = folder / "rest.c"
    names = sorted(asked - _names(objects, "--defined-only"))
    rest.write_text("".join(f"long {name}(void) {{ return {_answer(name)}; }}\n" for name in names))
    _library(folder / "libcuda.so.1", "-w", rest, *objects, "-lstdc++")
    for name in (*_TAKEN, "libnvidia-ml.so.1"):  # whoever opens one finds all of them in the first
        _library(folder / name, "-Wl,--no-as-needed", folder / "libcuda.so.1")


def toolkit_headers() -> Path | None:
    """CUDA's headers, as nvcc knows them: the one on PATH may be a link or a wrapper; None without it."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    here = re.search(r"_HERE_=(.+)", said.stderr)
    return Path(here.group(1)).parent / "include" if here else None


def environment(folder: Path, cards: int = 1, *, idle: bool = False) -> dict[str, str]:
    """What a process is started with that is to see cards.

    Args:
        folder: As `build` filled it; ranks that talk to each other leave files in it.
        cards: How many.
        idle: Whether they compute nothing.
    """
    links = folder / "links"
    links.mkdir(exist_ok=True)
    return {
        "LD_PRELOAD": " ".join(str(folder / name) for name in ("libcuda.so.1", *_TAKEN)),
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_CARDS": str(cards),
        "FAKE_CARD_IDLE": str(int(idle)),
        "FAKE_CARD_LINKS": str(links),
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(HERE.parents[1])]),
    }


def _place(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _answer(name: str) -> int:
    """All went well; of NVML, that it is not supported, but for its start and end."""
    return 3 if name.startswith("nvmlDevice") else 0


def _names(files: Iterable[Path], *options: str) -> set[str]:
    """The functions of CUDA's libraries among what files define or ask for."""
    listed = _run("nm", *options, *files)
    found = (line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.strip())
    return {name for name in found if _CUDA.fullmatch(name)}


def _library(path: Path, *words: str | Path) -> None:
    _run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, *words)


def _run(*words: str | Path) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout
