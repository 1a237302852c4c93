"""Run Python where there seem to be GPUs: ``.venv-te/bin/python -m tests.card [--cards N] -m pytest tests/gpu``.

With ``--idle`` nothing is computed: what a step of a large model asks of a card is seen (`benchmarks/gpu_traffic.py`).

The CPU computes torch's and Transformer Engine's kernels. What torch compiles would compute nothing on this card, so it
is left uncompiled; nor do Triton's own kernels, unless TRITON_INTERPRET=1 has them interpreted.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.card.build import build, environment


def main(words: list[str]) -> int:
    """Build the card, run, and take it away; the exit code is the command's."""
    idle, cards = words[:1] == ["--idle"], 1
    words = words[idle:]
    if words[:1] == ["--cards"]:
        cards, words = int(words[1]), words[2:]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        card = environment(Path(folder), cards, idle=idle)
        own = {"TORCH_COMPILE_DISABLE": str(int(not idle))} | dict(os.environ) | card
        return subprocess.run([sys.executable, *words], env=own, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
