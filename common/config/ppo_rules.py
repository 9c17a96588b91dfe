"""The rules across fields of `Config` (common/config/ppo.py). Runs anywhere.

Each message says rule, values and remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.config.actors import broken_sampling_rules
from common.config.sources import broken_environment_source_rules, broken_reasoning_gym_rules, broken_source_rules
from common.config.training import broken_trainer_rules

if TYPE_CHECKING:  # ppo.py imports this file
    from common.config.ppo import Config


def broken_rules(cfg: Config) -> Iterator[str]:
    """One message for each broken rule."""
    yield from _broken_batch_rules(cfg)
    yield from broken_sampling_rules(cfg.sampling)
    yield from _broken_schedule_rules(cfg)
    yield from _broken_critic_rules(cfg)
    yield from _broken_kl_rules(cfg)
    yield from _broken_length_and_staleness_rules(cfg)
    if cfg.generators.sleep and not cfg.may_sleep:
        yield _sleep_rule(cfg)
    rows = cfg.rollouts_per_step // cfg.ppo.minibatches
    yield from broken_trainer_rules(cfg.learner, rows, "rollouts_per_step / ppo.minibatches")
    yield from broken_source_rules("reward.sources", cfg.reward.sources, others=cfg.evaluation.judges)
    yield from broken_reasoning_gym_rules(
        [*cfg.reward.sources, *cfg.evaluation.judges],
        {"prompts.train": cfg.prompts.train, "prompts.heldout": cfg.prompts.heldout},
        key="reward.isolation",
        isolation=cfg.reward.isolation,
    )
    yield from _broken_environment_rules(cfg)
    yield from _broken_evaluation_rules(cfg)


def _broken_batch_rules(cfg: Config) -> Iterator[str]:
    batch = cfg.rollouts_per_step
    for key, parts in (
        ("ppo.minibatches", cfg.ppo.minibatches),
        ("prompts.rollouts_per_prompt", cfg.prompts.rollouts_per_prompt),
    ):
        if batch % parts:
            nearest = ", ".join(str(n) for n in (batch // parts * parts, batch // parts * parts + parts) if n)
            yield f"rollouts_per_step ({batch}) must be a multiple of {key} ({parts}); nearest: {nearest}"
    if cfg.ppo.advantages == "group" and cfg.prompts.rollouts_per_prompt < 2:
        yield (
            f"prompts.rollouts_per_prompt ({cfg.prompts.rollouts_per_prompt}) must be at least 2 with "
            'ppo.advantages = "group", which compares the responses to one prompt; raise it, or use "gae" or "returns"'
        )


def _broken_schedule_rules(cfg: Config) -> Iterator[str]:
    if cfg.optimizer.warmup_steps > cfg.num_steps:
        yield (
            f"optimizer.warmup_steps ({cfg.optimizer.warmup_steps}) must not exceed num_steps ({cfg.num_steps}); "
            "lower the first or raise the second"
        )


def _broken_critic_rules(cfg: Config) -> Iterator[str]:
    """Checks nothing without a critic: its settings are then ignored. So setting `ppo.advantages = "returns"` is enough
    to compare a run with one without a critic."""
    if not cfg.ppo.has_critic:
        return
    yield from _broken_frozen_rules(cfg)
    yield from _broken_lambda_rules(cfg)
    if cfg.learner.critic_warmup_steps >= cfg.num_steps:
        yield (
            f"learner.critic_warmup_steps ({cfg.learner.critic_warmup_steps}) must be below num_steps "
            f"({cfg.num_steps}), or the policy is never trained; lower the first or raise the second"
        )
    passes = {
        "ppo.value_epochs": cfg.ppo.value_epochs,
        "learner.critic_warmup_steps": cfg.learner.critic_warmup_steps,
    }
    for key, count in passes.items():
        if count and not cfg.ppo.value_coef:
            yield (
                f"ppo.value_coef (0) must be above 0 with {key} ({count}), whose loss it multiplies; raise the first, "
                "or set the second to 0"
            )


def _broken_frozen_rules(cfg: Config) -> Iterator[str]:
    if not cfg.learner.critic_frozen:
        return
    if cfg.learner.critic == "shared":
        yield (
            f"learner.critic_frozen ({cfg.learner.critic_frozen}) needs a network of the critic's own: set "
            'learner.critic = "separate" (it is "shared"), or leave it out'
        )
    if cfg.learner.lora is not None:
        yield (
            f"learner.critic_frozen ({cfg.learner.critic_frozen}) must be left out with learner.lora, which freezes "
            "all weights and trains adapters; learner.lora.targets chooses their layers"
        )


def _broken_kl_rules(cfg: Config) -> Iterator[str]:
    if cfg.kl.controller == "adaptive" and cfg.kl.coef == 0:
        yield (
            'kl.coef (0) must be above 0 with kl.controller = "adaptive", which multiplies it: it would stay 0; '
            'raise it, or set kl.controller = "fixed"'
        )
    if cfg.kl.controller == "adaptive" and cfg.kl.horizon < cfg.rollouts_per_step:
        yield (
            f"kl.horizon ({cfg.kl.horizon}) must be at least rollouts_per_step ({cfg.rollouts_per_step}), or the "
            "controller overshoots; raise it"
        )


def _broken_lambda_rules(cfg: Config) -> Iterator[str]:
    alpha, longest = cfg.ppo.lam_alpha, cfg.max_response_tokens
    for key in ("lam", "value_lam"):
        if getattr(cfg.ppo, key) == "length" and alpha * longest <= 1:
            yield (
                f"ppo.lam_alpha ({alpha:g}) x {cfg.max_response_setting} ({longest}) must be above 1 with "
                f'ppo.{key} = "length", or every lambda is 0; raise the first (above {1 / longest:.2g}), or set '
                f"ppo.{key} to a number"
            )


def _broken_length_and_staleness_rules(cfg: Config) -> Iterator[str]:
    if cfg.reference.max_batch_tokens < cfg.max_sequence_tokens:
        yield (
            f"reference.max_batch_tokens ({cfg.reference.max_batch_tokens}) must hold the longest sequence, "
            f"prompts.max_tokens + {cfg.max_response_setting} = {cfg.max_sequence_tokens}; raise the first or lower "
            "one of the others"
        )
    if cfg.max_staleness and not cfg.ppo.importance_cap and not cfg.ppo.ratio_to_sampler:
        yield (
            f"ppo.importance_cap (0) must be above 0 with max_staleness ({cfg.max_staleness}): tokens that older "
            "weights sampled need their importance weight; raise it (2 is common), set max_staleness = 0, or set "
            'ppo.policy_loss = "mask"'
        )
    step_mib = -(-cfg.rollouts_per_step * cfg.longest_rollout_bytes >> 20)
    if cfg.max_staleness and cfg.buffer_mib < step_mib:
        yield (
            f"buffer_mib ({cfg.buffer_mib}) must hold the {cfg.rollouts_per_step} rollouts of a step at their longest, "
            f"{step_mib} MiB, with max_staleness ({cfg.max_staleness}): without room, no rollouts of later steps start "
            "early; raise it, or set max_staleness = 0"
        )


def _sleep_rule(cfg: Config) -> str:
    return (
        f"generators.sleep (true) needs max_staleness = 0 (it is {cfg.max_staleness}) and shares of one GPU for engine "
        f"and learner: learner.ranks = 1 (it is {cfg.learner.ranks}), generators.gpus and learner.gpus above 0 and "
        f"together at most 1 (they are {cfg.generators.gpus:g} and {cfg.learner.gpus:g}); change these, or leave "
        "generators.sleep out"
    )


def _broken_environment_rules(cfg: Config) -> Iterator[str]:
    if cfg.environment is None:
        yield from broken_environment_source_rules(
            [*cfg.reward.sources, *cfg.evaluation.judges],
            remedy='add [environment] with function = "module:Class", an agent or tools, or use another kind of source',
        )
        return
    if cfg.sampling.max_new_tokens > cfg.environment.max_tokens:
        yield (
            f"sampling.max_new_tokens ({cfg.sampling.max_new_tokens}), the longest turn, must not exceed "
            f"environment.max_tokens ({cfg.environment.max_tokens}), the longest episode; lower the first or raise the "
            "second"
        )
    if cfg.environment.tools and cfg.prompts.format != "chat":
        yield (
            f'environment.tools needs prompts.format = "chat" (it is "{cfg.prompts.format}"), because the chat '
            "template describes the tools to the model; set it, or use environment.function"
        )
    if taskset := cfg.environment.verifiers:
        for setting, named in (("prompts.train", cfg.prompts.train), ("prompts.heldout", cfg.prompts.heldout)):
            if named not in (None, f"verifiers:{taskset}"):
                yield (
                    f'{setting} ({named}) must be "verifiers:{taskset}" with environment.verifiers = "{taskset}", '
                    "whose rollouts need its tasks; set it"
                )
    if (kind := cfg.environment.endpoint_kind) and cfg.prompts.format != "chat":
        yield (
            f'environment.{kind} needs prompts.format = "chat" (it is "{cfg.prompts.format}"), because agents send '
            "chat messages; set it, or use environment.function"
        )
    if cfg.environment.sequence == "turn" and cfg.prompts.format != "chat":
        yield (
            f'environment.sequence = "turn" needs prompts.format = "chat" (it is "{cfg.prompts.format}"), because the '
            "chat template writes the conversation again for each turn; set it, or leave environment.sequence out"
        )


def _broken_evaluation_rules(cfg: Config) -> Iterator[str]:
    names = [source.name for source in (*cfg.reward.sources, *cfg.evaluation.judges)]
    source, score = cfg.evaluation.pass_source, cfg.evaluation.pass_score
    if source is None and score != 0.5:
        yield (
            f"evaluation.pass_score ({score:g}) needs evaluation.pass_source: name the source or judge whose scores "
            f"it applies to ({', '.join(names)})"
        )
    if source not in (None, *names):
        yield f"evaluation.pass_source ({source}) must be one of {names}"
