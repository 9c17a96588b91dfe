"""Every setting of a run: one typed, frozen tree, loaded from TOML and `key=value` overrides.

Each field has a bound in its type and a sentence saying what it means, its unit, and what moving it does;
`ratchet config --describe` prints them. Rules that span fields stand in `Config.check_rules`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo


class UserError(Exception):
    """Something the user can mend. The message states rule, value and remedy; the command line exits with 2."""


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Placed(Section):
    """Where a role runs: what each of its processes takes from the cluster."""

    cpus: Annotated[float, Field(ge=0)] = 0
    """CPU cores each process reserves in Ray's bookkeeping; 0 lets it share whatever is there."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs each process reserves; 0 runs it on the CPU."""
    threads: Positive = 1
    """Compute threads of each process. Two busy processes that both use every core slow each other threefold."""


class Replicated(Placed):
    """A role of which there may be several, each able to do the work of any other."""

    replicas: Positive = 1
    """Number of processes of this role."""
    in_flight: Positive = 128
    """Requests each process is sent at once; the others wait their turn, and their time limit does not run."""
    timeout_s: Seconds = 300
    """Longest wait for an answer; what takes longer is an error that names the replica, seconds."""


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "embedded:smollm2-135m-instruct"
    """A Hugging Face directory, a hub name, or the embedded model. Policy, critic and reference all start from it."""


class PromptsConfig(Section):
    """What is asked."""

    train: str
    """Training prompts: a .jsonl file (one record a line, text or chat messages under `prompt`), or a Python function
    `module:function` that takes a seed and returns such records."""
    heldout: str | None = None
    """Prompts for evaluation, same forms; must share none with `train`. Left out: no evaluation."""
    format: Literal["plain", "chat"] = "plain"
    """plain: the prompt's text as it is; chat: through the tokenizer's chat template."""
    rollouts_per_prompt: Positive = 1
    """Responses sampled for each prompt; more lowers the variance per prompt, fewer sees more prompts."""
    max_tokens: Positive = 512
    """Longest prompt allowed, in tokens; a longer one is refused before the run starts."""


class SamplingConfig(Section):
    """How responses are drawn from the policy."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits, for sampling and for every log-probability in the run; lower explores less."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; below 1 the learner's log-probabilities no longer are those of the sampled distribution."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens only; 0 is off. The same caution as for top_p."""
    max_new_tokens: Positive = 256
    """Longest response, in tokens; a response that reaches it has finish reason `length`."""
    min_new_tokens: NonNegative = 0
    """The end token is forbidden before this many tokens. The learner does not know that: the same caution as for
    top_p."""


class GeneratorsConfig(Replicated):
    """The rollout generators: vLLM engines."""

    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores each generator reserves in Ray's bookkeeping."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the engine. bfloat16 is about twice as fast; float32 agrees with the learner
    exactly on CPU, but for the rounding of new weights to bfloat16."""
    kv_cache_mib: Positive = 256
    """KV cache of each engine, MiB; bounds how many tokens it works on at once."""
    max_running: Positive = 64
    """Rollouts an engine works on at once; more raises throughput until the cores are full."""
    max_batched_tokens: Positive = 256
    """Tokens of one engine step; bounds how long a weight update waits for the step to end."""


class ReferenceConfig(Replicated):
    """The reference-policy service: the frozen starting policy."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward pass; log-probabilities are float32 either way."""
    max_batch_tokens: Positive = 4096
    """Tokens of one forward pass, padding included; more is faster until memory or cache runs out."""
    batch_window_ms: Annotated[float, Field(ge=0)] = 5
    """How long a request waits for others to share its forward pass, milliseconds."""


class RewardSource(Section):
    """Where a raw score comes from: a Python function, or an HTTP service; exactly one of the two."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """Under this name its raw score is logged, journalled and shown."""
    function: str | None = None
    """`module:function` taking a RewardInput and returning a number."""
    urls: tuple[str, ...] = ()
    """Addresses of an HTTP service: each is POSTed the RewardInput as JSON and answers {"score": number}. With several,
    a request goes to the one with the fewest outstanding."""
    weight: float = 1.0
    """Its share in the total: score = sum of weight * raw score."""
    concurrency: Positive = 16
    """HTTP only: requests outstanding at a time, over all addresses, from each reward process."""
    request_timeout_s: Seconds = 10
    """HTTP only: longest wait for one answer, seconds."""
    retries: NonNegative = 3
    """HTTP only: further tries after a failure, at another address where there is one; then the rollout is void."""
    backoff_s: Seconds = 0.5
    """HTTP only: pause before the first further try, doubled before each next one, seconds."""


class RewardConfig(Replicated):
    """The reward service: which sources score a response, and how they add up."""

    sources: tuple[RewardSource, ...]
    """The sources, each with a name, a function and a weight."""
    in_flight: Positive = 8
    """Requests each process is sent at once: it answers one after the other, as Python functions run."""
    normalise: Literal["mean_std", "std", "none"] = "mean_std"
    """Scores in deviations of every score seen so far in the run: mean_std about their mean, so that neither unit nor
    origin of the reward matters; std keeps the origin; none leaves them as they are, and the KL coefficient then is in
    units of the score."""
    clip: Annotated[float, Field(ge=0)] = 5.0
    """Normalised scores are clipped to +/- this many deviations, so that one outlier cannot own a batch; 0: never."""
    max_void_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The run stops when more than this share of a step's rollouts had to be voided for want of a score."""


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
    """Optimizer steps per pass; rollouts_per_step must divide into them."""
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


class KLConfig(Section):
    """The penalty for leaving the reference policy (Ziegler et al. 2019, arXiv:1909.08593)."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    """Reward lost per nat of KL at each token; more stays closer to the reference."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's KL is estimated: k1 unbiased, k2 and k3 never far from or below zero (lower variance)."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """fixed keeps `coef`; adaptive steers it so that the KL per response meets `target`."""
    target: Annotated[float, Field(gt=0)] = 6.0
    """Adaptive only: wanted KL from the reference, nats per response."""
    horizon: Positive = 10_000
    """Adaptive only: responses over which the coefficient adapts; smaller reacts faster."""


class OptimizerConfig(Section):
    """AdamW for policy and critic."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of the language model's weights."""
    value_head_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of the value head, which starts at zero and may learn faster."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of a separate critic's network; unused with a shared trunk."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to zero at num_steps along a line or a half cosine."""
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


class LearnerConfig(Placed):
    """The learner group: policy and critic in training."""

    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores each rank reserves in Ray's bookkeeping."""
    ranks: Annotated[int, Field(ge=1, le=1)] = 1
    """Processes that train in step."""
    critic: Literal["shared", "separate"] = "shared"
    """shared: a value head on the policy's trunk, one forward pass; separate: its own network from the same
    checkpoint, twice the memory and compute, and value loss that cannot disturb the policy."""
    critic_warmup_steps: NonNegative = 0
    """First steps that train the critic alone."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Matrix products in forward and backward; weights, losses and optimizer state are float32 either way."""
    micro_batch_tokens: Positive = 2048
    """Tokens of one forward and backward, padding included; bounds activation memory, cannot change the gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a quarter slower, far less memory."""
    timeout_s: Seconds = 1800
    """Longest update, seconds."""


class EvaluationConfig(Section):
    """Held-out evaluation before and after training."""

    prompts: NonNegative = 256
    """How many held-out prompts are asked; 0 turns evaluation off."""
    every: NonNegative = 0
    """Also evaluate every so many steps; 0: only before and after."""
    pass_source: str | None = None
    """A response passes (pass@1) when this reward source scores it at least `pass_score`; left out: the first one."""
    pass_score: float = 0.5
    """See pass_source."""


class CheckpointConfig(Section):
    """Learner state on disk."""

    every: Positive = 20
    """Steps between checkpoints; the journal covers what lies between, so this trades disk for time to resume."""
    keep: Positive = 2
    """Newest checkpoints kept."""


class RayConfig(Section):
    """The cluster."""

    address: str | None = None
    """Address of a running cluster; left out: one is started on this machine, on loopback, and stopped at the end."""
    object_store_mib: Positive = 1024
    """Shared memory of a cluster started here, MiB: holds two versions of the weights and a batch or two."""
    startup_timeout_s: Seconds = 300
    """Longest start of any role, model loading included, seconds."""
    dashboard: bool = True
    """Start Ray's dashboard with a cluster started here."""


class Config(Section):
    """A whole run."""

    seed: NonNegative = 0
    """Seeds prompts, sampling and minibatches; on one machine with one set of threads a seed gives one result."""
    num_steps: Positive = 100
    """Learner updates, each on rollouts_per_step rollouts."""
    rollouts_per_step: Positive = 64
    """Rollouts in a batch; more steadies the gradient and takes longer."""
    max_staleness: Annotated[int, Field(ge=0, le=0)] = 0
    """How many versions old the weights behind a trained token may be; 0 is strictly on-policy."""
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

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.prompts.max_tokens + self.sampling.max_new_tokens

    def to_toml(self) -> str:
        """The resolved tree as `load_config` reads it back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    @model_validator(mode="after")
    def check_rules(self) -> Config:
        """Rules across fields; each message says rule, values and remedy."""
        if faults := list(self._broken_rules()):
            raise ValueError("\n  ".join(faults))
        return self

    def _broken_rules(self) -> Iterator[str]:
        batch, sampling, steps = self.rollouts_per_step, self.sampling, self.num_steps
        for key, parts in (
            ("ppo.minibatches", self.ppo.minibatches),
            ("prompts.rollouts_per_prompt", self.prompts.rollouts_per_prompt),
        ):
            if batch % parts:
                nearest = ", ".join(str(n) for n in (batch // parts * parts, batch // parts * parts + parts) if n)
                yield f"rollouts_per_step ({batch}) must divide into {key} ({parts}); nearest: {nearest}"
        if sampling.min_new_tokens > sampling.max_new_tokens:
            yield (
                f"sampling.min_new_tokens ({sampling.min_new_tokens}) must not exceed sampling.max_new_tokens "
                f"({sampling.max_new_tokens}); lower the first or raise the second"
            )
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
        if self.kl.controller == "adaptive" and self.kl.horizon < batch:
            yield (
                f"kl.horizon ({self.kl.horizon}) must be at least rollouts_per_step ({batch}), or the controller "
                "overshoots; raise it"
            )
        for key, budget in (
            ("learner.micro_batch_tokens", self.learner.micro_batch_tokens),
            ("reference.max_batch_tokens", self.reference.max_batch_tokens),
        ):
            if budget < self.max_sequence_tokens:
                yield (
                    f"{key} ({budget}) must hold the longest sequence, prompts.max_tokens + sampling.max_new_tokens "
                    f"= {self.max_sequence_tokens}; raise the first or lower one of the others"
                )
        names = [source.name for source in self.reward.sources]
        if not names:
            yield "reward.sources is empty, so nothing could be learned; name at least one [[reward.sources]]"
        for source in self.reward.sources:
            if (source.function is None) == (not source.urls):
                yield f"reward source {source.name} must have either function or urls; give it one of the two"
            if wrong := [url for url in source.urls if not url.startswith(("http://", "https://"))]:
                yield f"reward source {source.name}: {wrong[0]!r} in urls must begin with http:// or https://"
        if len(set(names)) < len(names):
            yield f"reward.sources must have different names, not {names}; rename one"
        if self.evaluation.pass_source not in (None, *names):
            yield f"evaluation.pass_source ({self.evaluation.pass_source}) must be one of {names}"


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The tree in `path` with `key=value` overrides applied. Raises UserError with every fault found."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; shipped ones lie in deploy/configs/") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise UserError(f"config {path} has {error.error_count()} fault(s):\n{faults}") from None


def describe(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every field, depth first, in the order of the file."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe(kind, f"{prefix}{name}.")
            continue
        yield prefix + name, _type_name(field), _default(field), " ".join((field.description or "").split())
        if name == "sources":
            yield from describe(RewardSource, f"{prefix}{name}[].")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must read key=value, such as ppo.clip_eps=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, leaf = key.split(".")
    for name in sections:
        if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):  # reward.sources.0.weight
            tree = tree[int(name)]
        elif isinstance(tree, dict):
            tree = tree.setdefault(name, {})
        else:
            break
    if not isinstance(tree, dict):
        raise UserError(f"override {override!r}: {leaf} would be set inside a value that is no section of settings")
    tree[leaf] = value


def _explain(fault: Any) -> str:
    """One pydantic error in the words of the file: key, what is wrong, remedy."""
    key = ".".join(str(part) for part in fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            *parents, leaf = (part for part in fault["loc"])
            close = get_close_matches(str(leaf), _names_at(parents), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(_names_at(parents))}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: required and missing"
        case "value_error":
            return str(fault["ctx"]["error"]) if not key else f"{key}: {fault['ctx']['error']}"
        case _:
            return f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _names_at(parents: list[Any]) -> list[str]:
    section: type[Section] = Config
    for part in parents:
        if isinstance(part, int):
            section = RewardSource
        elif isinstance(kind := section.model_fields[part].annotation, type) and issubclass(kind, Section):
            section = kind
    return list(section.model_fields)


def _type_name(field: FieldInfo) -> str:
    bounds = [
        f"{symbol} {value}"
        for item in field.metadata
        for name, symbol in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if (value := getattr(item, name, None)) is not None
    ]
    kind = field.annotation
    if getattr(kind, "__origin__", None) is tuple:
        text = "list"
    elif getattr(kind, "__origin__", None) is Literal:
        text = " | ".join(kind.__args__)  # type: ignore[union-attr]
    elif isinstance(kind, type) and not hasattr(kind, "__origin__"):
        text = {"int": "integer", "float": "number", "str": "text", "bool": "true | false"}.get(
            kind.__name__, kind.__name__
        )
    else:
        args = [a for a in getattr(kind, "__args__", ()) if a is not type(None)]
        inner = getattr(args[0], "__origin__", args[0]) if args else kind
        text = {int: "integer", float: "number", str: "text"}.get(inner, "list")  # type: ignore[arg-type]
    return " ".join([text, *bounds])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
