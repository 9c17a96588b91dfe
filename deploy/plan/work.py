"""The work of a training step, by pure arithmetic: operations of its passes, and bytes that they read. Runs in the
driver.

A forward pass takes 2 operations for each weight and token, and those of attention (`forward_operations`). A backward
pass takes twice as many: half of them for the gradient of each layer's input, half for that of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from actors.generation.kv_cache import bytes_per_sequence, bytes_per_value
from common.config.ppo import Config
from common.model.size import ModelSize, forward_operations
from learner.ppo.frozen import frozen_names

# Bytes that a step of AdamW moves for each trained weight, all float32. It reads weight, gradient and two moments (4),
# and writes all but the gradient (3). Before that, the gradient is read for its norm (1), and read and written to be
# scaled (2).
OPTIMIZER_BYTES = 4 * (4 + 3 + 1 + 2)


@dataclass(frozen=True)
class Lengths:
    """The tokens of a typical rollout."""

    prompt: float
    response: float

    @property
    def whole(self) -> float:
        """Prompt and response together."""
        return self.prompt + self.response

    @classmethod
    def longest(cls, cfg: Config) -> Lengths:
        """The longest that the config allows."""
        return cls(cfg.prompts.max_tokens, cfg.max_response_tokens)


@dataclass(frozen=True)
class Generation:
    """The work of the engine that writes the largest part of a batch."""

    rollouts: int
    running: int  # rollouts that it works on at once, at most
    prefill: float  # operations for the prompts, first tokens of the responses included
    decode: float  # operations for the other tokens of the responses
    steps: float  # of the engine; in each, every running rollout gets a token
    step_bytes: float  # read in each step, on average: all weights, and the keys and values of the running rollouts


def generation(cfg: Config, model: ModelSize, lengths: Lengths, *, cache_bytes: int | None) -> Generation:
    """The work of one of `generators.min` engines. Rollouts of one length start and end together, `running` at once.
    `cache_bytes`: the KV cache of an engine; None: large enough."""
    engines = cfg.generators
    rollouts = ceil(cfg.rollouts_per_step / engines.min)
    tokens, longest = bytes_per_sequence(engines, model, max_tokens=cfg.max_sequence_tokens)
    token_bytes = longest / tokens
    running = min(engines.max_running, rollouts)
    if cache_bytes is not None:
        running = max(1, min(running, int(cache_bytes / (token_bytes * lengths.whole))))
    whole = rollouts * forward_operations(model, lengths.whole, lengths.response)
    prefill = rollouts * forward_operations(model, lengths.prompt, 1)
    waves = ceil(rollouts / running)
    half_written = lengths.prompt + lengths.response / 2
    return Generation(
        rollouts=rollouts,
        running=running,
        prefill=prefill,
        decode=max(0.0, whole - prefill),
        steps=lengths.response * waves,
        step_bytes=bytes_per_value(engines) * model.parameters + rollouts / waves * token_bytes * half_written,
    )


def measuring(cfg: Config, model: ModelSize, lengths: Lengths) -> float:
    """Operations of the reference's passes over a batch; with LoRA, those of the learner without its adapters."""
    return cfg.rollouts_per_step * forward_operations(model, lengths.whole, lengths.response)


def scoring(cfg: Config, reward_models: Sequence[ModelSize], lengths: Lengths) -> float:
    """Operations of all reward models over a batch. Each gives one number for the last token."""
    return sum(cfg.rollouts_per_step * forward_operations(model, lengths.whole, 0) for model in reward_models)


@dataclass(frozen=True)
class Update:
    """The work of one update on all ranks together."""

    before: float  # operations of passes without gradients: old log-probabilities and values
    training: float  # operations of passes with gradients, forward and backward
    optimizer_bytes: float
    pass_tokens: float  # tokens of a micro-batch


def update(cfg: Config, model: ModelSize, lengths: Lengths) -> Update:
    """The passes are those of learner/ppo/learner.py. Those of a value head alone are left out: they take no time."""
    ppo, learner, rows = cfg.ppo, cfg.learner, cfg.rollouts_per_step
    policy = rows * forward_operations(model, lengths.whole, lengths.response)
    trunk = rows * forward_operations(model, lengths.whole, 0)
    separate = ppo.has_critic and learner.critic == "separate"
    critic = trunk if separate else 0.0

    # With "mask" only the values of the critic are needed.
    before = (trunk if ppo.has_critic else 0.0) if ppo.ratio_to_sampler else policy + critic
    minibatch = rows * lengths.whole / ppo.minibatches / learner.fewest_ranks
    if ppo.minibatches == 1 and minibatch <= learner.token_budget:
        before = 0.0  # the first optimizer step uses this pass
    if ppo.value_epochs and ppo.has_critic and not separate:
        before += trunk  # the states on which the value head trains

    frozen = _frozen_share(cfg, model)
    policy_cost, critic_cost = _passes(cfg), _passes(cfg) - frozen  # in forward passes
    training = ppo.ppo_epochs * (policy_cost * policy + critic_cost * critic) + ppo.value_epochs * critic_cost * critic

    weights = 0.0 if learner.lora is not None else float(model.parameters)  # adapters take hardly any time
    critic_weights = weights * (1 - frozen) if separate else 0.0
    moved = ppo.ppo_epochs * (weights + critic_weights) + ppo.value_epochs * critic_weights
    return Update(
        before=before,
        training=training,
        optimizer_bytes=ppo.minibatches * OPTIMIZER_BYTES * moved,
        pass_tokens=min(minibatch, max(learner.token_budget, lengths.whole)),
    )


def _passes(cfg: Config) -> int:
    """Operations of a forward and backward pass, as a multiple of the forward pass. Below LoRA's adapters no weight
    needs a gradient. With checkpointing the forward pass is made again."""
    return 3 - (cfg.learner.lora is not None) + cfg.learner.gradient_checkpointing


def _frozen_share(cfg: Config, model: ModelSize) -> float:
    """Share of a separate critic's weights that do not train; their gradients are not computed."""
    patterns = cfg.learner.critic_frozen
    if not patterns or not model.body or not cfg.ppo.has_critic or cfg.learner.critic != "separate":
        return 0.0
    return sum(model.body[name] for name in frozen_names(model.body, patterns)) / sum(model.body.values())


def published_bytes(model: ModelSize) -> int:
    """A full set of weights in bfloat16. LoRA's adapters are merged into it."""
    return 2 * model.parameters
