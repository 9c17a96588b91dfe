"""Every setting of a PPO run, as typed, frozen trees; `common/config_files.py` loads them from TOML.

Each field has a bound in its type and a sentence saying what it means, its unit, and what moving it does;
`ratchet config --describe` prints them. Rules that span fields stand in `_broken_rules` of a tree's root. The root here
is `Config` (train, evaluate); common/reward_config.py has those of the commands that make reward models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import Field, model_validator

from common.sections import NonNegative as NonNegative
from common.sections import Positive as Positive
from common.sections import Processes as Processes
from common.sections import Rate as Rate
from common.sections import Seconds as Seconds
from common.sections import Section as Section
from common.sections import UserError as UserError
from common.source_config import SOURCE_KINDS as SOURCE_KINDS
from common.source_config import FunctionSourceConfig as FunctionSourceConfig
from common.source_config import HttpSourceConfig as HttpSourceConfig
from common.source_config import JudgeSourceConfig as JudgeSourceConfig
from common.source_config import ModelSourceConfig as ModelSourceConfig
from common.source_config import RewardSource as RewardSource
from common.source_config import ServiceConfig as ServiceConfig
from common.source_config import SourceConfig
from common.source_config import broken_source_rules as broken_source_rules


class Root(Section):
    """A whole config file."""

    @model_validator(mode="before")
    @classmethod
    def refuse_nul(cls, tree: Any) -> Any:
        """No file, model, function or address has a NUL in its name, and most libraries fail on it."""
        if any("\0" in text for text in _texts(tree)):
            raise ValueError("a text has a NUL character in it; remove it")
        return tree

    def to_toml(self) -> str:
        """The resolved tree as `load_config` reads it back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    @model_validator(mode="after")
    def check_rules(self) -> Root:
        """Rules across fields; each message says rule, values and remedy."""
        if faults := list(self._broken_rules()):
            raise ValueError("\n  ".join(faults))
        return self

    def _broken_rules(self) -> Iterator[str]:
        yield from ()


def _texts(tree: Any) -> Iterator[str]:
    """Every text in a tree of tables and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(part)


class Placed(Section):
    """Where a role runs: what each of its processes takes from the cluster."""

    cpus: Annotated[float, Field(ge=0)] = 0
    """CPU cores each process reserves in Ray's bookkeeping; 0 lets it share whatever is there."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs each process reserves; 0 runs it on the CPU."""
    threads: Positive = 1
    """Compute threads of each process. Two busy processes that both use every core slow each other threefold."""
    cores: tuple[NonNegative, ...] = ()
    """CPU cores that each process, and all its threads, keep to; several processes of the role share them. Roles that
    work at the same time disturb each other least on cores of their own. Empty: wherever the scheduler puts it."""


class Replicated(Placed):
    """A role of which there may be several, each able to do the work of any other."""

    min: Processes = 1
    """Processes of this role that the run needs: it starts when so many are ready, and stops, to be gone on with, when
    fewer are for longer than short_s."""
    max: Processes | None = None
    """As many as are wished for: the cluster gets them as far as it has room, now or when nodes join. `ratchet scale`
    changes the wish. Left out: min."""
    in_flight: Positive = 128
    """Requests each process is sent at once; the others wait their turn, and their time limit does not run."""
    timeout_s: Seconds = 300
    """Longest wait for an answer; what takes longer is an error that names the replica, seconds."""
    silent_s: Seconds = 30
    """A process that answers no health probe for this long is replaced, however its calls go, seconds."""
    drain_s: Seconds = 10
    """How long a process that must leave may go on with what it has; then a generator hands it over to others, and
    other roles drop it for others to begin again, seconds."""
    short_s: Seconds = 600
    """How long fewer than `min` may be ready before the run stops, seconds."""

    @property
    def most(self) -> int:
        """Replicas that are wished for."""
        return self.max or self.min

    @model_validator(mode="after")
    def check_bounds(self) -> Replicated:
        if self.most < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min}); raise the first or lower the second")
        return self


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "embedded:smollm2-135m-instruct"
    """A Hugging Face directory, a hub name, or the embedded model. All that is trained starts from it, and it is PPO's
    reference."""
    trust_remote_code: bool = False
    """Whether Python code from the model's directory (`auto_map`) may run, in every process that loads it. Such code
    can do whatever you can; models that transformers knows need none."""


class TextFormat(Section):
    """What text and chat messages of a record may be; the same rules for prompts and preference pairs."""

    section: ClassVar[str]  # its name in the config file, for messages
    format: Literal["plain", "chat"] = "plain"
    """plain: the prompt's text as it is; chat: through the tokenizer's chat template."""
    roles: Annotated[tuple[str, ...], Field(min_length=1)] = ("system", "developer", "user", "assistant", "tool")
    """Roles that chat messages may have; a message with another role is refused."""
    last_assistant: Literal["refuse", "remove", "continue"] = "refuse"
    """What becomes of a chat prompt whose last message is the assistant's. refuse: an error, since it often is an
    answer left in the data; remove: the prompt is what comes before it; continue: the response goes on with this
    message."""
    last_end_token: Literal["refuse", "remove", "keep"] = "refuse"
    """What becomes of an end token that text or chat template put at the end of a prompt, where the policy is to write
    on. keep is for the few chat models (DialoGPT) that were trained so. One that the tokenizer adds is always
    removed."""


class PromptColumns(Section):
    """Names of the columns that prompt records have."""

    prompt: str = "prompt"
    """Column with the prompt: text or chat messages. All others are handed to the reward as fields."""


class PromptFormat(TextFormat):
    """How a prompt record becomes tokens."""

    section: ClassVar[str] = "prompts"
    max_tokens: Positive = 512
    """Longest prompt allowed, in tokens; sampling.max_new_tokens and the model's context may leave less."""
    overlong: Literal["refuse", "drop", "cut_start"] = "refuse"
    """A longer prompt is refused before the run starts, dropped and counted, or loses its first tokens (all but the one
    that begins a sequence)."""
    columns: PromptColumns = PromptColumns()


class PromptsConfig(PromptFormat):
    """What is asked."""

    train: str
    """Training prompts: a .jsonl, .json, .csv (each also .gz) or .parquet file, a pattern such as "data/*.parquet", or
    a Python function `module:function` that takes a seed and returns records. A record has a `prompt`: text or chat
    messages. CSV cells are text."""
    heldout: str | None = None
    """Prompts for evaluation, same forms; must share none with `train`. Left out: no evaluation."""
    rollouts_per_prompt: Positive = 1
    """Responses sampled for each prompt; more lowers the variance per prompt, fewer sees more prompts."""


class SamplingConfig(Section):
    """How responses are drawn from the policy."""

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Divides the logits, for sampling and for every log-probability in the run; lower explores less. vLLM has none
    below 0.01; top_k = 1 takes the likeliest token every time, for evaluations only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; below 1 the learner's log-probabilities no longer are those of the sampled distribution."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens only; 1: always the likeliest; 0 is off. The same caution as for top_p."""
    max_new_tokens: Positive = 256
    """Longest response, in tokens; a response that reaches it has finish reason `length`."""
    min_new_tokens: NonNegative = 0
    """The end token is forbidden before this many tokens. The learner does not know that: the same caution as for
    top_p."""


class GeneratorsConfig(Replicated):
    """The rollout generators: vLLM engines."""

    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs each generator reserves: a share of one, or as many as tensor_parallel; 0 runs it on the CPU."""
    tensor_parallel: Positive = 1
    """Devices that one engine's weights are split over: GPUs, or processes on the CPU, each with `threads` threads. For
    models too large for one GPU: every layer waits for all devices, and an update for all to load their part."""
    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores each generator reserves in Ray's bookkeeping."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the engine. bfloat16 is about twice as fast; float32 agrees with the learner
    exactly on CPU, but for the rounding of new weights to bfloat16."""
    kv_cache_mib: Positive = 256
    """KV cache of each engine, over all its devices, MiB; bounds how many tokens it works on at once."""
    max_running: Positive = 64
    """Rollouts an engine works on at once; more raises throughput until the cores are full."""
    max_batched_tokens: Positive = 256
    """Tokens of one engine step; bounds how long a weight update waits for the step to end."""
    updates: Literal["full", "changes"] = "full"
    """What is sent after a step. full: every weight, best on one node, where engines read them in place; changes: the
    values that differ in bfloat16, where they take fewer bytes: better over a slow network, at the price of finding
    them and of one or two copies of the weights (bfloat16) in each engine's process."""

    @model_validator(mode="after")
    def check_devices(self) -> GeneratorsConfig:
        parts = self.tensor_parallel
        fits = self.gpus <= 1 if parts == 1 else self.gpus in (0, parts)
        if not fits:
            allowed = "at most 1" if parts == 1 else f"{parts}, or 0 for the CPU,"
            raise ValueError(
                f"gpus ({self.gpus:g}) must be {allowed} with tensor_parallel ({parts}): an engine uses a GPU for each "
                "part of its weights; make both the same, or lower gpus"
            )
        return self


class ReferenceConfig(Replicated):
    """The reference-policy service: the frozen starting policy."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward pass; log-probabilities are float32 either way."""
    max_batch_tokens: Positive = 4096
    """Tokens of one forward pass, padding included; more is faster until memory or cache runs out."""
    batch_window_ms: Annotated[float, Field(ge=0)] = 5
    """How long a request waits for others to share its forward pass, milliseconds."""


class SourcesConfig(Replicated):
    """The reward service: which sources score a response."""

    in_flight: Positive = 32
    """Requests each process is sent at once. More let a reward model batch better; slow Python functions, which run one
    after the other, want few, or the last one waits longer than timeout_s."""

    sources: tuple[SourceConfig, ...]
    """The sources: each has a name, a weight, and a function, a model, urls or judge_urls."""
    isolation: Literal["thread", "process"] = "thread"
    """Where reward functions run. thread: in threads of the reward process. process: in worker processes, where
    functions that use signals work, a crash costs one rollout, a call past its limit is ended, and your modules may
    have any name."""
    workers: Positive = 1
    """Worker processes of each function, in each reward process; only with isolation = "process"."""
    call_timeout_s: Seconds | None = None
    """Longest call of a reward function, seconds; a longer one voids the rollout that it was to score. Left out: a
    fifth of timeout_s."""
    max_void_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The run stops when more than this share of responses (of a step, of an evaluation) had to be voided for want of a
    score."""

    @property
    def call_limit_s(self) -> float:
        """Seconds that one call of a reward function may take."""
        return self.call_timeout_s or self.timeout_s / 5

    @property
    def answer_limit_s(self) -> float:
        """Seconds until a rollout without a score is void: before timeout_s, which would end the run."""
        return 0.9 * self.timeout_s

    @model_validator(mode="after")
    def check_limits(self) -> SourcesConfig:
        if self.call_limit_s >= self.answer_limit_s:
            raise ValueError(
                f"call_timeout_s ({self.call_timeout_s:g}) must be below 0.9 * timeout_s ({self.answer_limit_s:g}), "
                "since a call also waits for its turn; lower the first or raise the second"
            )
        return self


class RewardConfig(SourcesConfig):
    """The reward service: which sources score a response, and how they add up."""

    normalise: Literal["mean_std", "std", "none"] = "mean_std"
    """Scores in deviations of every score seen so far in the run: mean_std about their mean, so that neither unit nor
    origin of the reward matters; std keeps the origin; none leaves them as they are, and the KL coefficient then is in
    units of the score."""
    clip: Annotated[float, Field(ge=0)] = 5.0
    """Normalised scores are clipped to +/- this many deviations, so that one outlier cannot own a batch; 0: never."""


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


class CheckpointConfig(Section):
    """Learner state on disk."""

    every: Positive = 20
    """Steps between checkpoints. What lies between is done again on resume (PPO: from the journal, without generating
    anything), so this trades disk for time."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    on_signal: bool = False
    """Whether a signal that stops the run (Ctrl-C, SIGTERM, SIGHUP) lets the step under way end and then writes a
    checkpoint. A run that continues then repeats no step, but stopping takes as long as a step; without it, seconds."""


class RayConfig(Section):
    """The cluster."""

    address: str | None = None
    """HOST:PORT of a running cluster; --address goes over it, and it goes over the variable RAY_ADDRESS. With none of
    them, or local, one is started on this machine, on loopback, and stopped at the end."""
    object_store_mib: Positive = 1024
    """Shared memory of a cluster started here, MiB: holds two versions of the weights and a batch or two."""
    startup_timeout_s: Seconds = 300
    """Longest start of any role, model loading included, seconds."""
    dashboard: bool = True
    """Start Ray's dashboard with a cluster started here."""


class MonitoringConfig(Section):
    """The run's figures for Prometheus, on this machine alone."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of http://127.0.0.1:PORT/metrics; 0: any free one, which RUN/prometheus.json names."""
    discovery: str | None = None
    """Directory in which a file names this run to Prometheus while it goes on, beside RUN/prometheus.json. With one
    directory for all runs, Prometheus watches its *.json and finds every run. Left out: none."""


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


def broken_sampling_rules(cfg: SamplingConfig) -> Iterator[str]:
    if cfg.min_new_tokens > cfg.max_new_tokens:
        yield (
            f"sampling.min_new_tokens ({cfg.min_new_tokens}) must not exceed sampling.max_new_tokens "
            f"({cfg.max_new_tokens}); lower the first or raise the second"
        )
