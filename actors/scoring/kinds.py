"""The table of reward source kinds. The rest of Ratchet knows a kind only through this table. Runs in the
driver and in each reward replica.

A kind's settings are a class in common/config/sources.py. CONTRIBUTING.md says how to add a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from actors.scoring.environment_source import EnvironmentSource
from actors.scoring.function_check import check_import, function_digest, try_function
from actors.scoring.function_source import FunctionSource
from actors.scoring.http_source import HttpSource
from actors.scoring.judge_source import JudgeSource, try_template
from actors.scoring.model_source import (
    RewardModelSource,
    check_reward_model,
    reward_model_digest,
    size_of_reward_model,
    try_reading,
)
from actors.scoring.reasoning_gym_source import ReasoningGymSource, check_package, rule_digest, try_rule
from actors.scoring.secrets import Secrets, secrets_of
from common.config.actors import SourcesConfig
from common.config.sources import (
    EnvironmentSourceConfig,
    FunctionSourceConfig,
    HttpSourceConfig,
    JudgeSourceConfig,
    ModelSourceConfig,
    ReasoningGymSourceConfig,
    RewardSource,
)
from common.model.size import ModelSize
from common.types import RawScore, RewardInput


class Source(Protocol):
    """One reward source in a reward replica."""

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The score of one answer. Any exception is a failure and voids the rollout. A UserCodeError also has the
        traceback of the user's code."""


@dataclass(frozen=True)
class SourceKind:
    """The functions of one kind. The first argument of each is a source's config; the defaults do nothing."""

    make: Callable[[Any, SourcesConfig, Secrets], Source]
    """Makes the source. Called in each reward replica."""
    secrets: Callable[[Any], Secrets] = lambda cfg: {}
    """Keys that the source needs, read from the driver's environment. Raises UserError if one is missing."""
    check: Callable[[Any, bool], None] = lambda cfg, chat: None
    """Before anything starts: raises UserError for a source that cannot be used. `chat`: prompts are chat messages."""
    model_size: Callable[[Any], ModelSize | None] = lambda cfg: None
    """Size of the model that each reward replica loads for it, if any."""
    try_once: Callable[[Any, SourcesConfig, RewardInput], str] = lambda cfg, service, answer: ""
    """Before anything starts: tries the first prompt with a made-up response. Raises UserError if the source would fail
    on every response. Returns a warning if it may have failed only on this one; "" if it did not fail."""
    check_travels: Callable[[Any, SourcesConfig], None] = lambda cfg, service: None
    """In `ratchet submit`: raises UserError for a source that needs something that is not sent with the job."""
    identity: Callable[[Any], str | None] = lambda cfg: None
    """In `ratchet train`: SHA-256 of the files or the version that decide its scores. The journal records it, and
    --resume compares it. None: this process cannot read them."""


KINDS: Mapping[type[RewardSource], SourceKind] = {
    FunctionSourceConfig: SourceKind(
        make=lambda cfg, service, secrets: FunctionSource(cfg, service),
        try_once=try_function,
        check_travels=check_import,
        identity=function_digest,
    ),
    ModelSourceConfig: SourceKind(
        make=lambda cfg, service, secrets: RewardModelSource(cfg, gpus=service.gpus),
        check=check_reward_model,
        model_size=size_of_reward_model,
        try_once=try_reading,
        identity=reward_model_digest,
    ),
    HttpSourceConfig: SourceKind(make=lambda cfg, service, secrets: HttpSource(cfg, secrets), secrets=secrets_of),
    JudgeSourceConfig: SourceKind(
        make=lambda cfg, service, secrets: JudgeSource(cfg, secrets), secrets=secrets_of, try_once=try_template
    ),
    ReasoningGymSourceConfig: SourceKind(
        make=lambda cfg, service, secrets: ReasoningGymSource(cfg, service),
        check=check_package,
        try_once=try_rule,
        identity=rule_digest,
    ),
    EnvironmentSourceConfig: SourceKind(make=lambda cfg, service, secrets: EnvironmentSource()),
}


def kind_of(source: RewardSource) -> SourceKind:
    """The kind of a source, found by the class of its config."""
    return KINDS[type(source)]


def read_secrets(sources: Iterable[RewardSource]) -> Secrets:
    """The keys of all these sources. Raises UserError if one is missing."""
    return {name: secret for source in sources for name, secret in kind_of(source).secrets(source).items()}
