"""What is prepared once: folders named by the hash of everything they were made from, written under a lock."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_recipes.system.files import replacing_folder, sha256, write_text
from mixtral_recipes.system.home import data_home
from mixtral_recipes.system.locks import held


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
    stat = path.stat()
    identity = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    memo = data_home() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if memo.is_file():
        return memo.read_text()
    with held(memo):
        if not memo.is_file():
            write_text(memo, sha256(path))
    return memo.read_text()


def tokenizer_hash(tokenizer: Any) -> str:
    """What identifies a tokenizer: its whole definition, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = backend.to_str()
    elif hasattr(tokenizer, "fingerprint"):
        definition = tokenizer.fingerprint()
    else:
        definition = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, definition, special]).encode()).hexdigest()
