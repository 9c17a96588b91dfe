"""The metric that compares trials, and the keys that would change its meaning. Runs in the driver."""

from __future__ import annotations

from typing import Any

from common.config.ppo import Config
from common.errors import UserError

PASS, SCORE = "pass_at_1", "score"
# Keys and sections that must be the same in all trials, with the reason. One value for all trials may be given.
_FIXED = {
    "seed": "trials have the same seed, and finalists are repeated with others (--seeds)",
    "num_steps": "trials are compared after equal numbers of steps",
    "evaluation": "trials are compared by the same evaluation",
    "sampling": "held-out responses are sampled with it, and trials are compared by the same evaluation",
    "prompts": "trials are compared on the same held-out prompts, in the same form",
    "environment": "held-out episodes are played in it",
    "model": "trials start from the same model",
    "ray": "it decides where trials run",
    "logging": "it changes no result",
    "monitoring": "it changes no result",
    "checkpoint": "it changes no result",
    "credit": "it changes no result",
    "critic_training": "ratchet train does not use it",
}
# Exceptions, which affect only training.
_FREE = ("prompts.train", "prompts.rollouts_per_prompt", "prompts.reasoning_gym.train_prompts")
_REWARD, _SOURCES = "reward", "reward.sources"


def metric_of(record: dict[str, Any], metric: str) -> float | None:
    """The value of a metric in the record of an evaluation; None if it has none. Sources and judges are looked up
    under `components`, so a source may have the same name as a field of the record."""
    value = record.get(metric) if metric in (PASS, SCORE) else record.get("components", {}).get(metric)
    return None if value is None else float(value)


def checked_metric(metric: str | None, cfg: Config) -> str:
    """The default is pass@1 if the config says what passes, else the mean score."""
    if metric is None:
        return SCORE if cfg.evaluation.pass_source is None else PASS
    if metric == PASS and cfg.evaluation.pass_source is None:
        raise UserError("--metric pass_at_1 needs evaluation.pass_source: the source or judge whose scores decide it")
    known = [PASS, SCORE, *(source.name for source in (*cfg.reward.sources, *cfg.evaluation.judges))]
    if metric not in known:
        raise UserError(f"--metric ({metric}) must be one of {', '.join(known)}")
    return metric


def check_key(key: str, metric: str, cfg: Config) -> None:
    """Raises UserError if trials that differ in this key cannot be compared by the metric."""
    for section, reason in _FIXED.items():
        if _is_in(key, section) and key not in _FREE:
            raise UserError(f"{key} cannot differ between trials: {reason}; give one value, or leave it out")
    if _is_in(key, _REWARD) and metric == SCORE:
        raise UserError(
            f"{key} changes what a score means, so trials cannot be compared by their score; compare them by a judge "
            "or a source (--metric NAME)"
        )
    name = cfg.evaluation.pass_source if metric == PASS else metric
    if _decides_source(key, name, cfg):
        raise UserError(
            f"{key} may change the source {name}, by which trials are compared (--metric {metric}); compare them by a "
            "judge or another source, or give one value"
        )


def _is_in(key: str, section: str) -> bool:
    """True if the key is the section, or in it."""
    return f"{key}.".startswith(f"{section}.")


def _decides_source(key: str, name: str | None, cfg: Config) -> bool:
    """True if the key changes the raw score of the reward source with this name. Its weight does not."""
    for number, source in enumerate(cfg.reward.sources):
        if source.name == name:
            index, _, setting = key.removeprefix(f"{_SOURCES}.").partition(".")
            return key in (_REWARD, _SOURCES) or (index.isdecimal() and int(index) == number and setting != "weight")
    return False
