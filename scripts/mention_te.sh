#!/usr/bin/env bash
# One line where this machine has a GPU and the project's environment has no Transformer Engine.
#
#   scripts/mention_te.sh PYTHON
set -euo pipefail
command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU || exit 0
"$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformer_engine") is None)' && exit 0
echo "This machine has a GPU and no Transformer Engine: plain layers will run on it, without FP8 and fused kernels. To add it: scripts/install_te.sh .venv"
