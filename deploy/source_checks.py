"""Checks all reward sources of a run before anything starts. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from actors.scoring.kinds import kind_of, read_secrets
from common.config.actors import SourcesConfig
from common.config.sources import RewardSource
from common.data.prompt_records import PromptRecord
from common.reward_input import RewardInput
from deploy.plan.models import scoring_models
from deploy.plan.needs import ScoringModel
from deploy.screen.console import complain

MADE_UP = "(A made-up response, to try the reward function.)"


def check_sources(sources: Iterable[RewardSource], *, chat: bool) -> Sequence[ScoringModel]:
    """Raises UserError for a source that cannot be used, such as a model that is not there or a service whose key is
    not in the environment. `chat`: prompts are chat messages. Returns the sources that load a model, with its size."""
    sources = list(sources)
    read_secrets(sources)
    for source in sources:
        kind_of(source).check(source, chat)
    return scoring_models(sources)


def try_sources(
    service: SourcesConfig,
    sources: Iterable[RewardSource],
    record: PromptRecord,
    tokenizer: PreTrainedTokenizerBase,
    *,
    episode: bool = False,
) -> None:
    """Tries every source on the first prompt and a made-up response, without asking any service. `episode`: the run has
    an environment, so the answer has a turn. Raises UserError for a source that fails on every answer, and prints a
    warning for one that may fail on this answer alone."""
    response_ids = tokenizer(MADE_UP, add_special_tokens=False)["input_ids"]
    answer = RewardInput(
        prompt=record.text,
        response=MADE_UP,
        response_tokens=len(response_ids),
        finish_reason="stop",
        fields=record.fields,
        messages=record.messages,
        raw_response=MADE_UP,
        prompt_ids=record.token_ids.tolist(),
        response_ids=response_ids,
        turns=({"text": MADE_UP, "observation": [], "reward": 0.0, "info": {}},) if episode else (),
    )
    for source in sources:
        if warning := kind_of(source).try_once(source, service, answer):
            complain(f"warning: {warning}")
