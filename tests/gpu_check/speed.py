"""Speed and memory of updates: tokens/s, share of the GPU's peak rate, against a bare loop, against the plan."""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch

from common.model.files import resolve_model
from common.model.packing import Sequences
from common.model.size import model_size
from deploy.plan.needs import needs
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.ranks.rows import sequence_costs
from tests.bench.bare import bare_for
from tests.bench.batch import batch
from tests.gpu_check.models import learner_config, random_llama
from tests.gpu_check.profile import kernel_times
from tests.gpu_check.run import Run

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 without sparsity, by the data sheets
ROLLOUTS, SHORTEST, LONGEST = 64, 256, 1024  # 640 tokens on average, half of them response
ROUNDS = 3
BUDGETS = (8192, 16384, 32768)


def check(run: Run) -> None:
    if not run.on_gpu:
        run.skip("speed", "needs a GPU")
        return
    run.part("speed of a matrix product", measure_products)
    free()
    for name in ("135M", "1.2B") if run.big else ("135M",):
        model = random_llama(run, name)
        for compiled in (False, True):
            for budget in BUDGETS:
                run.part(f"speed of {name}, {budget} tokens a micro-batch", measure, name, model, budget, compiled)
                free()
            run.part(f"speed of {name}, bare loop", compare, name, model, compiled)
            free()


def measure_products(run: Run, width: int = 8192) -> None:
    """The rates that this card reaches at best: of a large product in bf16, and of a copy."""
    a, b = (torch.randn(width, width, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = run.milliseconds(lambda: a @ b)
    source = torch.randn(1 << 30, device=run.device)
    target = torch.empty_like(source)
    copy_ms = run.milliseconds(lambda: target.copy_(source))
    run.figure(
        f"speed: {2 * width**3 / product_ms / 1e9:.0f} TFLOP/s in a product of {width} x {width} in bf16, "
        f"{2 * source.nbytes / copy_ms / 1e9:.2f} TB/s in a copy, bytes read and written"
    )


def measure(run: Run, name: str, model: str, budget: int, compiled: bool) -> None:
    cfg = learner_config(run, model, learner={"micro_batch_tokens": budget, "compile": compiled})
    table = batch(model, rollouts=ROLLOUTS, shortest=SHORTEST, longest=LONGEST)
    learner, size = Learner(cfg), model_size(resolve_model(model))
    first_s, _ = run.seconds(lambda: learner.update(table))
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(run.seconds(lambda: learner.update(table))[0] for _ in range(ROUNDS))
    peak, reserved = (x / 2**30 for x in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
    sequences: Sequences = ExperienceBatch.from_table(table).sequences
    tokens, forward = int(sequences.lengths.sum()), sum(sequence_costs(sequences, size))
    rate = 4 * forward / seconds  # two forward passes, and a backward pass of twice their operations
    how = ", compiled" if compiled else ""
    planned = sum(needs(cfg, size)[0].device.values()) / 2**30
    run.figure(
        f"speed of {name}{how}, {budget} tokens a micro-batch: {seconds:.3f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{rate / 1e12:.0f} TFLOP/s{share_of_peak(rate)}; {peak:.1f} GiB at the peak, {reserved:.1f} reserved, "
        f"{planned:.1f} planned; the first update took {first_s:.1f} s"
    )
    if budget == BUDGETS[0]:
        run.figure(
            f"speed of {name}{how}, ms on the GPU in an update: {kernel_times(lambda: learner.update(table), 16)}"
        )


def share_of_peak(rate: float) -> str:
    peaks = [peak for card, peak in PEAKS.items() if card in torch.cuda.get_device_name()]
    return f" ({rate / peaks[0]:.0%} of the peak)" if peaks else ""


def compare(run: Run, name: str, model: str, compiled: bool, budget: int = BUDGETS[0]) -> None:
    """Forward, backward and AdamW of an update against the same in a bare loop."""
    table = batch(model, rollouts=ROLLOUTS, shortest=SHORTEST, longest=LONGEST)
    bare = bare_for(model, table, budget, row=(SHORTEST + LONGEST) // 2, device=run.device, attention="sdpa")
    learner = Learner(learner_config(run, model, learner={"micro_batch_tokens": budget, "compile": compiled}))
    learner.update(table), bare.step()
    laps: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        update_s, stats = run.seconds(lambda: learner.update(table))
        bare_s, _ = run.seconds(bare.step)
        forward_s, _ = run.seconds(bare.forward)
        optimise_s = update_s - stats["time/old_logprobs_s"]
        laps.append({"ratio": bare_s / optimise_s, "whole": (bare_s + forward_s) / update_s, "bare": bare_s})
    how = ", compiled" if compiled else ""
    median: Any = {key: statistics.median(lap[key] for lap in laps) for key in laps[0]}
    run.figure(
        f"speed of {name}{how}: learner_vs_bare {median['ratio']:.2f}; with the pass for old log-probabilities in both "
        f"{median['whole']:.2f}; the bare loop takes {median['bare']:.3f} s"
    )


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
