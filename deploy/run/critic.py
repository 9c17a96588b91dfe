"""The settings of the critic, compared with the model and with the critic that a run starts from. Runs in the driver.

Its values are predictions of the returns of one model under one reward. In a run with others it would be wrong at every
token from the start, so differences are refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from actors.scoring.kinds import kind_of
from common.config.ppo import Config
from common.errors import UserError
from common.model.identity import model_digest, tokenizer_digest
from deploy.policy_files import PolicyFiles
from deploy.screen.console import complain
from learner.ppo.critic_files import SETTING, CriticBasis, CriticSource, read_critic
from learner.ppo.frozen import frozen_names

_SHOWN = 12  # hex digits of a digest in messages


def critic_basis(cfg: Config, policy: PolicyFiles) -> CriticBasis:
    """The model, the reward and the returns that a critic of this config belongs to."""
    return CriticBasis(
        kind=cfg.learner.critic,
        model=model_digest(policy.directory),
        tokenizer=tokenizer_digest(policy.directory),
        sources=tuple(CriticSource(s.name, s.weight, kind_of(s).identity(s)) for s in cfg.reward.sources),
        normalise=cfg.reward.normalise,
        clip=cfg.reward.clip,
        gamma=cfg.ppo.gamma,
        kl_coef=cfg.kl.coef,
        kl_estimator=cfg.kl.estimator,
    )


def check_critic(cfg: Config, policy: PolicyFiles, *, begun: bool = False) -> None:
    """Raises UserError if `learner.critic_frozen` freezes nothing, or if `learner.critic_path` has no trained critic,
    or that of another run. Only warns of another KL penalty: the run itself may change the coefficient, and the critic
    learns the difference.

    `begun`: the run has begun with a critic, and the journal has its digest. The user may have changed or accepted a
    part of the reward since, so the reward is not compared again.
    """
    if cfg.learner.critic_frozen and cfg.ppo.has_critic:
        frozen_names(policy.size.body, cfg.learner.critic_frozen)
    if cfg.learner.critic_path is None:
        return
    theirs, ours = read_critic(Path(cfg.learner.critic_path)).basis, critic_basis(cfg, policy)
    named = f"{SETTING} ({cfg.learner.critic_path})"
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


def _differences(theirs: CriticBasis, ours: CriticBasis, model: str) -> Iterator[str]:
    """One sentence for each difference with which its values would be wrong."""
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
