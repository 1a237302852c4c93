#!/usr/bin/env bash
# Install Transformer Engine, into this project's environment or beside it, on a machine with or without a GPU driver.
#
#   scripts/install_te.sh .venv       to train on this machine's GPUs
#   scripts/install_te.sh [VENV]      default: .venv-te, for the tests
#
# Any other VENV than the project's own is a second environment that sees the project's own (PYTHON, default
# .venv/bin/python) through a .pth file, so nothing is downloaded twice and the first environment stays without Transformer
# Engine. Its torch extension is built from source (about four minutes), and kept for the next environment with this torch.
# Needs: nvcc of the CUDA version torch was built for, a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv-te}
python=${PYTHON:-.venv/bin/python}

command -v nvcc >/dev/null || { echo "install_te.sh: nvcc is not on PATH; install the CUDA toolkit torch was built for." >&2; exit 2; }
"$python" -c 'import torch, mixtral_recipes' || { echo "install_te.sh: install the project into $python first." >&2; exit 2; }

[ -x "$venv/bin/python" ] || "$("$python" -c 'import sys; print(sys._base_executable)')" -m venv "$venv"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir also reads that folder's .pth files: the editable installation of the project is one.
[ "$own" = "$site" ] || echo "import site; site.addsitedir('$site')" > "$own/project.pth"
# Transformer Engine looks for cuDNN and its like in the environment's own folder only; pip shall not write through the link.
unlink_libraries() { [ ! -L "$own/nvidia" ] || rm "$own/nvidia"; }
link_libraries() { [ -e "$own/nvidia" ] || ln -s "$site/nvidia" "$own/nvidia"; }
unlink_libraries
[ ! -d "$own/transformer_engine" ] || link_libraries
# An extension fits the torch it was built with; where one of ours was installed from says which that was.
built_for=$("$python" -c 'import sys, torch; print("torch-%s-cp%d%d" % (torch.__version__.replace("+", "-"), *sys.version_info[:2]))')
from=$(cat "$own"/transformer_engine_torch-*.dist-info/direct_url.json 2>/dev/null) || true
if [[ $from == */transformer-engine/torch-* && $from != *"/$built_for/"* ]]; then
    echo "install_te.sh: Transformer Engine in $venv was built for another torch than $built_for; it is built again."
    "$venv/bin/pip" uninstall --quiet --yes transformer-engine-torch
elif "$venv/bin/python" -c 'import torch, transformer_engine.pytorch' 2>/dev/null; then
    echo "install_te.sh: Transformer Engine is already in $venv."
    exit 0
fi

unlink_libraries
# What the build imports; --no-build-isolation makes it build against the torch that is installed.
"$venv/bin/pip" install --quiet setuptools wheel packaging pybind11 ninja nvdlfw-inspect nvidia-cudnn-frontend

# Headers and libraries that torch's wheels bring (cublas, cudnn, nccl, ...) stand in the nvidia folders.
# nvcc itself says where it is: the one on PATH may be a link or a wrapper.
here=$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p' | head -1)
CUDA_HOME=${CUDA_HOME:-$(dirname "$here")}
includes=$("$python" -c 'import glob, sys; print(":".join(glob.glob(sys.argv[1] + "/nvidia/*/include")))' "$site")
export CUDA_HOME CPATH="$CUDA_HOME/include:$includes${CPATH:+:$CPATH}"
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1
bin=$(cd "$venv/bin" && pwd)
export MAX_JOBS=${MAX_JOBS:-2} PATH="$bin:$PATH"
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
kept=${XDG_CACHE_HOME:-${HOME:-$sources}/.cache}/mixtral-recipes/transformer-engine/$built_for
{ mkdir -p "$kept" && [ -w "$kept" ]; } 2>/dev/null || kept=$sources/transformer-engine/$built_for
newest() { [ ! -d "$kept" ] || find "$kept" -name 'transformer_engine_torch-*.whl' | sort -V | tail -n 1; }
if [ -z "$(newest)" ]; then
    # Each source file reads all of torch's headers, which takes longer than compiling it: they are compiled as one.
    "$venv/bin/pip" download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$sources" \
        "transformer-engine-torch>=2.8"
    tar -xzf "$sources"/*.tar.gz -C "$sources"
    extension=$(echo "$sources"/*/)
    (
        cd "$extension/csrc"
        find . -name '*.cpp' | while read -r file; do
            mv "$file" "$file.h"
            echo "#include \"$file.h\""
        done > "$sources/all.cpp"
        mv "$sources/all.cpp" .
    )
    "$venv/bin/pip" wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$kept" "$extension"
fi
torch=$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')
"$venv/bin/pip" install --no-build-isolation "transformer-engine[pytorch]>=2.8" "$(newest)" "torch==$torch"
link_libraries
"$venv/bin/python" -c 'import torch, transformer_engine.pytorch, transformer_engine; print("Transformer Engine", transformer_engine.__version__)'
