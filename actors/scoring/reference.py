"""The reference policy: log-probabilities of rollouts under the frozen starting weights. Runs in each reference
replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from common.config.actors import ReferenceConfig
from common.metrics import meters
from common.model.batcher import Batcher
from common.model.files import find_device, load_policy, resolve_model
from common.model.masking import round_up
from common.model.packing import ROW_MULTIPLE, Sequences, response_logprobs
from common.types import Rollout


class ReferencePolicy:
    """Per-token log-probabilities at the sampling temperature, so that they are comparable with the policy's own."""

    def __init__(
        self,
        name: str,
        cfg: ReferenceConfig,
        *,
        model: str | PreTrainedModel,
        temperature: float,
        trust_remote_code: bool = False,
    ) -> None:
        torch.set_num_threads(cfg.threads)
        self._name = name
        self._temperature = temperature
        self._device = find_device(cfg.gpus)
        if isinstance(model, str):
            directory = resolve_model(model, trust_remote_code=trust_remote_code)
            model = load_policy(directory, dtype=getattr(torch, cfg.dtype), device=self._device)
        self._model = model
        meters.count("ratchet_scored_rollouts_total", 0)
        self._batcher: Batcher[Rollout, np.ndarray] = Batcher(
            lambda items: asyncio.to_thread(self.forward, items),
            num_tokens=lambda rollout: round_up(rollout.num_tokens, ROW_MULTIPLE),
            max_tokens=cfg.max_batch_tokens,
            window_s=cfg.batch_window_ms / 1000,
        )

    async def ready(self) -> str:
        """Returns the replica's name; the model is loaded."""
        return self._name

    async def logprobs(self, rollout: Rollout) -> tuple[np.ndarray, bool]:
        """Log-probabilities of the response, float32 [R] in nats, and True if all are finite. Ray keeps the array in
        this process until it is fetched."""
        logprobs = await self._batcher.submit(rollout)
        meters.count("ratchet_scored_rollouts_total")
        return logprobs, bool(np.isfinite(logprobs).all())

    @torch.inference_mode()
    def forward(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Log-probabilities of each response, float32 [R], in one forward pass. On CPU the other rows of the batch do
        not change their bits, because padding gives each sequence a multiple of ROW_MULTIPLE tokens."""
        prompts = [rollout.prompt.token_ids for rollout in rollouts]
        responses = [np.pad(r.response_ids, (0, -r.num_tokens % ROW_MULTIPLE)) for r in rollouts]
        masks = [np.pad(r.response_mask, (0, -r.num_tokens % ROW_MULTIPLE), constant_values=True) for r in rollouts]
        starts = [rollout.context_starts for rollout in rollouts]
        sequences = Sequences.pack(prompts, responses, masks, starts).to(self._device)
        logprobs = response_logprobs(self._model, sequences, temperature=self._temperature)
        return [row[: len(r.rollout_logprobs)] for row, r in zip(logprobs.cpu().numpy(), rollouts, strict=True)]
