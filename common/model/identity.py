"""The identity of a model: one digest of every file that decides what it computes.

Runs in the driver, and in every learner rank for a trained critic."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

# Weights, config, tokenizer, and code that trust_remote_code allows. A README may change.
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "chat_template")
# Keys of config.json and generation_config.json that only say who wrote the file.
_WRITER = ("transformers_version", "_name_or_path")


def model_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the model's files. Each file is read once in this process."""
    return _digest(path for path in directory.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the tokenizer's files."""
    return _digest(path for path in directory.iterdir() if path.name.startswith(_TOKENIZER) and path.is_file())


def _digest(files: Iterable[Path]) -> str:
    paths = sorted(files)
    # Hashing releases Python's lock, so several large files are read at once.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = list(threads.map(_file_digest, paths))
    whole = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        whole.update(f"{path.name}\0{digest}\n".encode())
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    state = os.stat(path)
    return _read(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


def _file_digest(path: Path) -> str:
    if path.name in ("config.json", "generation_config.json"):
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in settings.items() if key not in _WRITER}
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        except (ValueError, AttributeError, RecursionError):  # not the JSON object that it should be
            pass
    return file_digest(path)


@lru_cache(maxsize=4096)
def _read(path: Path, inode: int, size: int, changed_ns: int) -> str:
    """Cached by all arguments: those after the path change when the file does."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
