"""The sizes of a run's models for a plan: from their configs alone, without weights, tokenizer or prompts.

Runs in the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from actors.scoring.kinds import kind_of
from common.config.base import ModelConfig
from common.config.sources import ModelSourceConfig, RewardSource
from common.model.files import resolve_model
from common.model.size import ModelSize, model_size
from deploy.plan.needs import ScoringModel


def policy_size(cfg: ModelConfig, setting: str = "model.path") -> ModelSize:
    """The size of the model that is trained. Raises UserError if its config cannot be read."""
    return model_size(resolve_model(cfg.path, setting, trust_remote_code=cfg.trust_remote_code, weights=False), setting)


def reward_model_sizes(sources: Iterable[RewardSource]) -> Sequence[ModelSize]:
    """The sizes of the models that reward sources load."""
    sizes = [kind_of(source).model_size(source) for source in sources]
    return [size for size in sizes if size is not None]


def scoring_models(sources: Iterable[RewardSource]) -> Sequence[ScoringModel]:
    """The sources that load a model, each with the size of its model."""
    sizes = [(cast(ModelSourceConfig, source), kind_of(source).model_size(source)) for source in sources]
    return [(source, size) for source, size in sizes if size is not None]
