"""Whether a tokenizer ends: its regular expressions and replacements are its author's, and can take any time and room.

Oniguruma, which runs the expressions, cannot be interrupted; so samples are encoded in a fork, whose time and memory
the system bounds.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import warnings
from typing import Any

from mixtral_recipes.errors import MixtralRecipesError

_SECONDS, _BYTES = 5, 1 << 30
_SAMPLES = ("The quick brown fox, jumping over 13 lazy dogs!\n ", "a", " ", "1", "a b", "\n", "é")
_LENGTHS = [1 << power for power in range(3, 12)]  # characters; from few on, so that what never ends ends early
_LONG = 100  # characters of a text that is put in; ▁ has one, and a byte's name six
_PANICKED = 3


def refuse_endless(backend: Any, source: str, error: type[MixtralRecipesError]) -> None:
    """Refuse a tokenizer that takes seconds, or a gibibyte, over a page of ordinary text.

    One without expressions, long replacements and padding cannot, and is not tried.

    Args:
        backend: A `tokenizers.Tokenizer`.
        source: What to call it.
        error: What to raise.

    Raises:
        MixtralRecipesError: it does, or it panics.
    """
    if not _may_grow(backend):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the fork touches nothing that another thread may hold
        child = os.fork()
    if child == 0:
        _encode_samples(backend)
    _, status = os.waitpid(child, 0)
    if status:
        panicked = os.WIFEXITED(status) and os.WEXITSTATUS(status) == _PANICKED
        what = "panics" if panicked else f"takes more than {_SECONDS} seconds or {_BYTES >> 30} GiB"
        raise error(
            f"{source}: its tokenizer {what} on ordinary text of at most {_LENGTHS[-1]} characters; fix its regular "
            "expressions, replacements and padding, or pass another with --tokenizer."
        )


def _may_grow(backend: Any) -> bool:
    if backend.padding is not None or backend.truncation is not None:
        return True
    for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder):
        with contextlib.suppress(Exception):  # a part in Python has no state, and is not from a file
            state = part.__getstate__() if part is not None else b""
            if b'"Regex"' in state or any(len(text) > _LONG for text in state.split(b'"')):
                return True
    return False


def _encode_samples(backend: Any) -> None:
    """In the fork: never returns."""
    code = 1
    try:
        faulthandler.disable()  # it would tell of an abort in a file of its own
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)  # where a panic would be told
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _BYTES, hard))
        for length in _LENGTHS:
            for sample in _SAMPLES:
                backend.decode(backend.encode((sample * length)[:length]).ids)
        code = 0
    except BaseException:
        code = _PANICKED
    finally:
        os._exit(code)
