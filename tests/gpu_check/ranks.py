"""Two ranks that train together, over NCCL on two GPUs, against one rank. On the CPU over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from learner.ppo.learner import Learner
from tests.bench.batch import batch
from tests.fakes import save_tiny_model
from tests.gpu_check.models import learner_config
from tests.gpu_check.run import Run

NEAR = {"fp32": 1e-3, "bf16": 0.05}  # relative
COMPARED = ("ppo/entropy", "ppo/grad_norm", "value/loss", "mismatch/kl")


def check(run: Run) -> None:
    if run.on_gpu and torch.cuda.device_count() < 2:
        run.skip("ranks", "needs two GPUs, and there is one")
        return
    model = save_tiny_model(run.scratch / "ranks")
    for precision in ("fp32", "bf16") if run.on_gpu else ("fp32",):
        run.part(f"ranks in {precision}", check_two, model, precision)


def check_two(run: Run, model: Path, precision: str) -> None:
    metrics = {}
    for world in (1, 2):
        directory = run.scratch / f"{world}-ranks-{precision}"
        directory.mkdir()
        spawn(_rank, (world, str(model), str(directory), run.gpus, precision), nprocs=world)
        metrics[world] = json.loads((directory / "metrics.json").read_text())
    off = {key: abs(metrics[2][key] / metrics[1][key] - 1) for key in COMPARED}
    worst = max(off, key=off.__getitem__)
    run.expect(
        off[worst] < NEAR[precision],
        f"ranks: the second update of two ranks in {precision} agrees with that of one; {worst} is off by "
        f"{off[worst]:.1e}",
    )


def _rank(rank: int, world: int, model: str, directory: str, gpus: int, precision: str) -> None:
    """One rank, in a process of its own that sees its own GPU only."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    run = Run(torch.device("cuda" if gpus else "cpu"), Path(directory))
    cfg = learner_config(run, model, learner={"ranks": world, "precision": precision})
    learner = Learner(cfg)
    learner.join(rank, world, f"file://{directory}/rendezvous")
    table = batch(model, rollouts=8, shortest=16, longest=48)
    learner.update(table)
    metrics = learner.update(table)
    if rank == 0:
        Path(directory, "metrics.json").write_text(json.dumps(metrics))
