"""How much of PyTorch's speed does a user get? `Learner.update` against a bare training loop over the same tokens.

learner_vs_bare: tokens/s of forward, backward and optimizer in `Learner.update`, over those of the bare loop. One epoch
of one minibatch, policy and shared critic, bf16, the default micro-batches of 512 tokens. The batch has 48 rollouts of
16 to 128 tokens, half of them prompt: 3,456 tokens in all.

The bare loop (tests/bench/bare.py) trains on the same token ids, cut into 54 rows of 64: the same number of tokens and
log-probabilities. Its attention is `eager`, which is faster than sdpa on CPUs. Both alternate in one process with the
malloc settings of Ratchet's workers; the median of the rounds' ratios counts.

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

from learner.ppo.learner import Learner
from tests.bench.bare import bare_for, count
from tests.bench.batch import MODEL, batch, config
from tests.bench.fresh import call
from tests.bench.results import Result

THREADS, ROUNDS, EPOCHS = 2, 3, 4
WHOLE = 4096  # tokens of a micro-batch that holds the batch


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
