"""A reward model as a reward source: scores prompts with their responses, in batches. Runs in each reward replica, and
in the driver for the checks before a run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.config.actors import SourcesConfig
from common.config.sources import ModelSourceConfig
from common.data.dialogues import dialogue_ids
from common.data.prompt_tokens import check_embedded
from common.errors import UserError
from common.model.batcher import Batcher
from common.model.files import find_device, load_tokenizer, resolve_model
from common.model.identity import model_digest
from common.model.masking import round_up
from common.model.packing import ROW_MULTIPLE
from common.model.reward_head import content_hash, load_reward_model, read_scale, reward_model_size
from common.model.reward_scores import sequence_scores
from common.model.size import ModelSize, model_size
from common.types import RawScore, RewardInput


class RewardModelSource:
    """A raw score is `(output - mean) / deviation`. The model's directory has these two numbers of the outputs for the
    reference policy's responses. Without them the raw score is the output. Its origin is the model's name and content
    hash."""

    def __init__(self, cfg: ModelSourceConfig, *, gpus: float) -> None:
        directory = _directory(cfg)
        device = find_device(gpus)
        self._model: PreTrainedModel = load_reward_model(directory, dtype=getattr(torch, cfg.dtype), device=device)
        self._tokenizer = load_tokenizer(directory)
        self._scale = read_scale(directory)
        self._origin = f"{cfg.model}@{content_hash(directory)}"
        context = getattr(self._model.config, "max_position_embeddings", None) or cfg.max_tokens
        self._max_tokens = min(cfg.max_tokens, context)
        self._batcher: Batcher[list[int], float] = Batcher(
            lambda items: asyncio.to_thread(self.forward, items),
            num_tokens=lambda ids: round_up(len(ids), ROW_MULTIPLE),
            max_tokens=cfg.max_batch_tokens,
            window_s=cfg.batch_window_ms / 1000,
        )

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The model's score. Waits for a forward pass with room."""
        return RawScore(await self._batcher.submit(self.token_ids(answer)), self._origin)

    def token_ids(self, answer: RewardInput) -> list[int]:
        """Token ids that the model reads. An input that is too long is cut at its beginning."""
        pad_id = self._model.config.pad_token_id
        return answer_ids(self._tokenizer, answer, chat=self._scale.chat, pad_id=pad_id)[-self._max_tokens :]

    @torch.inference_mode()
    def forward(self, sequences: Sequence[list[int]]) -> list[float]:
        """Scores of token sequences, in one padded forward pass. On CPU the other rows of the batch do not change the
        bits of a score."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        width = round_up(int(lengths.max()), ROW_MULTIPLE)
        input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        for row, ids in zip(input_ids, sequences, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        device = self._model.device
        scores = sequence_scores(self._model, input_ids.to(device), lengths.to(device)).double().cpu()
        return ((scores - self._scale.mean) / self._scale.deviation).tolist()


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, answer: RewardInput, *, chat: bool | None, pad_id: int | None
) -> list[int]:
    """Token ids of prompt and response. With `chat` they go through the reward model's own chat template, else they are
    plain text. None (the model's directory does not say): as chat if the prompt has messages and the tokenizer has a
    template."""
    if chat is None:
        chat = tokenizer.chat_template is not None and answer.messages is not None
    prompt = answer.messages if chat and answer.messages is not None else answer.prompt
    return dialogue_ids(tokenizer, prompt, answer.response, chat=chat, pad_id=pad_id)


# Before a run


def _setting(cfg: ModelSourceConfig) -> str:
    return f"reward source {cfg.name}"


def _directory(cfg: ModelSourceConfig) -> Path:
    return resolve_model(cfg.model, _setting(cfg), trust_remote_code=cfg.trust_remote_code)


def check_reward_model(cfg: ModelSourceConfig, chat: bool) -> None:
    """Raises UserError for a model that cannot be served, or that reads plain text while prompts are chat messages."""
    directory = _directory(cfg)
    reward_model_size(directory, _setting(cfg))
    if chat and read_scale(directory).chat is False:
        raise UserError(
            f"{_setting(cfg)} ({cfg.model}) was trained on plain text, but prompts.format is chat; train it with "
            'data.format = "chat", or set prompts.format = "plain"'
        )


def size_of_reward_model(cfg: ModelSourceConfig) -> ModelSize:
    """The model's sizes, for the estimate of memory. Reads its config alone."""
    setting = _setting(cfg)
    directory = resolve_model(cfg.model, setting, trust_remote_code=cfg.trust_remote_code, weights=False)
    return model_size(directory, setting)


def try_reading(cfg: ModelSourceConfig, service: SourcesConfig, answer: RewardInput) -> str:
    """Raises UserError if the model's tokenizer or chat template cannot read the answer, or takes too long."""
    directory, setting = _directory(cfg), f"{_setting(cfg)} ({cfg.model})"
    tokenizer = load_tokenizer(directory, _setting(cfg))
    try:
        ids = answer_ids(tokenizer, answer, chat=read_scale(directory).chat, pad_id=None)
    except Exception as error:
        raise UserError(
            f"{setting}: its tokenizer or chat template refuses the first prompt: {error}; give the model's tokenizer "
            "a template that can read it, or use another model"
        ) from error
    check_embedded(f"{setting}, tried on the first prompt", ids, tokenizer, model_size(directory).vocabulary)
    return ""


def reward_model_digest(cfg: ModelSourceConfig) -> str:
    """SHA-256 over the model's files."""
    return model_digest(_directory(cfg))
