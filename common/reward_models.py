"""Reward models: a language model with a scalar head, as transformers' sequence classification with one label saves it.

What else must be known to serve one stands in its config.json under `ratchet`: whether prompt and response go through
the chat template, and what the reference policy's own responses scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from common.config import UserError
from common.dialogues import padding_id
from common.files import write_json
from common.masking import length_mask
from common.models import ModelSize, load_tokenizer, model_size, replaced_directory, write_weights
from common.sequences import LANES

_KEY = "ratchet"


@dataclass(frozen=True)
class ScoreScale:
    """How a served reward model reads and reports: raw score = (head's output - mean) / deviation."""

    chat: bool | None = None  # None: through the chat template where there is one and the prompt is messages
    mean: float = 0.0  # of the reference policy's own responses
    deviation: float = 1.0


def is_reward_model(directory: Path) -> bool:
    """Whether its config says that it is a sequence classifier, not a language model."""
    return any("SequenceClassification" in name for name in _config(directory).architectures or ())


def load_reward_model(directory: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The sequence classifier in `directory`, in eval mode, its head in float32. A plain language model gets a head of
    zeros and a padding token. Raises UserError if the architecture has none."""
    check_trainable(directory)
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=dtype, attn_implementation="eager" if device.type == "cpu" else "sdpa"
    )
    if not is_reward_model(directory):
        nn.init.zeros_(model.score.weight)
        model.config.pad_token_id = scored_padding_id(directory)
    model.score.float()
    return model.to(device).eval()


def check_trainable(directory: Path) -> None:
    """Raises UserError unless the model is, or can become, a sequence classifier with one label and a linear head."""
    config = _config(directory)
    try:
        if is_reward_model(directory) and config.num_labels != 1:
            raise ValueError(f"it classifies into {config.num_labels} labels; a reward model has one")
        config.num_labels = 1
        with torch.device("meta"):
            head = getattr(AutoModelForSequenceClassification.from_config(config), "score", None)
        if not isinstance(head, nn.Linear):
            raise ValueError("its head is not one linear layer named `score`")
    except ValueError as error:
        raise UserError(f"model ({directory}) cannot be a reward model: {error}; name another model") from error


def reward_model_size(directory: Path) -> ModelSize:
    """Sizes from the config alone. Raises UserError if the directory holds no reward model that can be served."""
    if not is_reward_model(directory):
        raise UserError(
            f"model ({directory}) is no reward model: it must be a sequence classifier with one label, but is "
            f"{', '.join(_config(directory).architectures or ['of unknown architecture'])}; train one with "
            "ratchet train-reward"
        )
    check_trainable(directory)
    return model_size(directory)


def scored_padding_id(directory: Path) -> int | None:
    """The padding token before which a reward model that starts from `directory` reads its score."""
    if is_reward_model(directory):
        return _config(directory).pad_token_id
    return padding_id(load_tokenizer(directory))


def save_reward_model(
    model: PreTrainedModel,
    tokenizer_from: Path,
    target: Path,
    scale: ScoreScale,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the model in bf16, with its tokenizer, as a Hugging Face directory in place of `target`. Of a model whose
    weights are spread over ranks `tensors` are the whole ones."""
    tokenizer = load_tokenizer(tokenizer_from)
    tokenizer.pad_token_id = model.config.pad_token_id
    with replaced_directory(target) as staging:
        write_weights(model, model.state_dict() if tensors is None else tensors, staging)
        tokenizer.save_pretrained(staging)
        write_scale(staging, scale)


def write_scale(directory: Path, scale: ScoreScale) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, _KEY: asdict(scale)})


def read_scale(directory: Path) -> ScoreScale:
    """What `write_scale` wrote; the head's own output for a model from elsewhere."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return ScoreScale(**config.get(_KEY, {}))


def content_hash(directory: Path) -> str:
    """16 hex digits that change with any weight, setting or token of the model in `directory`."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            digest.update(path.name.encode() + b"\0")
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def head_scores(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The head over states [N, H]: float32 [N], also under autocast, where eight bits would be a coarse score."""
    with torch.autocast(states.device.type, enabled=False):
        return model.score(states.float()).squeeze(-1)


def sequence_scores(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Score of each row of right-padded input_ids [B, T], read at its last token: float32 [B].

    On CPU a row gets the same bits in any company if T is a multiple of LANES, as the number of head rows is here.
    """
    mask = length_mask(lengths, input_ids.shape[1]).long()
    hidden = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    states = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    fill = -len(lengths) % LANES
    return head_scores(model, nn.functional.pad(states, (0, 0, 0, fill)))[: len(lengths)]


def _config(directory: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"model ({directory}) has no config that transformers can read: {error}") from error
