"""Compares the critic's settings with the model, and with the trained critic that a run starts from. Runs in the
driver.

A critic predicts the returns of one model under one reward. With another model or reward it would be wrong at every
token from the start, so differences are refused before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from actors.scoring.kinds import kind_of
from common.config.environment import KINDS, EnvironmentConfig
from common.config.ppo import Config
from common.config.sources import EnvironmentSourceConfig, RewardSource
from common.errors import UserError
from common.model.identity import model_digest, tokenizer_digest
from deploy.policy_files import PolicyFiles
from deploy.run.identity import code_digest
from deploy.screen.console import complain
from learner.ppo.critic_files import SETTING, CriticBasis, CriticSource, TrainedCritic, read_critic
from learner.ppo.frozen import frozen_names

_SHOWN = 12  # hex digits of a digest in messages
_SHOWN_TEXT = 80  # characters of a setting in messages


def critic_basis(cfg: Config, policy: PolicyFiles) -> CriticBasis:
    """The model, the reward and the returns that a critic of this config belongs to."""
    digests = {f"reward.sources.{n}": kind_of(source).identity(source) for n, source in enumerate(cfg.reward.sources)}
    if cfg.environment is not None:
        digests["environment"] = code_digest(cfg.environment.code)
    return CriticBasis(
        kind=cfg.learner.critic,
        model=model_digest(policy.directory),
        tokenizer=tokenizer_digest(policy.directory),
        sources=critic_sources(cfg.reward.sources, cfg.environment, digests),
        normalise=cfg.reward.normalise,
        clip=cfg.reward.clip,
        gamma=cfg.ppo.gamma,
        kl_coef=cfg.kl.coef,
        kl_estimator=cfg.kl.estimator,
        responses=response_settings(cfg.model_dump(mode="json")),
    )


def critic_sources(
    sources: Sequence[RewardSource], environment: EnvironmentConfig | None, digests: Mapping[str, str | None]
) -> tuple[CriticSource, ...]:
    """The reward sources of a config. `digests`: of their files and of the environment's, by the names of an identity
    (deploy/run/identity.py)."""
    found = []
    for number, source in enumerate(sources):
        name, settings = f"reward.sources.{number}", source.scoring
        if isinstance(source, EnvironmentSourceConfig) and environment is not None:  # it decides these scores
            name, settings = "environment", {**settings, **_class_or_tools(environment)}
        found.append(CriticSource(source.name, source.weight, digests.get(name), settings))
    return tuple(found)


def _class_or_tools(environment: EnvironmentConfig) -> dict[str, Any]:
    """The setting that names the environment's class, agent, taskset or tools."""
    return {key: value for key, value in environment.fixed.items() if key in KINDS and value}


def environment_of(config: Mapping[str, Any]) -> EnvironmentConfig | None:
    """The environment in a whole config as JSON has it."""
    tree = config.get("environment")
    return None if tree is None else EnvironmentConfig.model_validate(tree)


def response_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what responses look like, by key. `config`: a whole config as JSON has it."""
    prompts = {f"prompts.{key}": config["prompts"].get(key) for key in ("format", "last_assistant", "last_end_token")}
    episodes: dict[str, Any] = {"environment": None}
    if (environment := environment_of(config)) is not None:
        episodes["environment"] = environment.name
        episodes |= {f"environment.{key}": value for key, value in environment.fixed.items() if key not in KINDS}
    return {f"sampling.{key}": value for key, value in config["sampling"].items()} | prompts | episodes


def response_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One clause for each setting of the responses that differs."""
    keys = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    return [f"{key} was {theirs[key]} and is {ours[key]} now" for key in keys]


def check_critic(cfg: Config, policy: PolicyFiles, *, begun: bool = False) -> TrainedCritic | None:
    """Raises UserError if `learner.critic_frozen` freezes nothing, or if `learner.critic_path` has no trained critic or
    one that does not fit. Only warns of another KL penalty or other responses: the critic learns the difference.
    Returns the critic, if there is one.

    `begun`: the run has begun with a critic, and the journal has its digest. The user may have changed or accepted a
    part of the reward since, so the reward is not compared again.
    """
    if cfg.learner.critic_frozen and cfg.ppo.has_critic:
        frozen_names(policy.size.body, cfg.learner.critic_frozen)
    if cfg.critic_path is None:
        return None
    critic = read_critic(Path(cfg.critic_path))
    theirs, ours = critic.basis, critic_basis(cfg, policy)
    named = f"{SETTING} ({cfg.critic_path})"
    faults = [] if begun else list(_differences(theirs, ours, cfg.model.path))
    if theirs.kind != ours.kind:
        faults.insert(0, f"it is a {theirs.kind} critic, and learner.critic is {ours.kind}")
    if faults:
        raise UserError(
            f"{named} does not fit this run: {'; '.join(faults)}. Train a critic with this config (ratchet "
            "train-critic), name another one, or leave it out"
        )
    before, now = ((basis.kl_coef, basis.kl_estimator) for basis in (theirs, ours))
    if not begun and before != now:
        complain(
            f"warning: {named} was trained with kl.coef {before[0]:g} and kl.estimator {before[1]}, and the run has "
            f"{now[0]:g} and {now[1]}: its values are off by the difference until it has learned it"
        )
    if not begun and (different := response_differences(theirs.responses, ours.responses)):
        complain(f"warning: {named} learned from other responses than the run's: {', '.join(different)}")
    return critic


def warn_of_seen_responses(cfg: Config, critic: TrainedCritic, prompts: str) -> None:
    """Warns if the critic learned from the first step of a run with this seed and these prompts (`prompts`: their
    digest). The first responses of such runs are the same, and their scores would count twice in the moments."""
    same = {"seed": cfg.seed, "prompts": prompts, "learns": True, "first": 0}
    if seen := [part["run"] for part in critic.trained_on if all(part.get(key) == same[key] for key in same)]:
        complain(
            f"warning: {SETTING} ({cfg.critic_path}) learned from {', '.join(seen)}, with this run's seed "
            f"({cfg.seed}) and prompts: the first responses may be ones that it has seen; choose another seed"
        )


def _differences(theirs: CriticBasis, ours: CriticBasis, model: str) -> Iterator[str]:
    """One sentence for each difference that would make the critic's values wrong."""
    if theirs.tokenizer != ours.tokenizer:
        yield f"it was trained with another tokenizer than that of model.path ({model})"
    elif theirs.model != ours.model:
        shown = f"SHA-256 {theirs.model[:_SHOWN]}, the run's {ours.model[:_SHOWN]}"
        yield f"it was trained from another model than model.path ({model}; {shown})"
    yield from source_differences(theirs.sources, ours.sources, was="it was trained", now="the run has")
    for setting, before, now in (
        ("reward.normalise", theirs.normalise, ours.normalise),
        ("reward.clip", theirs.clip, ours.clip),
        ("ppo.gamma", theirs.gamma, ours.gamma),
    ):
        if before != now:
            yield f"it was trained with {setting} {before}, and the run has {now}"


def source_differences(
    theirs: Iterable[CriticSource], ours: Iterable[CriticSource], *, was: str, now: str
) -> Iterator[str]:
    """One sentence for each difference between the reward sources. `was` and `now` say whose they are."""
    before, after = ({source.name: source for source in sources} for sources in (theirs, ours))
    if before.keys() != after.keys():
        yield f"{was} with the reward sources {', '.join(before)}, and {now} {', '.join(after)}"
        return
    for name, source in after.items():
        if before[name].weight != source.weight:
            weights = f"{before[name].weight:g}, and {now} {source.weight:g}"
            yield f"{was} with the reward source {name} at weight {weights}"
        if before[name].digest != source.digest:
            yield f"{was} with other files behind the reward source {name}"
        for key in sorted(before[name].settings.keys() | source.settings.keys()):
            old, new = before[name].settings.get(key), source.settings.get(key)
            if old != new:
                yield f"{was} with {key} {_short(old)} in the reward source {name}, and {now} {_short(new)}"


def _short(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), _SHOWN_TEXT, placeholder="...")
