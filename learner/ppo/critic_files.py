"""A trained critic on disk: weights, and a record of their training. Runs in the driver and in every rank.

    value_head.safetensors   the value head, float32
    critic.json              the record: `TrainedCritic`, and the SHA-256 of every other file
    model.safetensors        the network of a separate critic, float32, with config.json and a tokenizer: `AutoModel` of
                             transformers loads it. A critic that shares the policy's trunk has none of these

`ratchet train-critic` writes such a directory, and `learner.critic_path` starts a run from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import UserError
from common.files import replaced_directory, write_json
from common.model.checks import check_finite, read_config, reading
from common.model.files import copy_code, load_packed, load_tokenizer
from common.model.identity import file_digest, model_digest
from common.model.rotary import use_own_lengths
from common.model.size import without_weights
from learner.ppo.scores import RunningMoments

LAYOUT = 3  # since 3, an environment's sources have its files and its class or tools
SETTING = "learner.critic_path"
HEAD = "value_head."  # prefix of the head's tensors, next to those of the network
_HEAD_FILE, _RECORD = "value_head.safetensors", "critic.json"
_SHOWN = 12  # hex digits of a digest in messages
_REMEDY = "restore the directory, or train the critic again with ratchet train-critic"

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


@dataclass(frozen=True)
class CriticSource:
    """A reward source that the critic's returns came from."""

    name: str
    weight: FiniteFloat
    digest: str | None  # SHA-256 of its files, if it has any
    settings: dict[str, Any]  # that decide its scores (common.config.sources: `scoring`)


@dataclass(frozen=True)
class CriticBasis:
    """The model, the reward and the returns that a critic belongs to."""

    kind: Literal["separate", "shared"]  # learner.critic
    model: str  # SHA-256 of the model that training started from (common.model.identity.model_digest)
    tokenizer: str  # SHA-256 of its tokenizer (common.model.identity.tokenizer_digest)
    sources: tuple[CriticSource, ...]
    normalise: str  # reward.normalise
    clip: FiniteFloat  # reward.clip
    gamma: FiniteFloat
    kl_coef: FiniteFloat
    kl_estimator: str
    responses: dict[str, Any]  # the settings of sampling and prompts that decide what responses look like, by key


@dataclass(frozen=True)
class TrainedCritic:
    """The record of a trained critic."""

    basis: CriticBasis
    score_moments: RunningMoments  # that normalised the scores; a run begins with them
    trained_on: list[dict[str, Any]]  # for each journal: directory, steps, last digest, rollouts
    passes: list[dict[str, Any]]  # for each pass over the data: the figures of the held-out prompts


def save_critic(target: Path, tensors: Mapping[str, Tensor], record: TrainedCritic, *, base: Path) -> None:
    """Writes `target`. A crash leaves the old directory or the new one.

    `tensors`: those of `PolicyWithCritic.critic_tensors`, which every rank has to gather; one rank calls this. `base`:
    the model that training started from, which gives a separate critic its config and tokenizer.
    """
    head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    with replaced_directory(target) as staging:
        save_file({name: tensor.float().contiguous() for name, tensor in head.items()}, staging / _HEAD_FILE)
        if body:
            network = without_weights(read_config(base)).base_model
            network.config.dtype = torch.float32
            weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in body.items()}
            network.save_pretrained(staging, state_dict=weights, save_original_format=False)
            load_tokenizer(base).save_pretrained(staging)
            copy_code(base, staging)
        files = {path.name: file_digest(path) for path in sorted(staging.iterdir()) if path.is_file()}
        write_json(staging / _RECORD, {"layout": LAYOUT, **asdict(record), "files": files})


def read_critic(directory: Path) -> TrainedCritic:
    """The record of the critic in `directory`. Reads every file once. Raises UserError if there is no such critic, or
    if a file is missing or has changed."""
    if not (directory / _RECORD).is_file():
        raise UserError(
            f"{SETTING} ({directory}) has no {_RECORD}; name a directory that ratchet train-critic has written"
        )
    with _reading(directory):
        tree = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        record = _record(tree)
        for name, digest in tree["files"].items():
            if not (directory / name).is_file():
                raise ValueError(f"its {name} is missing")
            if file_digest(directory / name) != digest:
                raise ValueError(f"its {name} is not the file that was written: its SHA-256 is another one")
        if _HEAD_FILE not in tree["files"]:
            raise ValueError(f"its {_RECORD} does not name {_HEAD_FILE}")
    return record


def check_same(directory: Path, digest: str) -> None:
    """Raises UserError if the critic in `directory` has another digest. Each rank checks this after it has loaded the
    critic, because another process may have replaced the files after the driver computed the digest."""
    with _reading(directory):
        found = model_digest(directory)
    if found != digest:
        raise UserError(
            f"{SETTING} ({directory}) has changed since the run began: its SHA-256 is {found[:_SHOWN]}, and was "
            f"{digest[:_SHOWN]}; restore it, or start a new run"
        )


def score_moments(directory: Path) -> RunningMoments:
    """The statistics of the scores with which a run begins. Raises UserError."""
    with _reading(directory):
        return _record(json.loads((directory / _RECORD).read_text(encoding="utf-8"))).score_moments


def _record(tree: Mapping[str, Any]) -> TrainedCritic:
    """Raises an error for anything that `save_critic` would not write."""
    if (layout := tree["layout"]) != LAYOUT:
        raise ValueError(f"its {_RECORD} has layout {layout}, and this version of Ratchet reads {LAYOUT}")
    record = TypeAdapter(TrainedCritic).validate_python(tree)
    if not isfinite(record.score_moments.mean + record.score_moments.squares):
        raise ValueError("the statistics of its scores are not finite")
    return record


def load_body(directory: Path, kind: type[AnyModel], *, dtype: torch.dtype, device: torch.device) -> AnyModel:
    """The network of a separate critic, in eval mode. `kind`: the class of the policy's own network. It passed its
    checks when the policy was loaded. Raises UserError."""
    with _reading(directory):
        model: AnyModel = load_packed(kind, directory, dtype=dtype)
        use_own_lengths(model)
        return model.to(device).eval()


@torch.no_grad()
def load_head(directory: Path, head: torch.nn.Linear) -> None:
    """Fills the value head. Raises UserError."""
    with _reading(directory), safe_open(directory / _HEAD_FILE, "pt") as file:
        for name, parameter in head.named_parameters():
            value = file.get_tensor(name)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"its value head has a {name} of shape {list(value.shape)}, the run's {list(parameter.shape)}"
                )
            parameter.copy_(value)
        check_finite(head)


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    with reading(directory, SETTING, "start a critic"):
        try:
            yield
        except ValidationError as error:
            [fault, *_] = error.errors()
            where = ".".join(str(part) for part in fault["loc"])
            raise ValueError(f"{where} in its {_RECORD} is wrong ({fault['msg']}); {_REMEDY}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its {_RECORD} is damaged ({type(error).__name__}: {error}); {_REMEDY}") from error
        except ValueError as error:
            raise error if ";" in str(error) else ValueError(f"{error}; {_REMEDY}") from error
