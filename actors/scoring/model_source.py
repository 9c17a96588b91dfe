"""A reward model as a reward source: conversations to scores, batched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.config.sources import ModelSourceConfig
from common.data.dialogues import dialogue_ids
from common.model.batcher import Batcher
from common.model.files import find_device, load_tokenizer, resolve_model
from common.model.masking import round_up
from common.model.packing import ROW_MULTIPLE
from common.model.reward_head import content_hash, load_reward_model, read_scale, sequence_scores
from common.types import Raw, RewardInput


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, answer: RewardInput, *, chat: bool | None, pad_id: int | None
) -> list[int]:
    """Messages through the reward model's own chat template, text as it was trained on text. chat: what it was trained
    on; None, for a model from elsewhere: whichever the answer and the tokenizer have."""
    if chat is None:
        chat = tokenizer.chat_template is not None and answer.messages is not None
    prompt = answer.messages if chat and answer.messages is not None else answer.prompt
    return dialogue_ids(tokenizer, prompt, answer.response, chat=chat, pad_id=pad_id)


class RewardModelSource:
    """Scores in deviations about the reference policy's own responses, where the model's directory says what those
    scored. The origin of a score is the model's name and content hash."""

    def __init__(self, cfg: ModelSourceConfig, *, gpus: float) -> None:
        directory = resolve_model(cfg.model, trust_remote_code=cfg.trust_remote_code)
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

    async def __call__(self, answer: RewardInput) -> Raw:
        return Raw(await self._batcher.submit(self.token_ids(answer)), self._origin)

    def token_ids(self, answer: RewardInput) -> list[int]:
        """Token ids that the model reads. Of an input that is too long, the end."""
        pad_id = self._model.config.pad_token_id
        return answer_ids(self._tokenizer, answer, chat=self._scale.chat, pad_id=pad_id)[-self._max_tokens :]

    @torch.inference_mode()
    def forward(self, sequences: Sequence[list[int]]) -> list[float]:
        """One padded forward pass; each score is bit for bit the same in any company."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        width = round_up(int(lengths.max()), ROW_MULTIPLE)
        input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        for row, ids in zip(input_ids, sequences, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        device = self._model.device
        scores = sequence_scores(self._model, input_ids.to(device), lengths.to(device)).double().cpu()
        return ((scores - self._scale.mean) / self._scale.deviation).tolist()
