"""What is prepared once: folders named by the hash of everything they were made from, written under a lock."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_recipes.system.files import replacing_folder, sha256, write_text
from mixtral_recipes.system.home import data_home
from mixtral_recipes.system.locks import held

_SAMPLED_ABOVE = 1 << 30
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 20


def prepared(kind: str, made_from: Any, build: Callable[[Path], None]) -> Path:
    """The folder that holds something expensive, building it in the first process that asks.

    Args:
        kind: A folder name under `data_home`.
        made_from: JSON-like description of all that the content depends on.
        build: Fills an empty folder; what it leaves when it fails is removed.

    Returns:
        A folder that is complete. It carries ``made_from.json``.
    """
    text = json.dumps(made_from, sort_keys=True, default=str)
    folder = data_home() / kind / hashlib.sha256(text.encode()).hexdigest()[:20]
    if folder.is_dir():
        return folder
    with held(folder):
        if not folder.is_dir():
            with replacing_folder(folder) as staging:
                build(staging)
                (staging / "made_from.json").write_text(text)
    return folder


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered for as long as its size and time of change stay the same."""
    return remembered("hashes", path, sha256)


def remembered(kind: str, path: Path, look: Callable[[Path], str]) -> str:
    """What reading a whole file told, for as long as its size and time of change stay the same.

    Args:
        kind: A folder name under `data_home`.
        path: The file.
        look: Reads it, in the first process that asks.
    """
    stat = path.stat()
    identity = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    memo = data_home() / kind / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if memo.is_file():
        return memo.read_text()
    with held(memo):
        if not memo.is_file():
            write_text(memo, look(path))
    return memo.read_text()


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and content; of a large one, of stretches spread over it and of its ends.

    For what may take terabytes and is only read in part: a corpus's tokens.
    """
    size = path.stat().st_size
    if size <= _SAMPLED_ABOVE:
        return content_hash(path)
    digest = hashlib.sha256(str(size).encode())
    for number in range(_SAMPLES):
        start = number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
        digest.update(sha256(path, start, _SAMPLE_BYTES).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """A tokenizer's whole definition, special tokens and chat template, for keys of caches.

    Stricter than `tokenizers.tokenizer_identity`, which is recorded and compared: what is only written otherwise gets
    other keys.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What earlier calls padded and cut to stays in the backend, and is no part of the definition.
        definition = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    elif hasattr(tokenizer, "fingerprint"):
        definition = tokenizer.fingerprint()
    else:
        definition = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, definition, special]).encode()).hexdigest()
