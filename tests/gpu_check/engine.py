"""The vLLM engine on the device: what it samples, whose weights it samples with, and how long an update stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from actors.scoring.reference import ReferencePolicy
from common.config.actors import ReferenceConfig
from tests.fakes import make_rollout, save_tiny_model
from tests.gpu_check.models import random_llama
from tests.gpu_check.run import Run
from tests.version_models import save_model_that_writes_its_version

NEAR = 1e-3  # nats, float32
# On a GPU vLLM's attention takes float32 in TF32, with 11 bits instead of 24: 1.5e-3 on one H200. A wrong temperature
# would be off by about 1.
NEAR_TF32 = 5e-3
MOST_PAUSE_S = 0.1  # for 1.2B weights


def check(run: Run) -> None:
    if find_spec("vllm") is None:
        run.skip("engine", "vLLM is not installed")
        return
    run.part("engine, sampling", check_sampling)
    run.part("engine, versions", check_versions)
    if run.on_gpu:
        run.part("engine, pause", measure_pause, "1.2B" if run.big else "135M")
    else:
        run.skip("engine, pause", "needs a GPU")


def in_process(run: Run, scenario: str, model: str | Path) -> dict[str, Any]:
    """What a scenario of engine_process.py finds, in a process of its own: vLLM changes global state of torch."""
    result = run.scratch / f"{scenario}.json"
    command = [sys.executable, "-m", "tests.gpu_check.engine_process", scenario, str(model), str(run.gpus), str(result)]
    environment = {**os.environ, "TMPDIR": str(run.scratch)}  # vLLM leaves files there
    if not run.on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{scenario} failed: {done.stderr[-2000:]}")
    return json.loads(result.read_text())


def check_sampling(run: Run) -> None:
    from tests.gpu_check.engine_process import PROMPTS, TEMPERATURE

    model = save_tiny_model(run.scratch / "sampled")
    found = in_process(run, "sampling", model)
    cfg = ReferenceConfig(gpus=run.gpus, dtype="float32")
    reference = ReferencePolicy("reference", cfg, model=str(model), temperature=TEMPERATURE)
    rollouts = [make_rollout(prompt, ids) for prompt, ids in zip(PROMPTS, found["together"], strict=True)]
    pairs = zip(found["logprobs"], reference.forward(rollouts), strict=True)
    off = max(float(np.abs(np.array(mine) - exact).max()) for mine, exact in pairs)
    near = NEAR_TF32 if run.on_gpu else NEAR
    run.expect(off < near, f"engine: log-probabilities at temperature {TEMPERATURE} are off by {off:.1e} nats")
    run.expect(found["again"] == found["together"], "engine: the same seeds give the same tokens in the same batch")
    same = sum(map(list.__eq__, found["alone"], found["together"]))
    run.figure(f"engine: {same} of {len(PROMPTS)} answers are the same alone and in a batch")
    run.expect(found["after"] == found["together"], "engine: after its sleep it writes the same tokens")
    if run.on_gpu:
        awake, asleep, again = (size / 2**30 for size in found["free"])
        more = f"{asleep - awake:.2f} GiB more are free, and {again - awake:.2f} when it is awake again"
        run.expect(asleep > awake, f"engine: while it sleeps {more}")
        run.figure(f"engine: waking takes {found['wake_s']:.2f} s")


def check_versions(run: Run) -> None:
    answers = in_process(run, "versions", save_model_that_writes_its_version(run.scratch / "versions"))["answers"]
    wrong = sum(token - 4 != version for ids, written in answers for token, version in zip(ids, written, strict=True))
    tokens = sum(len(ids) for ids, _ in answers)
    mixed = sum(len(set(written)) > 1 for _, written in answers)
    run.expect(wrong == 0, f"engine: {wrong} of {tokens} tokens name a version that did not write them")
    run.expect(mixed > 0, f"engine: {mixed} of {len(answers)} answers have tokens of several versions")


def measure_pause(run: Run, name: str) -> None:
    found = in_process(run, "pause", random_llama(run, name))
    for staged, paused in found["laps"]:
        size = f"{found['bytes'] / 1e9:.2f} GB of {name}"
        run.figure(f"engine: {size} are staged in {staged:.2f} s, the pause is {paused:.3f} s")
    shortest = min(paused for _, paused in found["laps"])
    run.expect(shortest <= MOST_PAUSE_S, f"engine: an update stops it for {shortest:.3f} s, at most {MOST_PAUSE_S}")
