"""The advantage estimators that the variance account compares, on one batch. Runs in every rank of the account."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.config.ppo import PPOConfig

LAMBDAS = (0.0, 0.5, 0.9, 0.95, 1.0)
GROUP, NONE = "group", "none"


def with_critic(lam: float | str) -> str:
    """The name of GAE with this lambda."""
    return "critic, lam by length" if lam == "length" else f"critic, lam {lam:g}"


UNBIASED = with_critic(1.0)  # without bias for every critic


@dataclass(frozen=True)
class Estimator:
    """One estimator of the comparison."""

    name: str
    ppo: PPOConfig  # the settings of the run with this estimator in place of its own
    is_runs_own: bool


def estimators_of(ppo: PPOConfig, groups: Tensor) -> tuple[list[Estimator], dict[str, str]]:
    """The estimators that this batch allows, and why it does not allow the others, by name. groups [B]: equal for
    responses to one prompt; empty responses are left out. The run's own lambda is added if LAMBDAS lacks it."""
    own = {"gae": with_critic(ppo.lam), "group": GROUP, "returns": NONE}[ppo.advantages]
    found, left_out = [], {}

    def add(name: str, **settings: object) -> None:
        found.append(Estimator(name, ppo.model_copy(update={"value_lam": None, **settings}), name == own))

    if ppo.has_critic:
        for lam in LAMBDAS if ppo.lam in LAMBDAS else (*LAMBDAS, ppo.lam):
            add(with_critic(lam), lam=lam)
    else:
        left_out["critic"] = f'the run has no critic (ppo.advantages = "{ppo.advantages}")'
    if int(groups.unique(return_counts=True)[1].max()) > 1:
        add(GROUP, advantages="group")
    else:
        left_out[GROUP] = "the journal has one response to each prompt (prompts.rollouts_per_prompt)"
    add(NONE, advantages="returns")
    return found, left_out
