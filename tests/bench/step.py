"""A whole PPO step of Ratchet against one of a classic single-process trainer.

step_vs_plain: seconds of a step of tests/bench/plain_ppo.py over those of Ratchet. Both have the same model, start, two
cores and 32 prompts of 30 to 70 tokens, write 32 new tokens for each (the end token is forbidden, so both write equally
much), and make 4 epochs of one minibatch.

Ratchet runs like `ratchet train`: Ray, vLLM, reference service, journal and weight publication are included. It is
strictly on-policy, so the roles take turns and each has both cores. Its steps after the first count, with every phase
that a step logs. The plain trainer first makes a step on 4 of the prompts. Both leave out loading and start-up; neither
evaluates or writes a checkpoint in the steps that count.

A classic trainer with Ratchet's choices (bf16, one trunk, no padding) would be equally fast in the learner. It would
still generate with Hugging Face and do one thing after another. Two thirds of the learner's time are matrix products,
at 360 to 400 of the 420 GFLOP/s that two Zen 5 cores reach.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from tests.bench.batch import MODEL, config
from tests.bench.fresh import call
from tests.bench.results import Result
from tests.bench.task import LONGEST, PROMPTS, prompts, variety

THREADS, STEPS, NEW_TOKENS, WARM_UP = 2, 3, 32, 4


def ratchet(model: str, new_tokens: int) -> dict[str, float]:
    """Seconds of each phase of a step, mean of the steps after the first."""
    from common.files import read_records
    from deploy.train import run_training
    from tests.bench.plain_ppo import EPOCHS

    cfg = config(
        model,
        num_steps=STEPS,
        rollouts_per_step=PROMPTS,
        prompts={"train": "tests.bench.task:prompts", "max_tokens": LONGEST + 10},
        sampling={"max_new_tokens": new_tokens, "min_new_tokens": new_tokens},
        ppo={"ppo_epochs": EPOCHS},
        generators={"threads": THREADS},
        reference={"threads": THREADS},
        learner={"threads": THREADS, "micro_batch_tokens": 4096},  # of 2,624 tokens
        evaluation={"prompts": 0},
        checkpoint={"every": 1000},
        ray={"dashboard": False},
    )
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        run_training(cfg, Path(folder) / "run")
        records = read_records(Path(folder) / "run" / "metrics.jsonl")[1:]
    inside = ("time/old_logprobs_s", "time/optimise_s")  # parts of time/learn_s
    keys = [key for key in records[0] if key.startswith("time/") and key not in inside]
    phases = {key.removeprefix("time/"): statistics.mean(record[key] for record in records) for key in keys}
    return phases | {"step_s": sum(phases.values()), "tokens": records[-1]["learner/tokens"]}


def plain(model: str, new_tokens: int, threads: int) -> dict[str, float]:
    """Seconds of each phase of one step after a small one."""
    import torch

    from tests.bench.plain_ppo import PlainPPO

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    trainer = PlainPPO(model, max_new_tokens=new_tokens)
    asked = [trainer.tokenizer(record["prompt"])["input_ids"] for record in prompts(0)]
    trainer.step(asked[:: len(asked) // WARM_UP], variety)
    return trainer.step(asked, variety) | {"tokens": sum(len(prompt) + new_tokens for prompt in asked)}


def measure() -> dict[str, Result]:
    ours = call("tests.bench.step:ratchet", MODEL, NEW_TOKENS)
    theirs = call("tests.bench.step:plain", MODEL, NEW_TOKENS, THREADS, threads=THREADS)
    assert ours["tokens"] == theirs["tokens"], f"not the same work: {ours['tokens']} and {theirs['tokens']} tokens"
    parts = {f"ratchet_{key}": value for key, value in ours.items()}
    parts |= {f"plain_{key}": value for key, value in theirs.items()}
    return {"step_vs_plain": Result(theirs["step_s"] / ours["step_s"], ">= 5", parts)}
