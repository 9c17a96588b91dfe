"""What does an update save without a pass for old log-probabilities? `ppo.policy_loss = "mask"` against `"clip"`.

mask_vs_clip: CPU seconds of `Learner.update` with "mask", divided by those with "clip", in a run without a critic and
with one epoch of one minibatch. The parts have the same ratio for a shared trunk, whose pass leaves out the output
embedding only; for a separate critic, whose pass leaves out the policy; and all of them with two epochs, the default.

SmolLM2-135M, bf16, micro-batches of 512 tokens, the batch of tests/bench/batch.py (48 rollouts of 16 to 128 tokens,
half of them prompt). One learner takes both settings in turn, so both have the same weights in the same memory; the
median of the rounds' ratios counts. CPU seconds of one thread: other programs disturb them less than the clock.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from learner.ppo.learner import Learner
from tests.bench.batch import MODEL, batch, config
from tests.bench.fresh import call
from tests.bench.results import Result

THREADS, ROUNDS = 1, 5
CRITICS: dict[str, dict[str, dict[str, Any]]] = {
    "no_critic": {"ppo": {"advantages": "returns"}},
    "shared": {},
    "separate": {"learner": {"critic": "separate"}},
}


def compare(model: str, critic: str, epochs: int, threads: int, rounds: int) -> dict[str, float]:
    """Medians of the rounds: CPU seconds of an update with each loss, and their ratio. All in this process."""
    sections = CRITICS[critic]
    configs = {
        loss: config(
            model,
            ppo={**sections.get("ppo", {}), "ppo_epochs": epochs, "policy_loss": loss},
            learner={**sections.get("learner", {}), "threads": threads},
        )
        for loss in ("clip", "mask")
    }
    learner, table, laps = Learner(configs["clip"]), batch(model), []
    learner.update(table)
    for _ in range(rounds):
        seconds = {}
        for loss, cfg in configs.items():
            learner.reconfigure(cfg)
            began = time.process_time()
            learner.update(table)
            seconds[loss] = time.process_time() - began
        laps.append({"ratio": seconds["mask"] / seconds["clip"], **{f"{loss}_s": s for loss, s in seconds.items()}})
    return {key: statistics.median(lap[key] for lap in laps) for key in laps[0]}


def measure() -> dict[str, Result]:
    parts: dict[str, float] = {}
    for epochs in (1, 2):
        for critic in CRITICS:
            run: dict[str, Any] = {"threads": THREADS, "worker": config(MODEL).learner}
            found = call("tests.bench.mask:compare", MODEL, critic, epochs, THREADS, ROUNDS, **run)
            parts |= {f"{critic}_{epochs}_epochs_{key}": value for key, value in found.items()}
    return {"mask_vs_clip": Result(parts["no_critic_1_epochs_ratio"], "", parts)}
