"""Checks the files of a model and describes a fault in one sentence.

Runs anywhere. The driver calls it before Ray starts, and so does every process that loads a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from common.errors import UserError
from common.model.remote_code import trusted

TABLE = "docs/models.md lists what is supported"
_LARGEST_READ = 2 << 30  # most bytes of weights that the driver checks; a process that loads a model always checks


@contextmanager
def reading(directory: Path, setting: str, purpose: str) -> Iterator[None]:
    """Turns every error in the block into a UserError about the model that `setting` names, because transformers raises
    errors of many types for a config or model that it cannot read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        if "trust_remote_code" in reason:
            reason = (
                "it needs Python code from its own directory (auto_map); set model.trust_remote_code = true if you "
                "trust that code, or use a version of the model that transformers knows"
            )
        reason = " ".join(reason.split("\n\n")[0].split())  # drops transformers' advice for programmers
        table = "" if ";" in reason else f"; {TABLE}"  # a semicolon precedes a remedy
        raise UserError(f"{setting} ({directory}){_kind(directory)} cannot {purpose}: {reason}{table}") from error


def _kind(directory: Path) -> str:
    try:
        return f", a {json.loads((directory / 'config.json').read_text(encoding='utf-8'))['model_type']} model,"
    except Exception:  # the caller's message names the fault
        return ""


def read_config(directory: Path) -> PretrainedConfig:
    """The model's config. Raises ValueError for a quantised model, and transformers' errors for an unreadable one."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted(directory))
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise ValueError(
            f"its weights are quantised ({method or 'quantization_config'}) and cannot be trained; name the original "
            "model in bfloat16, or load it with transformers, dequantise it and save it"
        )
    return config


def check_generated(config: PretrainedConfig) -> None:
    """Raises ValueError if the inference engine cannot serve a model of this type."""
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            "its type also reads images, and the generators cannot start vLLM with such a type; save its text part as "
            "a separate model (gemma3_text for gemma3) and name that"
        )


def check_weights(
    directory: Path, kind: Any, *, new: tuple[str, ...] = (), dropped: tuple[str, ...] = (), **settings: Any
) -> PretrainedConfig:
    """Runs `check_loaded` on the names and shapes in the files of `directory`, for the transformers class `kind`. Reads
    no weight. Returns the config."""
    config = read_config(directory)
    with _quiet():
        _, found = kind.from_pretrained(
            directory,
            device_map="meta",
            output_loading_info=True,
            trust_remote_code=trusted(directory),
            **settings,
        )
    check_loaded(found, new=new, dropped=dropped)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars and reports of transformers: `check_loaded` reports the same faults."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# Buffers that old versions of transformers saved. Models compute them.
_COMPUTED = ("inv_freq", ".attn.bias", ".masked_bias", "position_ids")


def check_loaded(found: Mapping[str, Any], *, new: tuple[str, ...] = (), dropped: tuple[str, ...] = ()) -> None:
    """Raises ValueError if weights are missing (transformers would fill them with random numbers) or surplus.

    found: the report of transformers' loading. new, dropped: prefixes of names that may be missing or surplus.
    """
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(new or ("\0",)))
    if missing:
        raise ValueError(f"{_names(missing)} not in its files; complete the download, or save the model again")
    wrong = sorted(str(key[0]) for key in found.get("mismatched_keys") or ())
    if wrong:
        raise ValueError(f"{_names(wrong)} stored in its files with shapes that differ from those of its config.json")
    left = sorted(
        name
        for name in found["unexpected_keys"]
        if not name.endswith(_COMPUTED) and not name.startswith(dropped or ("\0",))
    )
    if left:
        raise ValueError(
            f"its files have weights that its config.json has no place for ({', '.join(left[:3])}"
            f"{' and more' if len(left) > 3 else ''}); the config.json is another model's, or describes part of it"
        )


def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError if a weight has NaN or infinity."""
    for name, parameter in model.named_parameters():
        _check_finite(name, parameter.detach())


def check_finite_files(directory: Path) -> None:
    """`check_finite` for the safetensors files in `directory`. Does nothing if they are too large to be read twice."""
    files = sorted(directory.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > _LARGEST_READ:
        return
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                _check_finite(name, tensors.get_tensor(name))


def _check_finite(name: str, tensor: Tensor) -> None:
    # A sum takes a third of the time of isfinite on every element, and is finite only if all elements are.
    if not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float32).isfinite()):
        return
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"its weight {name} has numbers that are not finite; the files are damaged or its training diverged: "
            "take another checkpoint"
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, ids: Iterable[int] = ()) -> None:
    """Raises ValueError if the embedding of `rows` rows lacks BOS, the end token, or one of `ids`."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *ids):
        if token is not None and token >= rows:
            raise ValueError(
                f"its tokenizer uses the token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but its embedding "
                f"has {rows} rows; resize it with resize_token_embeddings and save the model again"
            )


def _names(names: list[str]) -> str:
    first = ", ".join(names[:3])
    return f"{len(names)} weights ({first}, ...) are" if len(names) > 3 else f"{first} {'are' if names[1:] else 'is'}"
