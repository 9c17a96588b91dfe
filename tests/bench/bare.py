"""A bare PyTorch training loop: forward, backward and AdamW on rows of equal length.

It has no padding, no masks and no losses to shape. It uses the ordinary output embedding, float32 log-softmax, a value
head, gradient clipping, fused AdamW, bf16 autocast and equal micro-batches.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common.model.files import resolve_model

ROW = 64  # tokens of a row
CPU = torch.device("cpu")


class Bare:
    def __init__(
        self,
        model: str,
        ids: Tensor,
        *,
        chosen: int,
        micro_batch_tokens: int,
        device: torch.device = CPU,
        attention: str = "eager",
    ) -> None:
        """ids [N, row]; log-probabilities of each row's last `chosen` tokens."""
        self.micro_batches = ids.to(device).split(micro_batch_tokens // ids.shape[1])
        self.chosen = chosen
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(model), dtype=torch.float32, attn_implementation=attention
        )
        self.policy = loaded.to(device).eval()
        self.value_head = nn.Linear(self.policy.config.hidden_size, 1, device=device)
        self.parameters = [*self.policy.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def loss(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            hidden = self.policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
            states = hidden[:, -self.chosen - 1 : -1]
            logits = self.policy.lm_head(states)
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, -self.chosen :, None])
        return self.value_head(states.float()).sum() - logprobs.sum()

    def step(self) -> None:
        for ids in self.micro_batches:
            self.loss(ids).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(self) -> None:
        for ids in self.micro_batches:
            self.loss(ids)


def bare_for(model: str, table: pa.Table, micro_batch_tokens: int, *, row: int = ROW, **how: Any) -> Bare:
    """The loop over the table's tokens: as many, and as many log-probabilities."""
    prompts, responses = table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist()
    ids = torch.tensor([token for pair in zip(prompts, responses) for half in pair for token in half])
    rows = ids.view(-1, row)
    chosen, rest = divmod(count(table, "response_ids"), len(rows))
    assert rest == 0, "the response tokens must divide into the rows"
    return Bare(model, rows, chosen=chosen, micro_batch_tokens=micro_batch_tokens, **how)


def count(table: pa.Table, *columns: str) -> int:
    return sum(len(table[column].combine_chunks().flatten()) for column in columns)
