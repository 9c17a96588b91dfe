"""How much of PyTorch's speed does a user get? `Learner.update` against a bare training loop over the same tokens.

learner_vs_bare: tokens/s of forward, backward and optimizer in `Learner.update`, over those of the bare loop. One epoch
of one minibatch, policy and shared critic, bf16, the default micro-batches of 512 tokens. The batch has 48 rollouts of
16 to 128 tokens, half of them prompt: 3,456 tokens in all.

The bare loop trains on the same token ids, cut into 54 rows of 64. It has no padding, no masks and no losses to shape,
but the same number of tokens and log-probabilities. It uses the ordinary output embedding, float32 log-softmax, a value
head, gradient clipping, fused AdamW, bf16 autocast and equal micro-batches. Its attention is `eager`, which is faster
than sdpa on CPUs. Both alternate in one process with the malloc settings of Ratchet's workers; the median of the
rounds' ratios counts.

With several micro-batches an update first makes a pass without gradients, because whitened advantages need all values.
The parts have three more ratios: of the whole update with that pass; of the whole update where one micro-batch holds
the batch, so that the pass is not needed; and of four epochs, against a loop that makes such a pass too.

Ratchet's loop loses time to memory. Its backward pass recomputes attention's probabilities, logits and bf16 copies of
weights. Attention pads each sequence to a multiple of 32 and processes all sequences of one padded length together, so
micro-batches take sequences of similar length. Logits come in tiles of 512 tokens by 2,048 of the vocabulary, which
stay in the cache between their matrix product and the softmax.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common.model.files import resolve_model
from learner.ppo.learner import Learner
from tests.bench.batch import MODEL, batch, config
from tests.bench.fresh import call
from tests.bench.results import Result

THREADS, ROUNDS, EPOCHS = 2, 3, 4
WHOLE = 4096  # tokens of a micro-batch that holds the batch
ROW = 64  # tokens of a row in the bare loop


class Bare:
    """Forward, backward and AdamW on rows of equal length."""

    def __init__(self, model: str, ids: Tensor, *, chosen: int, micro_batch_tokens: int) -> None:
        """ids [N, ROW]; log-probabilities of each row's last `chosen` tokens."""
        self.micro_batches = ids.split(micro_batch_tokens // ROW)
        self.chosen = chosen
        self.policy = AutoModelForCausalLM.from_pretrained(
            resolve_model(model), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.value_head = nn.Linear(self.policy.config.hidden_size, 1)
        self.parameters = [*self.policy.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def loss(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
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


def bare_for(model: str, table: pa.Table, micro_batch_tokens: int) -> Bare:
    """The loop over the table's tokens: as many, and as many log-probabilities."""
    prompts, responses = table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist()
    ids = torch.tensor([token for pair in zip(prompts, responses) for half in pair for token in half])
    rows = ids.view(-1, ROW)
    chosen, rest = divmod(count(table, "response_ids"), len(rows))
    assert rest == 0, "the response tokens must divide into the rows"
    return Bare(model, rows, chosen=chosen, micro_batch_tokens=micro_batch_tokens)


def compare(model: str, threads: int, rounds: int, budget: int | None) -> dict[str, float]:
    """Medians of the rounds, all in this process, with micro-batches of `budget` tokens."""
    section = {"threads": threads} | ({"micro_batch_tokens": budget} if budget else {})
    cfg, table = config(model, ppo={"ppo_epochs": 1}, learner=section), batch(model)
    learner = Learner(cfg)
    bare = bare_for(model, table, min(cfg.learner.token_budget, count(table, "prompt_ids", "response_ids")))
    learner.update(table)
    bare.step()
    laps = []
    for _ in range(rounds):
        update_s, stats = timed(lambda: learner.update(table))
        bare_s, _ = timed(bare.step)
        forward_s, _ = timed(bare.forward)
        phases = {key.removeprefix("time/"): value for key, value in stats.items() if key.startswith("time/")}
        seconds = {"update_s": update_s, "bare_s": bare_s, "bare_forward_s": forward_s}
        ratios = {"ratio": bare_s / phases["optimise_s"], "update_ratio": bare_s / update_s}
        laps.append(ratios | seconds | phases)
    medians = {key: statistics.median(lap[key] for lap in laps) for key in laps[0]}
    return medians | {"tokens": count(table, "prompt_ids", "response_ids")}


def several_epochs(model: str, threads: int) -> float:
    """Seconds of an update of EPOCHS epochs, after one on few rollouts."""
    learner = Learner(config(model, ppo={"ppo_epochs": EPOCHS}, learner={"threads": threads}))
    table = batch(model)
    learner.update(table.slice(0, 8))
    return timed(lambda: learner.update(table))[0]


def count(table: pa.Table, *columns: str) -> int:
    return sum(len(table[column].combine_chunks().flatten()) for column in columns)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


def measure() -> dict[str, Result]:
    run: dict[str, Any] = {"threads": THREADS, "worker": config(MODEL).learner}
    found = call("tests.bench.learner:compare", MODEL, THREADS, ROUNDS, None, **run)
    together = call("tests.bench.learner:compare", MODEL, THREADS, ROUNDS, WHOLE, **run)
    four_epochs_s = call("tests.bench.learner:several_epochs", MODEL, THREADS, **run)
    tokens, bare_s = found["tokens"], found["bare_s"]
    parts = {
        "learner_tokens_per_s": tokens / found["optimise_s"],
        "bare_tokens_per_s": tokens / bare_s,
        **found,
        **{f"one_micro_batch_{key}": together[key] for key in ("update_ratio", "update_s", "bare_s")},
        "four_epochs_s": four_epochs_s,
        "four_epochs_tokens_per_s": EPOCHS * tokens / four_epochs_s,
        # Against a loop that makes one pass without gradients first, too.
        "four_epochs_ratio": (found["bare_forward_s"] + EPOCHS * bare_s) / four_epochs_s,
    }
    return {"learner_vs_bare": Result(found["ratio"], ">= 0.9", parts)}
