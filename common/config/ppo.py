"""Every setting of a PPO run, as typed, frozen trees; `common/config/loading.py` loads them from TOML.

Each field has a bound in its type and a sentence saying what it means, its unit, and what moving it does;
`ratchet config --describe` prints them. Rules that span fields stand in `_broken_rules` of a tree's root. The root here
is `Config` (train, evaluate); common/config/reward_model.py has those of the commands that make reward models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from common.config.actors import (
    GeneratorsConfig,
    PromptsConfig,
    ReferenceConfig,
    RewardConfig,
    SamplingConfig,
    broken_sampling_rules,
)
from common.config.base import (
    CheckpointConfig,
    ModelConfig,
    MonitoringConfig,
    NonNegative,
    Placed,
    Positive,
    Processes,
    Rate,
    RayConfig,
    Root,
    Seconds,
    Section,
)
from common.config.sources import SourceConfig, broken_source_rules


class PPOConfig(Section):
    """Proximal policy optimisation with a learned critic (Schulman et al. 2017, arXiv:1707.06347)."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per token; 1 counts the score in full at the first token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's lambda (arXiv:1506.02438): 0 trusts the critic, 1 trusts the sampled return; in between trades
    the critic's bias for variance."""
    clip_eps: Annotated[float, Field(gt=0)] = 0.05
    """A token gains nothing once its probability has moved further than this share from where the step began; 0.2 is
    common elsewhere."""
    value_clip: Annotated[float, Field(ge=0)] = 0
    """Bound on how far a value may move from its old value within a step, in reward units; 0: unclipped."""
    ppo_epochs: Positive = 2
    """Passes over each batch; more reuses the data and moves further from the policy that wrote it."""
    minibatches: Positive = 1
    """Optimizer steps per pass, each on an equal part of the batch: rollouts_per_step must be a multiple of it."""
    value_coef: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the value loss beside the policy loss; matters for what the critic shares with the policy."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, per nat; more keeps the policy from settling early."""
    whiten_advantages: bool = True
    """Advantages of a batch to mean 0 and variance 1, so that the step size does not depend on the reward's unit."""
    target_kl: Annotated[float, Field(ge=0)] = 0
    """The step ends before a minibatch whose mean KL from where the step began passes this, nats per token; 0:
    never."""
    importance_cap: Annotated[float, Field(ge=0)] = 2.0
    """Cap of the importance weight between the learner's and the generator's log-probability of a token, which
    corrects for stale or differently rounded samplers; 0: no correction."""
    max_mismatch_kl: Annotated[float, Field(ge=0)] = 0.1
    """The run stops when mismatch/kl (k3 between learner and generator, nats per token) is above this for
    max_mismatch_steps steps in a row: the two then compute different policies; 0: never."""
    max_mismatch_steps: Positive = 5
    """See max_mismatch_kl."""


class KLConfig(Section):
    """The penalty for leaving the reference policy (Ziegler et al. 2019, arXiv:1909.08593)."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    """Reward lost per nat of KL at each token; more stays closer to the reference."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's KL is estimated: k1 unbiased, k2 and k3 never far from or below zero (lower variance). k3 is capped
    at 10 nats where the reference finds the token likelier."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """fixed keeps `coef`; adaptive steers it so that the KL per response meets `target`."""
    target: Annotated[float, Field(gt=0)] = 6.0
    """Adaptive only: wanted KL from the reference, nats per response."""
    horizon: Positive = 10_000
    """Adaptive only: responses over which the coefficient adapts; smaller reacts faster."""


class AdamWConfig(Section):
    """AdamW and the schedule of its learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of the language model's weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay at the peak, or fall along a line or a half cosine that reaches zero one step after the last:
    with linear the last of n steps after warm-up still runs at 1 / n of the peak."""
    warmup_steps: NonNegative = 0
    """Steps below the peak rate, which rises along a line: the first runs at 1 / (warmup_steps + 1) of it."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay of Adam's running mean and variance of the gradient."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, per unit of learning rate; matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient's norm is scaled down to this when larger."""


class OptimizerConfig(AdamWConfig):
    """AdamW for policy and critic."""

    value_head_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of the value head, which starts at zero and may learn faster."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of a separate critic's network; unused with a shared trunk."""


class LoRAConfig(Section):
    """Low-rank adapters (arXiv:2106.09685): the weights W stay as they are, and W + (alpha / rank) B A is used."""

    rank: Positive = 16
    """Width of the adapters; more can learn more, and takes more memory."""
    alpha: Positive = 32
    """Scale of what the adapters add, divided by the rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get adapters, such as q_proj; all-linear: every one but the output embedding, and
    the experts of a mixture of experts. Embeddings are refused."""


class TrainerConfig(Placed):
    """A learner group: one process per device, in step."""

    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores each rank reserves in Ray's bookkeeping."""
    ranks: Processes = 1
    """Processes that train in step, each on its share of every batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Matrix products in forward and backward; weights, losses and optimizer state are float32 either way."""
    micro_batch_tokens: Positive | None = None
    """Tokens of one forward and backward; bounds activation memory, cannot change the gradient. Left out: 512 on CPU,
    8192 on GPU. A longer sequence is a micro-batch of its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a quarter slower, far less memory."""
    timeout_s: Seconds = 1800
    """Longest update, and longest wait of one rank for another, seconds."""

    @property
    def token_budget(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_tokens or (8192 if self.gpus else 512)


class LearnerConfig(TrainerConfig):
    """The learner group: policy and critic in training."""

    critic: Literal["shared", "separate"] = "shared"
    """shared: a value head on the policy's trunk, one forward pass; separate: its own network from the same
    checkpoint, twice the memory and compute, and value loss that cannot disturb the policy."""
    critic_warmup_steps: NonNegative = 0
    """First steps that train the critic alone."""
    lora: LoRAConfig | None = None
    """Train adapters instead of all weights: a fraction of the memory, and no reference service, since the policy with
    its adapters off is the reference. Left out: all weights are trained."""


class EvaluationConfig(Section):
    """Held-out evaluation before and after training."""

    prompts: NonNegative = 256
    """How many held-out prompts are asked; 0 turns evaluation off."""
    every: NonNegative = 0
    """Also evaluate every so many steps; 0: only before and after."""
    judges: tuple[SourceConfig, ...] = ()
    """Reward sources that score held-out responses only: training never sees them, so they show over-optimisation."""
    pass_source: str | None = None
    """A response passes (pass@1) when this source or judge scores it at least `pass_score`. Left out: the first source,
    as far as all its scores are 0 or 1; other scores, such as a reward model's, then give no pass@1."""
    pass_score: float = 0.5
    """See pass_source."""


class Config(Root):
    """A run of PPO."""

    seed: NonNegative = 0
    """Seeds prompts, sampling and minibatches; on one machine with one set of threads and max_staleness = 0 a seed
    gives one result."""
    num_steps: Positive = 100
    """Learner updates, each on rollouts_per_step rollouts."""
    rollouts_per_step: Positive = 64
    """Rollouts in a batch; more steadies the gradient and takes longer."""
    max_staleness: NonNegative = 1
    """How many versions old the weights behind a trained token may be. With 1 generators write the next batch while the
    learner learns; 0 is strictly on-policy: they wait, and roles can take turns on the same cores."""
    buffer_mib: Positive = 512
    """Memory for rollouts between prompt and learner, MiB. Once it is full, only what the next step needs is begun."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    generators: GeneratorsConfig = GeneratorsConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ray: RayConfig = RayConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.prompts.max_tokens + self.sampling.max_new_tokens

    def _broken_rules(self) -> Iterator[str]:
        batch, sampling, steps = self.rollouts_per_step, self.sampling, self.num_steps
        for key, parts in (
            ("ppo.minibatches", self.ppo.minibatches),
            ("prompts.rollouts_per_prompt", self.prompts.rollouts_per_prompt),
        ):
            if batch % parts:
                nearest = ", ".join(str(n) for n in (batch // parts * parts, batch // parts * parts + parts) if n)
                yield f"rollouts_per_step ({batch}) must be a multiple of {key} ({parts}); nearest: {nearest}"
        yield from broken_sampling_rules(sampling)
        if self.optimizer.warmup_steps > steps:
            yield (
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must not exceed num_steps ({steps}); "
                "lower the first or raise the second"
            )
        if self.learner.critic_warmup_steps >= steps:
            yield (
                f"learner.critic_warmup_steps ({self.learner.critic_warmup_steps}) must be below num_steps ({steps}), "
                "or the policy is never trained; lower the first or raise the second"
            )
        if self.kl.controller == "adaptive" and self.kl.coef == 0:
            yield (
                'kl.coef (0) must be above 0 with kl.controller = "adaptive", which multiplies it: it would stay 0; '
                'raise it, or set kl.controller = "fixed"'
            )
        if self.kl.controller == "adaptive" and self.kl.horizon < batch:
            yield (
                f"kl.horizon ({self.kl.horizon}) must be at least rollouts_per_step ({batch}), or the controller "
                "overshoots; raise it"
            )
        if self.reference.max_batch_tokens < self.max_sequence_tokens:
            yield (
                f"reference.max_batch_tokens ({self.reference.max_batch_tokens}) must hold the longest sequence, "
                f"prompts.max_tokens + sampling.max_new_tokens = {self.max_sequence_tokens}; raise the first or lower "
                "one of the others"
            )
        if self.max_staleness and not self.ppo.importance_cap:
            yield (
                f"ppo.importance_cap (0) must be above 0 with max_staleness ({self.max_staleness}): tokens of older "
                "weights want their importance weight; raise it (2 is common) or set max_staleness = 0"
            )
        yield from broken_trainer_rules(self.learner)
        yield from broken_source_rules("reward.sources", self.reward.sources, others=self.evaluation.judges)
        names = [source.name for source in (*self.reward.sources, *self.evaluation.judges)]
        if self.evaluation.pass_source is None and self.evaluation.pass_score != 0.5:
            yield (
                f"evaluation.pass_score ({self.evaluation.pass_score:g}) needs evaluation.pass_source: name the source "
                f"or judge that it is a score of ({', '.join(names)})"
            )
        if self.evaluation.pass_source not in (None, *names):
            yield f"evaluation.pass_source ({self.evaluation.pass_source}) must be one of {names}"


# Rules that several roots share


def broken_trainer_rules(cfg: TrainerConfig) -> Iterator[str]:
    if cfg.ranks > 1 and cfg.gpus not in (0, 1):
        yield (
            f"learner.gpus ({cfg.gpus:g}) must be 1 for each of {cfg.ranks} learner.ranks, or 0 for the CPU: ranks "
            "cannot share a GPU"
        )
