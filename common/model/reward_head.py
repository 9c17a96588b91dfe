"""Reward models on disk: a language model with a scalar head, as transformers' sequence classification saves it.

Runs anywhere. The key `ratchet` of config.json says how to serve the model: whether text goes through the chat
template, and the scale of its scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from common.data.dialogues import padding_id
from common.errors import UserError
from common.files import replaced_directory, write_json
from common.model.checks import check_finite, check_finite_files, check_loaded, check_weights, read_config, reading
from common.model.files import load_tokenizer, write_weights
from common.model.remote_code import trusted
from common.model.reward_scores import check_rows_independent
from common.model.rotary import use_own_lengths
from common.model.size import ModelSize, model_size

_KEY = "ratchet"
_PURPOSE = "be a reward model"


@dataclass(frozen=True)
class ScoreScale:
    """The settings for serving a reward model. A raw score is (the head's output - mean) / deviation."""

    chat: bool | None = None  # None: use the chat template if there is one and the prompt has messages
    mean: float = 0.0  # of the head's output on responses of the reference policy
    deviation: float = 1.0

    @classmethod
    def of(cls, found: object) -> ScoreScale:
        """The scale in a config.json. Raises ValueError for a value that `write_scale` would not write."""
        if not isinstance(found, dict) or not found.keys() <= {"chat", "mean", "deviation"}:
            raise ValueError(f"`{_KEY}` in its config.json must have chat, mean and deviation, but is {found!r}")
        scale = cls(**found)
        numbers = all(type(x) in (int, float) and isfinite(x) for x in (scale.mean, scale.deviation))
        if scale.chat not in (None, True, False) or not numbers or scale.deviation <= 0:
            raise ValueError(
                f"`{_KEY}` in its config.json must have chat true, false or null, a finite mean and a deviation above "
                f"0, but is {found!r}"
            )
        return scale


def is_reward_model(directory: Path) -> bool:
    """True if the config in `directory` names a sequence classifier instead of a language model."""
    with reading(directory, "model", _PURPOSE):
        return any("SequenceClassification" in name for name in read_config(directory).architectures or ())


def load_reward_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    install: Callable[[PreTrainedModel], object] | None = None,
) -> PreTrainedModel:
    """The sequence classifier in `directory`, in eval mode, with a float32 head. A language model gets a head of zeros
    and a padding token. `install` replaces modules of the model by ones that keep less memory. Raises UserError if the
    architecture has no such head, or if a score differs from that of the model's own code for the sequence alone."""
    check_trainable(directory)
    trained = is_reward_model(directory)
    with reading(directory, "model", _PURPOSE):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=1,
            dtype=dtype,
            attn_implementation="eager" if device.type == "cpu" else "sdpa",
            output_loading_info=True,
            trust_remote_code=trusted(directory),
        )
        check_loaded(found, **({} if trained else _NEW_HEAD))
        if not trained:
            nn.init.zeros_(model.score.weight)
            model.config.pad_token_id = scored_padding_id(directory)
        check_finite(model)
        model.score.float()
        model = model.to(device).eval()
        use_own_lengths(model)
        check_rows_independent(model, install)
    return model


# A language model that becomes a reward model gets a new head and loses its output embedding.
_NEW_HEAD = {"new": ("score.",), "dropped": ("lm_head.", "model.lm_head.", "embed_out.")}


def check_trainable(directory: Path) -> None:
    """Raises UserError unless the model is, or can become, a sequence classifier with one label and a linear head."""
    with reading(directory, "model", _PURPOSE):
        trained, config = is_reward_model(directory), read_config(directory)
        if trained and config.num_labels != 1:
            raise ValueError(f"it classifies into {config.num_labels} labels; a reward model has one")
        config.num_labels = 1
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trusted(directory))
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise ValueError("its head is not one linear layer named `score`")


def check_reward_files(directory: Path, setting: str = "model.path") -> None:
    """Raises UserError for models that `load_reward_model` would refuse, as far as the files show it."""
    check_trainable(directory)
    trained = is_reward_model(directory)
    with reading(directory, setting, _PURPOSE):
        check_weights(directory, AutoModelForSequenceClassification, num_labels=1, **({} if trained else _NEW_HEAD))
        check_finite_files(directory)


def reward_model_size(directory: Path, setting: str = "model") -> ModelSize:
    """Sizes from the config alone. Raises UserError if the directory has no reward model that can be served."""
    if not is_reward_model(directory):
        kinds = ", ".join(read_config(directory).architectures or ["of unknown architecture"])
        raise UserError(
            f"{setting} ({directory}) is not a reward model: it must be a sequence classifier with one label, but is "
            f"{kinds}; train one with ratchet train-reward"
        )
    check_reward_files(directory, setting)
    read_scale(directory)
    return model_size(directory, setting)


def scored_padding_id(directory: Path) -> int | None:
    """The padding token of a reward model that starts from `directory`: the score is read at the token before it."""
    if is_reward_model(directory):
        return read_config(directory).pad_token_id
    return padding_id(load_tokenizer(directory))


def save_reward_model(
    model: PreTrainedModel,
    tokenizer_from: Path,
    target: Path,
    scale: ScoreScale,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes `target` as a Hugging Face directory: the model in bf16, its tokenizer and its scale. If the weights are
    sharded over ranks, `tensors` are the gathered weights."""
    tokenizer = load_tokenizer(tokenizer_from)
    tokenizer.pad_token_id = model.config.pad_token_id
    with replaced_directory(target) as staging:
        write_weights(model, model.state_dict() if tensors is None else tensors, staging)
        tokenizer.save_pretrained(staging)
        write_scale(staging, scale)


def write_scale(directory: Path, scale: ScoreScale) -> None:
    """Writes the scale into the config.json of a reward model."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, _KEY: asdict(scale)})


def read_scale(directory: Path) -> ScoreScale:
    """The scale that `write_scale` wrote. For a model from elsewhere, the scale that leaves its scores unchanged."""
    with reading(directory, "model", _PURPOSE):
        return ScoreScale.of(json.loads((directory / "config.json").read_text(encoding="utf-8")).get(_KEY, {}))


def content_hash(directory: Path) -> str:
    """16 hex digits that change if any weight, setting or token of the model in `directory` changes."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            digest.update(path.name.encode() + b"\0")
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
