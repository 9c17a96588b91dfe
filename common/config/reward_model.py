"""Settings of the commands that make reward models: `PairSamplingConfig` (sample-pairs) and `RewardTrainingConfig`
(train-reward). Runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from common.config.actors import (
    GeneratorsConfig,
    PromptFormat,
    SamplingConfig,
    SourcesConfig,
    TextFormat,
    broken_sampling_rules,
)
from common.config.base import (
    LoggingConfig,
    MayChange,
    ModelConfig,
    NonNegative,
    Positive,
    RayConfig,
    Root,
    Section,
)
from common.config.sources import broken_environment_source_rules, broken_reasoning_gym_rules, broken_source_rules
from common.config.training import AdamWConfig, CheckpointConfig, TrainerConfig, broken_trainer_rules


class PairPromptsConfig(PromptFormat):
    """The prompts of the sampled pairs."""

    source: str
    """Prompts, in any form that prompts.train of PPO may have, such as a .jsonl or .parquet file, a pattern, a function
    `module:function` or "hf:OWNER/NAME". A record has a `prompt`: text or chat messages. docs/data.md has all forms."""
    pairs: Positive = 512
    """Pairs to sample, one for each prompt in seeded order; the order repeats when the prompts are used up."""


class LabellerConfig(SourcesConfig):
    """The reward service that labels pairs: the response with the higher total score is chosen."""

    min_gap: Annotated[float, Field(ge=0)] = 0
    """Leave out pairs whose scores differ by no more than this: they express no preference."""


class PairSamplingConfig(Root):
    """Sampling of preference pairs from a policy, and their labels."""

    seed: NonNegative = 0
    """Seeds prompts and sampling."""
    model: ModelConfig = ModelConfig()
    prompts: PairPromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    generators: MayChange[GeneratorsConfig] = GeneratorsConfig()
    labeller: LabellerConfig
    ray: MayChange[RayConfig] = RayConfig()

    max_response_setting: ClassVar[str] = "sampling.max_new_tokens"

    @property
    def max_response_tokens(self) -> int:
        """Longest response, which max_response_setting bounds."""
        return self.sampling.max_new_tokens

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.prompts.max_tokens + self.max_response_tokens

    def _broken_rules(self) -> Iterator[str]:
        yield from broken_sampling_rules(self.sampling)
        yield from broken_source_rules("labeller.sources", self.labeller.sources)
        yield from broken_environment_source_rules(
            self.labeller.sources, remedy="pairs have one turn: use another kind of source"
        )
        yield from broken_reasoning_gym_rules(
            self.labeller.sources,
            {"prompts.source": self.prompts.source},
            key="labeller.isolation",
            isolation=self.labeller.isolation,
        )


class PairColumns(Section):
    """Names of the columns that records of pairs have."""

    prompt: str = "prompt"
    """Column with the prompt, if there is one: text or chat messages."""
    chosen: str = "chosen"
    """Column with the preferred response, or the whole dialogue that ends in it."""
    rejected: str = "rejected"
    """Column with the other response, or the whole dialogue that ends in it."""
    margin: str = "margin"
    """Column with a number, if there is one: how much better the preferred response is (loss.margin_coef)."""


class PreferencesConfig(TextFormat):
    """Preference pairs: their files, and how they become token sequences."""

    section: ClassVar[str] = "data"
    train: str
    """Training pairs: a .jsonl, .json, .csv (each also .gz) or .parquet file, a pattern such as "data/*.parquet", a
    Python function `module:function` that takes a seed and returns records, or a Hugging Face data set ("DIRECTORY" or
    "hf:OWNER/NAME?config=main&split=train"). A record has `chosen` and `rejected` (text
    or chat messages: responses to its `prompt`, or whole dialogues) and may have `margin`."""
    heldout: str | None = None
    """Pairs for evaluation, in the same forms; pairs whose prompt is also in `train` are left out and counted."""
    heldout_pairs: NonNegative = 0
    """Without `heldout`: take this many pairs from `train` for evaluation, all pairs of a prompt together."""
    format: Literal["plain", "chat"] = "plain"
    """plain: prompt and response are joined unchanged, and the end token is added. chat: both go through the
    tokenizer's chat template: text as a single message, and dialogues written as in HH-RLHF (Human: ... Assistant: ...)
    as their messages."""
    max_tokens: Positive = 512
    """Longest prompt and response together, in tokens."""
    overlong: Literal["drop", "cut_start", "cut_end"] = "cut_start"
    """Handling of a pair that has a longer sequence. drop: leave it out; cut_start: remove the beginning of its
    prompt; cut_end: remove the ends of its responses. Such pairs are counted and reported."""
    columns: PairColumns = PairColumns()


class PreferenceLossConfig(Section):
    """-log sigmoid(r_chosen - r_rejected - margin) + centre_coef (r_chosen + r_rejected)^2."""

    margin_coef: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies each record's `margin` (Llama 2, arXiv:2307.09288, eq. 2); records without one have 0."""
    centre_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the term that pulls scores towards 0 (Eisenstein et al. 2023, arXiv:2312.09244); pairs alone determine
    scores only up to a constant. 0.01 is common."""


class RewardOptimizerConfig(AdamWConfig):
    """AdamW for the reward model."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of the language model's weights."""
    head_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the scalar head, which starts at zero."""


class RewardScaleConfig(Section):
    """The scale of scores: the reference policy's own responses get mean 0 and standard deviation 1."""

    policy: str | None = None
    """The reference policy, which PPO will start from; left out: `model.path`."""
    responses: NonNegative = 256
    """Responses sampled from it after training, to prompts of the pairs. Give [sampling] the settings that PPO will
    use. 0: scores keep the scale of the reward head."""


class RewardTrainingConfig(Root):
    """Training of a reward model from preference pairs."""

    seed: NonNegative = 0
    """Seeds the split and the order of the pairs."""
    epochs: MayChange[Positive] = 1
    """Passes over the pairs; reward models usually overfit after one or two."""
    pairs_per_step: Positive = 64
    """Pairs in the batch of each optimizer step."""
    model: ModelConfig = ModelConfig()
    data: PreferencesConfig
    loss: PreferenceLossConfig = PreferenceLossConfig()
    optimizer: RewardOptimizerConfig = RewardOptimizerConfig()
    learner: TrainerConfig = TrainerConfig()
    checkpoint: MayChange[CheckpointConfig] = CheckpointConfig()
    scale: MayChange[RewardScaleConfig] = RewardScaleConfig()
    sampling: MayChange[SamplingConfig] = SamplingConfig()
    generators: MayChange[GeneratorsConfig] = GeneratorsConfig()
    ray: MayChange[RayConfig] = RayConfig()
    logging: MayChange[LoggingConfig] = LoggingConfig()

    def _broken_rules(self) -> Iterator[str]:
        yield from broken_sampling_rules(self.sampling)
        yield from broken_trainer_rules(self.learner, self.pairs_per_step, "pairs_per_step")
        if self.scale.responses == 1:
            yield "scale.responses (1) must be 0 or at least 2: one response has no standard deviation"
        if self.data.heldout is not None and self.data.heldout_pairs:
            yield "data.heldout and data.heldout_pairs both name held-out pairs; give one of the two"
