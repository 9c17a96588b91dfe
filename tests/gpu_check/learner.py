"""Updates of a tiny policy on the device: against the CPU's, repeated, saved and restored, published."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from common.weights import Bucket, IncomingWeights
from learner.ppo.learner import Learner
from learner.variance.account import account
from tests.bench.batch import batch
from tests.fakes import save_tiny_model
from tests.gpu_check.models import learner_config, random_llama
from tests.gpu_check.run import Run, error
from tests.saving import save_checkpoint_of

METRICS = ("ppo/policy_loss", "value/loss", "ppo/entropy", "ppo/grad_norm", "ppo/approx_kl", "kl/per_response")
VARIANTS: list[dict[str, Any]] = [
    {"critic": "separate"},
    {"gradient_checkpointing": True},
    {"lora": {"rank": 4}},
    {"lora": {"rank": 4}, "gradient_checkpointing": True},
]
FP32 = {"precision": "fp32", "micro_batch_tokens": 128, "compile": False}
BF16 = {"precision": "bf16", "micro_batch_tokens": 128, "compile": False}


def check(run: Run) -> None:
    model = str(save_tiny_model(run.scratch / "tiny"))
    table = batch(model, rollouts=16, shortest=16, longest=48)
    case = Case(run, model, table)
    run.part("learner, against the CPU", check_float32, case)
    run.part("learner, bf16", check_bf16, case)
    for variant in VARIANTS:
        run.part(f"learner, {variant}", check_variant, case, variant)
    for variant in ({}, *VARIANTS):
        run.part(f"learner, compiled, {variant}", check_compiled, case, variant)
    for deterministic in (False, True):
        for compiled in (False, True):
            name = f"learner, repeated, deterministic {deterministic}, compiled {compiled}"
            run.part(name, check_repeats, model, deterministic=deterministic, compiled=compiled)
    run.part("learner, variance account", check_variance_account, case)
    run.part("learner, checkpoint", check_checkpoint, case)
    run.part("learner, publication", check_publication, case)
    for compiled in (False, True):
        run.part("learner, host waits", count_waits, case, compiled)


@dataclass(frozen=True)
class Case:
    """A tiny model, and a batch for it."""

    run: Run
    model: str
    table: pa.Table

    def learner(self, settings: dict[str, Any], *, gpus: int | None = None) -> Learner:
        """On the run's device, or where `gpus` puts it."""
        return Learner(learner_config(self.run, self.model, gpus=gpus, learner=settings))


def parameters(learner: Learner) -> Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in learner.network.parameters()])


def difference(mine: dict[str, float], cpu: dict[str, float]) -> float:
    return max(abs(mine[key] - cpu[key]) / max(1e-3, abs(cpu[key])) for key in METRICS)


def check_float32(run: Run, case: Case) -> None:
    here, there = case.learner(FP32), case.learner(FP32, gpus=0)
    before = parameters(here)
    for step in range(2):
        off = difference(here.update(case.table), there.update(case.table))
        run.expect(off < 2e-3, f"learner: metrics of update {step} in float32 are the CPU's to {off:.1e}")
    off = error(parameters(here) - before, parameters(there) - before)
    run.expect(off < 0.05, f"learner: the two updates moved the weights as on the CPU, off by {off:.1e}")


def check_bf16(run: Run, case: Case) -> None:
    mine, cpu = case.learner(BF16).update(case.table), case.learner(FP32, gpus=0).update(case.table)
    entropy, norm = abs(mine["ppo/entropy"] - cpu["ppo/entropy"]), abs(mine["ppo/grad_norm"] / cpu["ppo/grad_norm"] - 1)
    what = f"learner: in bf16 the entropy is off by {entropy:.1e} nats, the gradient's norm by {norm:.1e} of itself"
    run.expect(entropy < 0.02 and norm < 0.05, what)


def check_variant(run: Run, case: Case, variant: dict[str, Any]) -> None:
    mine, cpu = (case.learner({**FP32, **variant}, gpus=gpus).update(case.table) for gpus in (None, 0))
    off = difference(mine, cpu)
    run.expect(off < 2e-3, f"learner: metrics in float32 with {variant} are the CPU's to {off:.1e}")
    stats = case.learner({**BF16, **variant}).update(case.table)
    run.expect(stats["ppo/grad_norm"] > 0, f"learner: an update in bf16 with {variant}")


def check_variance_account(run: Run, case: Case) -> None:
    mine, cpu = (account(case.learner(FP32, gpus=gpus), case.table)["estimators"] for gpus in (None, 0))
    names = ("gradient_norm", "standard_error")
    pairs = [
        (found[which][name], cpu[estimator][which][name])
        for estimator, found in mine.items()
        for which in ("whitened", "unwhitened")
        for name in names
    ]
    off = max(abs(a - b) / b for a, b in pairs)
    run.expect(off < 2e-3, f"learner: noise of gradients in float32 is the CPU's to {off:.1e}")


def check_compiled(run: Run, case: Case, variant: dict[str, Any]) -> None:
    """The gradients of a first update, compiled and not, and whether any layer was left as it is."""
    found, printed = [], io.StringIO()
    for compiled in (False, True):
        learner = case.learner({**BF16, **variant, "compile": compiled})
        gradients: list[Tensor] = []
        learner.optimizer.register_step_pre_hook(
            lambda *_, learner=learner, gradients=gradients: gradients.append(all_gradients(learner))
        )
        with redirect_stdout(printed):
            stats = learner.update(case.table)
        found.append((gradients[0], stats))
    (plain, plain_stats), (mine, stats) = found
    off, moved = error(mine, plain), abs(stats["ppo/entropy"] - plain_stats["ppo/entropy"])
    run.expect(
        off < 0.05 and moved < 0.01 and not printed.getvalue(),
        f"learner: compiled with {variant}, gradients in bf16 are off from those without by {off:.1e}, the entropy by "
        f"{moved:.1e} nats {printed.getvalue()}",
    )


def all_gradients(learner: Learner) -> Tensor:
    return torch.cat([p.grad.detach().cpu().flatten() for p in learner.network.parameters() if p.grad is not None])


def check_repeats(run: Run, tiny: str, *, deterministic: bool, compiled: bool) -> None:
    """On a GPU with 135M weights: with few of them, sums in any order may happen to agree."""
    model = random_llama(run, "135M") if run.on_gpu else tiny
    settings = {"micro_batch_tokens": 4096, "compile": compiled, "deterministic": deterministic}
    cfg = learner_config(run, model, learner=settings)
    table, found = batch(model, longest=512 if run.on_gpu else 128), []
    for _ in range(2):
        one = Learner(cfg)
        one.update(table), one.update(table)
        found.append([p.detach().cpu() for p in one.network.parameters()])
    same = all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    how = f"learner.deterministic {'on' if deterministic else 'off'}{', compiled' if compiled else ''}"
    what = f"learner: two updates twice, {how}"
    if deterministic:
        run.expect(same, f"{what}: the same bits")
    else:
        run.figure(f"{what}: {'the same bits' if same else 'not the same bits'}")


def check_checkpoint(run: Run, case: Case) -> None:
    saved, directory = case.learner(BF16), run.scratch / "checkpoint"
    saved.update(case.table)
    save_checkpoint_of(saved, directory)
    for where, gpus in (("the same device", None), ("the CPU", 0)):
        restored = case.learner(BF16, gpus=gpus)
        steps = restored.restore(directory)
        same = torch.equal(parameters(saved), parameters(restored))
        run.expect(steps == 1 and same, f"learner: a checkpoint restores the same weights on {where}")
    restored.update(case.table)
    save_checkpoint_of(restored, directory)
    again = case.learner(BF16)
    again.restore(directory)
    same = torch.equal(parameters(restored), parameters(again))
    stats = again.update(case.table)
    run.expect(same and stats["ppo/grad_norm"] > 0, "learner: a checkpoint written on the CPU continues on the device")


def check_publication(run: Run, case: Case) -> None:
    published = case.learner(BF16)
    incoming, found = IncomingWeights(), {}
    for item in published.publish():
        if isinstance(item, Bucket):
            incoming.add(item)
            found |= {name: tensor.clone() for name, tensor in item.tensors()}
    incoming.check_complete(0)
    wanted = {name: tensor.cpu().to(torch.bfloat16) for name, tensor in published.network.policy_tensors()}
    same = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    run.expect(same, f"learner: publishes its {len(wanted)} weights bit for bit")


def count_waits(run: Run, case: Case, compiled: bool) -> None:
    """One micro-batch, two layers. CUDA warns each time the host waits for the GPU."""
    if not run.on_gpu:
        run.skip("learner, host waits", "needs a GPU")
        return
    one = case.learner({**BF16, "micro_batch_tokens": 8192, "compile": compiled})
    one.update(case.table)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            one.update(case.table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    listed = ", ".join(f"{place} {count}" for place, count in places.most_common(24))
    which = f"an update of one micro-batch and 2 {'compiled ' if compiled else ''}layers"
    run.figure(f"learner: the host waits {len(waits)} times in {which}: {listed}")
