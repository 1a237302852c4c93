#!/usr/bin/env bash
# Prints the path of a Python 3.12 or 3.13 with venv: from PATH, from pyenv, or from uv. Fails with what to install.
set -u

if [ "$(uname -s)" != Linux ]; then
    echo "mixtral-recipes runs on Linux, since Megatron-Core needs Triton; this is $(uname -s). In a container it runs" >&2
    echo "here too: docker run --rm -it -v \"\$PWD\":/work -w /work python:3.12 make quickstart" >&2
    exit 1
fi

new_enough() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12) or sys.version_info >= (3, 14))' 2>/dev/null
}

for name in python3.12 python3.13 python3; do
    for found in $(type -aP "$name" 2>/dev/null); do
        if new_enough "$found"; then
            echo "$found"
            exit 0
        fi
    done
done
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3; do
    if [ -x "$found" ] && new_enough "$found"; then
        echo "$found"
        exit 0
    fi
done
if command -v uv >/dev/null 2>&1 && found=$(uv python find '>=3.12,<3.14' 2>/dev/null) && new_enough "$found"; then
    echo "$found"
    exit 0
fi
echo "mixtral-recipes needs Python 3.12 or 3.13 with venv, and none was found on PATH, in pyenv or in uv." >&2
echo "(nemo_run's libraries refuse 3.14.) Install one of: apt-get install python3.12-venv (Debian 13: python3.13-venv) |" >&2
echo "pyenv install 3.13 | uv python install 3.13" >&2
exit 1
