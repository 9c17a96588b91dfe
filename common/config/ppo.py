"""Settings of `ratchet train` and `ratchet evaluate`: the tree `Config` and its sections.

Runs anywhere. Each field has a bound in its type, and a sentence with its meaning, its unit and the effect of a change;
`ratchet config --describe` prints them. common/config/ppo_rules.py has the rules across fields.
common/config/loading.py loads the tree from TOML, and common/config/reward_model.py has the trees of the commands that
make reward models.
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
)
from common.config.base import (
    Lambda,
    LoggingConfig,
    MayChange,
    ModelConfig,
    MonitoringConfig,
    NonNegative,
    Positive,
    RayConfig,
    Recorded,
    Root,
    Section,
)
from common.config.critic_training import CriticTrainingConfig
from common.config.environment import EnvironmentConfig
from common.config.ppo_rules import broken_rules
from common.config.sources import SourceConfig
from common.config.training import AdamWConfig, CheckpointConfig, TrainerConfig
from common.memory import BYTES_PER_TOKEN


class PPOConfig(Section):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347)."""

    advantages: Literal["gae", "group", "returns"] = "gae"
    """The baseline that rewards are compared with. gae: a learned critic (arXiv:1506.02438). group: the mean of the
    prompt's other responses (RLOO, arXiv:2402.14740). returns: none. The last two build no critic, and ignore its
    settings: lam, lam_alpha, value_lam, value_epochs, value_clip, value_coef, learner.critic, learner.critic_path,
    learner.critic_frozen, learner.critic_warmup_steps and the critic's learning rates."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per token; 1 counts the score in full at the first token. Unused with advantages = "group"."""
    lam: Lambda = 0.95
    """GAE's lambda (arXiv:1506.02438): 0 trusts the critic, 1 trusts the sampled return; values in between trade the
    critic's bias for variance. length: it depends on the length of the response (in an episode, of the sequence), see
    lam_alpha."""
    lam_alpha: Annotated[float, Field(gt=0)] = 0.05
    """For lam or value_lam = length: the lambda of a response is 1 - 1 / (lam_alpha x its tokens), never below 0
    (arXiv:2504.05118). So advantages look ahead over about this share of the response. 0.05 is made for thousands of
    tokens: a response of 200 tokens has lambda 0.9, one of 20 or fewer has 0."""
    value_lam: Lambda | None = None
    """Lambda of the returns that the critic learns from; 1 makes them sampled returns, without the critic's own errors
    (arXiv:2503.01491). Left out: the same as lam."""
    policy_loss: Literal["clip", "mask"] = "clip"
    """What keeps a step near the policy that wrote the batch. clip: PPO's clipped ratio to the policy before the step.
    mask: the ratio to the sampler's own probabilities, and no gradient for tokens whose ratio is out of bounds. mask
    needs no importance weight and, without a critic, no pass over the batch before learning."""
    clip_eps: Recorded[Annotated[float, Field(gt=0)]] = 0.05
    """A token's gain stops growing once its probability has moved by this share from its value before the step. With
    mask the distance is from the sampler's probability, and rounding alone is often above 0.05: use 0.2 or more
    (docs/ppo.md). 0.2 is common elsewhere."""
    clip_eps_high: Recorded[Annotated[float, Field(gt=0)] | None] = None
    """The bound for probabilities that rise; clip_eps is then for those that fall. A larger value lets rare good tokens
    grow (arXiv:2503.14476 has 0.28, and 0.2 for clip_eps). Left out: the same as clip_eps."""
    value_clip: Recorded[Annotated[float, Field(ge=0)]] = 0
    """Most a value may move from its old value within a step; 0: unclipped. The unit is that of normalised scores: a
    deviation, unless reward.normalise is none."""
    ppo_epochs: Positive = 2
    """Passes over each batch; more reuse the data, and move further from the policy that sampled it."""
    value_epochs: NonNegative = 0
    """Extra passes that train only the critic, after the policy's passes and with the same returns. More passes let the
    critic follow a policy that learns fast. A separate critic trains its network and its head; on a shared trunk only
    the head trains, which takes hardly any time."""
    minibatches: Positive = 1
    """Optimizer steps per pass, each on an equal part of the batch: rollouts_per_step must be a multiple of it."""
    value_coef: Recorded[Annotated[float, Field(ge=0)]] = 0.5
    """Weight of the value loss next to the policy loss. It matters for weights that critic and policy share, and for
    the norm that optimizer.max_grad_norm bounds."""
    entropy_coef: Recorded[Annotated[float, Field(ge=0)]] = 0.0
    """Weight of the entropy bonus, per nat; more keeps the policy from settling early."""
    whiten_advantages: bool = True
    """Scale the advantages of a batch to mean 0 and variance 1, so that the step size does not depend on the reward's
    unit."""
    target_kl: Recorded[Annotated[float, Field(ge=0)]] = 0
    """End the step before a minibatch whose mean KL from the policy at the start of the step (with mask: from the
    sampler) is above this, nats per token; 0: never."""
    importance_cap: Recorded[Annotated[float, Field(ge=0)]] = 2.0
    """Cap of the importance weight, the ratio of the learner's to the generator's probability of a token. It corrects
    for generators with older weights or other rounding; 0: no correction. Unused with policy_loss = mask."""
    max_mismatch_kl: MayChange[Annotated[float, Field(ge=0)]] = 0.1
    """Stop the run when the metric mismatch/kl is above this for max_mismatch_steps steps in a row: learner and
    generators then compute different policies. It is the k3 estimate between both, nats per token. 0: never."""
    max_mismatch_steps: MayChange[Positive] = 5
    """See max_mismatch_kl."""

    @property
    def has_critic(self) -> bool:
        """True if the advantages need a critic."""
        return self.advantages == "gae"

    @property
    def ratio_to_sampler(self) -> bool:
        """True if the ratio divides by the sampler's probabilities, and not by those of the policy before the step."""
        return self.policy_loss == "mask"

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """The ratios between which a token may move."""
        return 1 - self.clip_eps, 1 + (self.clip_eps if self.clip_eps_high is None else self.clip_eps_high)


class KLConfig(Section):
    """The penalty for moving away from the reference policy (Ziegler et al. 2019, arXiv:1909.08593)."""

    coef: Recorded[Annotated[float, Field(ge=0)]] = 0.05
    """Reward lost per nat of KL at each token; more stays closer to the reference."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of a token's KL. k1 is unbiased; k2 and k3 are never below zero and vary less. k3 is capped at 10
    nats where the reference gives the token the higher probability."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """fixed keeps `coef`; adaptive changes it so that the KL per response meets `target`."""
    target: Recorded[Annotated[float, Field(gt=0)]] = 6.0
    """Adaptive only: target for the KL from the reference, nats per response."""
    horizon: Positive = 10_000
    """Adaptive only: responses over which the coefficient adapts; smaller reacts faster."""


class OptimizerConfig(AdamWConfig):
    """AdamW for policy and critic."""

    learning_rate: Recorded[Annotated[float, Field(gt=0)]] = 1e-6
    """Peak learning rate of the language model's weights."""
    max_grad_norm: Recorded[Annotated[float, Field(gt=0)]] = 1.0
    """A gradient with a larger norm is scaled down to this norm."""
    value_head_learning_rate: Recorded[Annotated[float, Field(gt=0)]] = 1e-4
    """Peak learning rate of the value head, which starts at zero and may learn faster."""
    critic_learning_rate: Recorded[Annotated[float, Field(gt=0)]] = 1e-5
    """Peak learning rate of a separate critic's network; unused with a shared trunk."""


class LoRAConfig(Section):
    """Low-rank adapters (arXiv:2106.09685): the weights W stay fixed, and the model computes with W + (alpha / rank)
    B A."""

    rank: Positive = 16
    """Width of the adapters; more can learn more, and takes more memory."""
    alpha: Positive = 32
    """The adapters' output is multiplied by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get adapters, such as q_proj; all-linear: every one but the output embedding,
    and the experts of a mixture of experts. Embeddings are refused."""


class LearnerConfig(TrainerConfig):
    """The learner group, which trains policy and critic."""

    critic: Literal["shared", "separate"] = "shared"
    """shared: a value head on the policy's trunk, one forward pass; separate: its own network from the same
    checkpoint, twice the memory and compute, and a value loss that changes no weight of the policy."""
    critic_path: MayChange[str | None] = None
    """Directory of a critic that ratchet train-critic has written: the run starts from it, and from the statistics of
    the scores that it was trained with. It must have been trained for this model, this reward, this kind of critic and
    this ppo.gamma. A run that continues may name a new place of the same critic. Left out: a value head of zeros."""
    critic_frozen: str | tuple[str, ...] | None = None
    """Weights of a separate critic that do not train: attention, or patterns over the names of its parameters, such as
    "*.mlp.*" or "embed_tokens.*". This reduces overfitting on few scores, and saves their gradients and optimizer
    state. The value head always trains. Left out: all weights train."""
    critic_warmup_steps: NonNegative = 0
    """Number of first steps that train only the critic; on a shared trunk only its head. optimizer.warmup_steps are
    counted from step 0 too, so with fewer of them the policy starts at the full rate."""
    max_losses: MayChange[Positive] = 3
    """When a rank is lost, the group starts again, and continues from the newest checkpoint and the journal. The run
    stops when ranks are lost this many times without a new step in between; 1: at the first loss."""
    lora: LoRAConfig | None = None
    """Train adapters instead of all weights: takes a fraction of the memory and needs no reference service, since the
    policy with its adapters off is the reference. Left out: all weights are trained."""


class EvaluationConfig(Section):
    """Held-out evaluation: before and after training, and by ratchet evaluate."""

    prompts: NonNegative = 256
    """Held-out prompts to answer; 0 turns evaluation off."""
    every: NonNegative = 0
    """Also evaluate after every this many steps; 0: only before and after training."""
    judges: tuple[SourceConfig, ...] = ()
    """Reward sources that score held-out responses only. Training never sees their scores, so they show
    over-optimisation. If a judge fails on an answer, the answer keeps its other scores."""
    pass_source: str | None = None
    """A response passes (pass@1) when this source or judge scores it at least `pass_score`. Left out: the first source,
    if all its scores are 0 or 1; with other scores, such as a reward model's, there is no pass@1."""
    pass_score: float = 0.5
    """See pass_source."""
    text: str | None = None
    """Text whose perplexity ratchet evaluate measures in addition to the shipped text: a .txt file, a pattern such as
    "texts/*.txt", or records as in prompts.heldout. Left out: the shipped text alone."""
    text_column: str = "text"
    """Column of the records with the text."""
    text_tokens: NonNegative = 16_384
    """Most tokens of each text; the rest is not measured. 0: no perplexity."""
    text_window: Annotated[int, Field(ge=2)] = 256
    """Tokens of a window. Each token is predicted from the tokens before it in its window alone. So longer windows
    lower the perplexity, and fewer windows make its interval wider. The model's context and reference.max_batch_tokens
    may be lower limits."""


class PolicyCheckpointConfig(CheckpointConfig):
    """Learner state on disk."""

    best: bool = False
    """Also keep the checkpoint of the policy with the best mean score of all held-out evaluations so far
    (evaluation.every). It is written after every evaluation with a new best score."""


class PolicyLoggingConfig(LoggingConfig):
    """Trackers that get a run's numbers in addition to its directory."""

    samples: NonNegative = 8
    """Rollouts of a step in the table of samples at Weights & Biases; 0: no table."""
    samples_every: Positive = 10
    """Steps from one table of samples to the next."""


class CreditConfig(Section):
    """The values of every token, in RUN/credit (docs/credit.md)."""

    every: NonNegative = 1
    """Write what an update derived for each token (value, reward, advantage, ratio and more) after every this many
    steps, counted from step 0; 0: never. `ratchet replay --credit` writes the files of any steps later."""


class Config(Root):
    """A run of PPO."""

    seed: NonNegative = 0
    """Seeds prompts, sampling and minibatches. With max_staleness = 0, on the CPUs of one machine and with the same
    threads, a seed always gives the same result. On GPUs results differ by rounding, which may change samples."""
    num_steps: MayChange[Positive] = 100
    """Learner updates, each on rollouts_per_step rollouts."""
    rollouts_per_step: Positive = 64
    """Rollouts in a batch; more give a less noisy gradient and take longer."""
    max_staleness: NonNegative = 1
    """Largest age of the weights behind a trained token, in versions. With 1, generators write the next batch while the
    learner learns. 0 is strictly on-policy: generators wait for the learner, and roles can take turns on the same
    cores."""
    buffer_mib: Positive = 512
    """Memory for rollouts from their start until the learner has them, MiB. When it is full, only rollouts for the next
    step start. With max_staleness above 0 it must hold the rollouts of a step at their longest."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    generators: MayChange[GeneratorsConfig] = GeneratorsConfig()
    reference: MayChange[ReferenceConfig] = ReferenceConfig()
    reward: RewardConfig
    environment: EnvironmentConfig | None = None
    """Answers the model, in rollouts of several turns. Left out: a rollout is one response."""
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: MayChange[EvaluationConfig] = EvaluationConfig()
    checkpoint: MayChange[PolicyCheckpointConfig] = PolicyCheckpointConfig()
    credit: MayChange[CreditConfig] = CreditConfig()
    critic_training: MayChange[CriticTrainingConfig] = CriticTrainingConfig()
    ray: MayChange[RayConfig] = RayConfig()
    logging: MayChange[PolicyLoggingConfig] = PolicyLoggingConfig()
    monitoring: MayChange[MonitoringConfig] = MonitoringConfig()

    @property
    def critic_path(self) -> str | None:
        """learner.critic_path; None without a critic, because its settings are then ignored."""
        return self.learner.critic_path if self.ppo.has_critic else None

    @property
    def critic_warmup_steps(self) -> int:
        """learner.critic_warmup_steps; 0 without a critic."""
        return self.learner.critic_warmup_steps if self.ppo.has_critic else 0

    @property
    def max_response_tokens(self) -> int:
        """Longest response: one turn, or all turns of an episode with what the environment says."""
        return self.sampling.max_new_tokens if self.environment is None else self.environment.max_tokens

    @property
    def max_response_setting(self) -> str:
        """The setting that max_response_tokens comes from."""
        return "sampling.max_new_tokens" if self.environment is None else "environment.max_tokens"

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.prompts.max_tokens + self.max_response_tokens

    @property
    def longest_rollout_bytes(self) -> int:
        """Approximate memory of the longest rollout."""
        return BYTES_PER_TOKEN * self.max_sequence_tokens

    @property
    def lent_share(self) -> float:
        """The share of its GPU that an engine lends to the learner during each update; 0 if engines stay awake."""
        return self.generators.gpus if self.may_sleep and self.generators.sleep is not False else 0.0

    @property
    def may_sleep(self) -> bool:
        """True if nothing is generated during an update, and the learner has a share of an engine's GPU."""
        learner, engine = self.learner.gpus, self.generators.gpus
        share_one_gpu = self.learner.ranks == 1 and min(learner, engine) > 0 and learner + engine <= 1
        return share_one_gpu and self.max_staleness == 0

    @property
    def group_size(self) -> int:
        """Rollouts that stay together in one batch: all responses to a prompt if each is a baseline for the others."""
        return self.prompts.rollouts_per_prompt if self.ppo.advantages == "group" else 1

    def _broken_rules(self) -> Iterator[str]:
        yield from broken_rules(self)
