"""`python -m tests.bench.rates --out FILE`: the rates of this machine, for `ratchet plan --rate FILE`.

It measures an update (passes without gradients, with gradients, and the optimizer, each alone), an engine (prompts, and
tokens with one and with many sequences at once) and a publication: through Ray on the CPU, on a GPU the packing alone.
Each part runs in a fresh process. A rate is the work that deploy/plan/work.py counts, divided by the median of the
rounds' seconds. `--gpu` measures a GPU: the learner's passes with several sizes of micro-batches.

Keep the machine quiet. `--busy` is for a CPU with other work: the processes have one thread each, and their CPU seconds
count. It leaves out the gain of a second thread, which CPU seconds do not show.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from common.config.actors import GeneratorsConfig, SamplingConfig
from common.model.files import resolve_model
from common.model.size import ModelSize, model_size
from common.weights import Bucket
from deploy.plan.rates import Decoding, Rates, Speed
from deploy.plan.work import OPTIMIZER_BYTES, Lengths, generation, published_bytes, update
from learner.ppo.learner import Learner
from tests.bench.batch import MODEL, batch, config
from tests.bench.fresh import call

ROUNDS = 3
CPU_BUDGETS, GPU_BUDGETS = (128, 256, 512), (8192, 16384, 32768)  # tokens of a micro-batch
CPU_ROWS: dict[str, int] = {"rollouts": 24, "shortest": 16, "longest": 128}
GPU_ROWS: dict[str, int] = {"rollouts": 64, "shortest": 256, "longest": 1024}
PROMPT, NEW = 64, 16  # tokens of a request to the engine


def clock(busy: bool) -> Callable[[], float]:
    """Seconds; of a CPU, if other programs keep the machine busy."""
    return time.process_time if busy else time.perf_counter


def learning(model: str, gpu: bool, threads: int, budget: int, busy: bool) -> dict[str, float]:
    """Operations or bytes per second of an update's passes without and with gradients, and of its optimizer."""
    now, rows = clock(busy), GPU_ROWS if gpu else CPU_ROWS
    section = {"gpus": int(gpu), "threads": threads, "micro_batch_tokens": budget, "compile": False}
    # Two minibatches: then no pass serves for the old log-probabilities and for an optimizer step.
    ppo = {"ppo_epochs": 1, "minibatches": 2}
    cfg = config(model, rollouts_per_step=rows["rollouts"], ppo=ppo, learner=section)
    table, learner = batch(model, **rows), Learner(cfg)
    spent = {"before": 0.0, "optimizer": 0.0}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = now()
            result = work(*args)
            _wait_for_gpu(gpu)
            spent[name] += now() - began
            return result

        return run

    learner.old_outputs = timed("before", learner.old_outputs)  # type: ignore[method-assign]
    learner.optimizer_step = timed("optimizer", learner.optimizer_step)  # type: ignore[method-assign]
    learner.update(table)
    laps = []
    for _ in range(ROUNDS):
        spent |= {"before": 0.0, "optimizer": 0.0}
        began = now()
        learner.update(table)
        _wait_for_gpu(gpu)
        laps.append({**spent, "training": now() - began - sum(spent.values())})
    seconds = {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}
    size = model_size(resolve_model(model))
    began = now()
    packed = sum(item.values.nbytes for item in learner.publish() if isinstance(item, Bucket))
    packing = packed / (now() - began)
    # Lengths are spread evenly, and half of each is response.
    mean = (rows["shortest"] + rows["longest"]) / 2
    done = update(cfg, size, Lengths(mean / 2, mean / 2))
    return {
        "passes": done.before / seconds["before"],
        "training": done.training / seconds["training"],
        "optimizer": 2 * OPTIMIZER_BYTES * size.parameters / seconds["optimizer"],
        "packing": packing,
        "pass_tokens": done.pass_tokens,
    }


def _wait_for_gpu(gpu: bool) -> None:
    if gpu:
        import torch

        torch.cuda.synchronize()


def engine(model: str, gpu: bool, busy: bool) -> dict[str, float]:
    """Seconds of an engine: for the prompts of a full batch, and for a step with one sequence and with a full batch."""
    from actors.generation.vllm_engine import VLLMEngine

    cfg, now = GeneratorsConfig(gpus=int(gpu)), clock(busy)
    sampling = SamplingConfig(max_new_tokens=NEW, min_new_tokens=NEW)
    served: Any = VLLMEngine(resolve_model(model), cfg, sampling, max_model_len=PROMPT + NEW, end_token_ids=[2])
    llm, params = served._engine, served._sampling  # its own thread sleeps until it is called
    rng, named = np.random.default_rng(0), iter(range(1_000_000))

    def seconds(requests: int, new_tokens: int) -> float:
        from vllm import SamplingParams

        limits = {"max_tokens": new_tokens, "min_tokens": new_tokens}
        for _ in range(requests):
            prompt = rng.integers(100, 40_000, PROMPT).tolist()
            llm.add_request(str(next(named)), {"prompt_token_ids": prompt}, SamplingParams(**{**params, **limits}))
        began = now()
        while llm.has_unfinished_requests():
            llm.step()
        return now() - began

    def median(requests: int, new_tokens: int) -> float:
        return statistics.median([seconds(requests, new_tokens) for _ in range(1 + ROUNDS)][1:])

    full = cfg.max_running
    prefill, prefill_one = median(full, 1), median(1, 1)
    return {
        "running": full,
        "prefill_s": prefill,
        "step_s": (median(full, NEW) - prefill) / (NEW - 1),
        "step_of_one_s": (median(1, NEW) - prefill_one) / (NEW - 1),
    }


def decoding(found: dict[str, float], model: ModelSize) -> Decoding:
    """The rates that give the measured seconds of both kinds of steps: step = bytes / read + operations / decode."""
    running, lengths = int(found["running"]), Lengths(PROMPT, NEW)

    def batch_of(rollouts: int) -> Any:
        cfg = config(
            MODEL,
            rollouts_per_step=rollouts,
            prompts={"train": "tests.bench.task:prompts", "max_tokens": PROMPT},
            sampling={"max_new_tokens": NEW},
        )
        return generation(cfg, model, lengths, cache_bytes=None)

    many, one = batch_of(running), batch_of(1)
    work = [[done.step_bytes, done.decode / (NEW - 1)] for done in (many, one)]
    read, operations = np.linalg.solve(np.array(work), np.array([found["step_s"], found["step_of_one_s"]]))
    if min(read, operations) <= 0:
        raise SystemExit(
            f"a step of {running} sequences took {found['step_s']:.4f} s, one of a single sequence "
            f"{found['step_of_one_s']:.4f} s: these times give no rates; keep the machine quiet and try again"
        )
    return Decoding(many.prefill / found["prefill_s"], 1 / float(operations), 1 / float(read))


def publication() -> dict[str, float]:
    """Bytes of a publication on the CPU, and its seconds until an idle generator serves with it: the least of several,
    since other programs only add to them."""
    from common.config.base import RayConfig
    from deploy.cluster.connection import cluster

    with cluster(RayConfig(dashboard=False)):
        seconds = asyncio.run(_publish_often())
    return {"bytes": published_bytes(model_size(resolve_model(MODEL))), "seconds": min(seconds)}


async def _publish_often() -> list[float]:
    from actors.generation.generator import Generator
    from actors.pool.ray_actor import actor
    from actors.pool.ray_host import RayHost
    from actors.pool.roles import GeneratorPool
    from common.config.ppo import LearnerConfig
    from learner.ranks.group import LearnerGroup
    from tests.bench.weights import Publisher, make_engine

    rank, cfg = actor(Publisher, LearnerConfig()).remote(), GeneratorsConfig()
    learner = LearnerGroup(lambda _: rank, LearnerConfig(), startup_timeout_s=300)
    engine = partial(make_engine, cfg, SamplingConfig(max_new_tokens=NEW))
    generators = GeneratorPool(RayHost(Generator, cfg, 0, engine), cfg)
    pool, _ = await asyncio.gather(generators.pool.start(300), learner.start())
    seconds = []
    for _ in range(1 + 2 * ROUNDS):
        version = await rank.move.remote()
        began = time.perf_counter()
        await generators.load(learner.publish(), version)
        seconds.append(time.perf_counter() - began)
    pool.stop()
    learner.stop()
    return seconds[1:]


def measure(model: str, *, kind: str, gpu: bool, busy: bool) -> Rates:
    """The rates of one GPU, or of one thread on the CPU."""
    size, worker = model_size(resolve_model(model)), config(model, learner={"gpus": int(gpu)}).learner
    budgets = GPU_BUDGETS if gpu else CPU_BUDGETS

    def part(name: str, *args: Any, **process: Any) -> dict[str, float]:
        found = call(f"tests.bench.rates:{name}", *args, **process)
        print(name, *args, found, flush=True)  # now: a later part may fail
        return found

    def learn(threads: int, budget: int) -> dict[str, float]:
        return part("learning", model, gpu, threads, budget, busy, threads=threads, worker=worker)

    learned = [learn(1, budget) for budget in budgets]
    gain = 1.0
    if not gpu and not busy and (os.cpu_count() or 1) > 1:
        gain = learn(2, budgets[-1])["training"] / learned[-1]["training"] - 1
    written = part("engine", model, gpu, busy, threads=1, worker=GeneratorsConfig(gpus=int(gpu)))
    sent = None if gpu else part("publication")
    return Rates(
        kind=kind,
        device="gpu" if gpu else "cpu",
        origin=(
            f"measured by tests/bench/rates.py with {Path(model).name or model} on {time.strftime('%Y-%m-%d')}"
            + (", in CPU seconds of one thread next to other programs" if busy else "")
        ),
        passes=tuple(Speed(size.parameters, int(one["pass_tokens"]), one["passes"]) for one in learned),
        training=tuple(Speed(size.parameters, int(one["pass_tokens"]), one["training"]) for one in learned),
        decoding=decoding(written, size),
        publish_bytes_per_s=sent["bytes"] / sent["seconds"] if sent else learned[-1]["packing"],
        publish_whole=sent is not None,
        optimizer_bytes_per_s=statistics.median(one["optimizer"] for one in learned),
        gain=gain,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a Hugging Face directory, a hub name, or the embedded model")
    parser.add_argument("--kind", default="own", help="the name of this machine's rates")
    parser.add_argument("--gpu", action="store_true", help="measure a GPU instead of the CPU")
    parser.add_argument("--busy", action="store_true", help="count CPU seconds of one thread")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    if args.gpu and args.busy:
        parser.error("--busy counts seconds of the CPU, which say nothing about a GPU: leave one out")
    found = measure(args.model, kind=args.kind, gpu=args.gpu, busy=args.busy)
    args.out.write_bytes(TypeAdapter(Rates).dump_json(found, indent=2) + b"\n")
    for name, value in asdict(found).items():
        print(f"{name:24}{value}")


if __name__ == "__main__":
    main()
