"""What is wrong with the files of a model, said in one sentence.

Runs in the driver before Ray starts, and wherever a model is loaded.
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
_LARGEST_READ = 2 << 30  # bytes of weights that the driver reads; the process that loads a model reads them all


@contextmanager
def reading(directory: Path, setting: str, purpose: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a UserError about the model that `setting` names: transformers raises any
    kind of error over a config or a model that it does not understand."""
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
        reason = " ".join(reason.split("\n\n")[0].split())  # transformers' advice for programmers follows
        table = "" if ";" in reason else f"; {TABLE}"  # behind the semicolon stands what to do
        raise UserError(f"{setting} ({directory}){_kind(directory)} cannot {purpose}: {reason}{table}") from error


def _kind(directory: Path) -> str:
    try:
        return f", a {json.loads((directory / 'config.json').read_text(encoding='utf-8'))['model_type']} model,"
    except Exception:  # the message that this is for says what is wrong
        return ""


def read_config(directory: Path) -> PretrainedConfig:
    """Raises ValueError for a quantised model, and whatever transformers raises over a config it cannot read."""
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
    """Raises ValueError if the engine cannot serve such a model."""
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            "its type also reads images, and the generators cannot start vLLM with such a type; save its text part as "
            "a model of its own (gemma3_text for gemma3) and name that"
        )


def check_weights(
    directory: Path, kind: Any, *, new: tuple[str, ...] = (), dropped: tuple[str, ...] = (), **settings: Any
) -> PretrainedConfig:
    """Compares names and shapes in the files of `directory` with those that the class `kind` of transformers wants, as
    `check_loaded` does. No weight is read. Returns the config."""
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
    """Without progress bars and reports of transformers: what they say, `check_loaded` says."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# Buffers that old versions of transformers saved, and that models compute for themselves.
_COMPUTED = ("inv_freq", ".attn.bias", ".masked_bias", "position_ids")


def check_loaded(found: Mapping[str, Any], *, new: tuple[str, ...] = (), dropped: tuple[str, ...] = ()) -> None:
    """Raises ValueError if weights are missing, which would be filled with random numbers, or left over: `found` is
    what transformers' loading reports. `new` and `dropped` begin the names of those that may be."""
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(new or ("\0",)))
    if missing:
        raise ValueError(f"{_names(missing)} not in its files; complete the download, or save the model again")
    wrong = sorted(str(key[0]) for key in found.get("mismatched_keys") or ())
    if wrong:
        raise ValueError(f"{_names(wrong)} of other shapes in its files than its config.json says")
    left = sorted(
        name
        for name in found["unexpected_keys"]
        if not name.endswith(_COMPUTED) and not name.startswith(dropped or ("\0",))
    )
    if left:
        raise ValueError(
            f"its files hold weights that its config.json has no place for ({', '.join(left[:3])}"
            f"{' and more' if len(left) > 3 else ''}); the config.json is another model's, or describes part of it"
        )


def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError if a weight holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        _check_finite(name, parameter.detach())


def check_finite_files(directory: Path) -> None:
    """The same of the safetensors files in `directory`, if they are small enough to be read twice."""
    files = sorted(directory.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > _LARGEST_READ:
        return
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                _check_finite(name, tensors.get_tensor(name))


def _check_finite(name: str, tensor: Tensor) -> None:
    # A sum takes a third of the time, and is finite only if all of it is.
    if not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float32).isfinite()):
        return
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"its weight {name} holds numbers that are not finite; the files are damaged or its training diverged: "
            "take another checkpoint"
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, ids: Iterable[int] = ()) -> None:
    """Raises ValueError if a token that begins or ends texts, or one of `ids`, is beyond the embedding's `rows`."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *ids):
        if token is not None and token >= rows:
            raise ValueError(
                f"its tokenizer uses the token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but its embedding "
                f"has {rows} rows; resize it with resize_token_embeddings and save the model again"
            )


def _names(names: list[str]) -> str:
    first = ", ".join(names[:3])
    return f"{len(names)} weights ({first}, ...) are" if len(names) > 3 else f"{first} {'are' if names[1:] else 'is'}"
