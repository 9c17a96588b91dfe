"""The arguments of engines on GPUs, as vLLM's own config classes take them, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import save_tiny_model
from tests.gpu_paths.engine_args import MEMORY

pytestmark = pytest.mark.ray  # it imports vLLM

CASES = {
    "whole": {"gpus": 1},
    "share": {"gpus": 0.3},
    "two": {"gpus": 2, "tensor_parallel": 2},
    "own": {"gpus": 0.5, "kv_cache_mib": 1000, "max_running": 300, "max_batched_tokens": 4000, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What vLLM makes of the arguments of every case."""
    if torch.version.cuda is not None:
        pytest.skip("needs a CPU build: with CUDA, engines show it")
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)
    command = [sys.executable, "-m", "tests.gpu_paths.engine_args", str(model), json.dumps(list(CASES.values()))]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    temporary = str(tmp_path_factory.mktemp("t"))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": temporary}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return dict(zip([*CASES, "wrong"], results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_vllm_keeps_every_argument_of_an_engine_on_a_gpu(found, case):
    assert found[case]["kept"] == found[case]["passed"]


def test_vllm_does_check_the_arguments(found):
    assert (
        "max_num_batched_tokens (299) must be greater than or equal to max_num_seqs (300)" in found["wrong"]["refused"]
    )


@pytest.mark.parametrize("case", CASES)
def test_an_engine_on_a_gpu_is_exact(found, case):
    kept = found[case]["kept"]
    assert kept["logprobs_mode"] == "processed_logprobs"
    assert kept["enable_prefix_caching"] == (CASES[case]["gpus"] < 1)  # as engine_args.py asks


def test_an_engine_on_a_gpu_schedules_ahead_and_one_with_a_share_can_sleep(found):
    assert all(found[case]["kept"]["async_scheduling"] for case in CASES)
    assert [found[case]["kept"]["enable_sleep_mode"] for case in CASES] == [False, True, False, True]


def test_an_engine_on_a_gpu_gets_the_defaults_of_the_device(found):
    for case in ("whole", "share", "two"):
        kept = found[case]["kept"]
        assert (kept["max_num_seqs"], kept["max_num_batched_tokens"]) == (256, 8192)
    own = found["own"]["kept"]
    assert (own["max_num_seqs"], own["max_num_batched_tokens"]) == (300, 4000)
    assert [found[case]["dtype"] for case in CASES] == 3 * ["torch.bfloat16"] + ["torch.float32"]


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_split_and_kernels_are_captured_on_a_gpu(found, case):
    assert found[case]["kept"]["enable_chunked_prefill"] is True
    assert found[case]["kept"]["enforce_eager"] is False
    assert (found[case]["graphs"], found[case]["second_runner"]) == ("FULL_AND_PIECEWISE", "True")


def test_the_cache_has_the_given_size_or_the_rest_of_the_share(found):
    cache = {case: found[case]["kept"]["kv_cache_memory_bytes"] for case in CASES}
    assert cache["own"] == 1000 << 20
    # The tiny model leaves nearly all: 2 GiB are for CUDA and its graphs. An engine with a whole GPU leaves 8 % of it.
    for case, share in (("whole", 0.92), ("share", 0.3), ("two", 0.92)):
        assert 0.99 < cache[case] / (share * MEMORY - (2 << 30)) < 1


def test_only_an_engine_over_several_gpus_has_more_processes(found):
    assert [found[case]["executor"] for case in CASES] == ["uni", "uni", "mp", "uni"]
    assert [found[case]["kept"]["tensor_parallel_size"] for case in CASES] == [1, 1, 2, 1]
    assert {found[case]["worker"] for case in CASES} == {"vllm.v1.worker.gpu_worker.Worker"}
