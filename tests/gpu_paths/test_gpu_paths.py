"""The CUDA paths of learner, reward models, services and publication, on fake CUDA tensors: which kernels run, in which
types, on which device, and what waits for the GPU. Values are checked on a GPU (`python -m tests.gpu_check`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu_paths.scenarios import KINDS, PROMPTS, RESPONSES, SCENARIOS
from tests.tracing import DISABLED

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
HEADS_THAT_FLASH_LACKS = ("odd-heads", "wide-heads")
FLASH = [kind for kind in KINDS if kind not in HEADS_THAT_FLASH_LACKS]
ON_GPU = ["cuda:0, torch.float32"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The results of all scenarios, in a process with a fake GPU."""
    if torch.version.cuda is not None:
        pytest.skip("needs a CPU build of torch: a CUDA build has a device of its own")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, for a CUDA device that does nothing")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include", str(HERE / "guard.cpp")]
    subprocess.run([*command, "-o", str(library), f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"], check=True)
    command = [sys.executable, "-m", "tests.gpu_paths.fake_gpu", str(library), ",".join(SCENARIOS)]
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    env = {name: value for name, value in os.environ.items() if name != DISABLED} | {"PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_runs_on_the_gpu_with_exact_outputs(found, kind):
    assert found[kind]["outputs"] == found[kind]["gradients"] == ON_GPU
    assert found[kind]["without_gradient"] == []


@pytest.mark.parametrize("kind", [*KINDS, "frozen", "float32"])
def test_a_micro_batch_never_waits_for_the_gpu(found, kind):
    assert found[kind]["waits"] == []


@pytest.mark.parametrize("kind", [*FLASH, "frozen"])
def test_attention_is_the_packed_kernel_in_bf16(found, kind):
    assert [dtype for dtype, _ in found[kind]["attention"]] == 2 * ["torch.bfloat16"]


@pytest.mark.parametrize("kind", [*FLASH, "frozen"])
def test_attention_without_a_shorter_window_is_the_causal_kernel(found, kind):
    windows = {"window": [[5, 0], [5, 0]], "alternating": [[5, 0], [-1, 0]]}  # the token itself and 5 before it
    assert [window for _, window in found[kind]["attention"]] == windows.get(kind, [[-1, 0], [-1, 0]])


@pytest.mark.parametrize("kind", [*HEADS_THAT_FLASH_LACKS, "float32"])
def test_heads_and_types_that_the_kernel_lacks_go_another_way(found, kind):
    assert found[kind]["attention"] == []
    assert not any("varlen" in name for name in found[kind]["operations"])


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_products_are_in_bf16_under_autocast(found, kind):
    assert found[kind]["products"] == ["torch.bfloat16"]


@pytest.mark.parametrize(("kind", "graphs"), [("compiled", [1, 1, 1, 1, 1]), ("compiled-window", [1, 1, 1, 1, 2])])
def test_one_graph_with_the_packed_kernel_serves_all_lengths(found, kind, graphs):
    """A window that hides nothing is another graph: its kernel is the causal one."""
    assert found[kind]["graphs"] == graphs
    assert found[kind]["in_graph"] == [1] * graphs[-1]
    assert found[kind]["gradients"] == ON_GPU


def test_only_bf16_crosses_from_the_gpu_in_a_publication(found):
    published = found["publication"]
    assert published["values"] == published["parameters"] > 50_000
    assert published["crossed"] == {"cuda to cpu, torch.bfloat16": 2 * published["parameters"]}


def test_credit_waits_for_the_gpu_once_a_step(found):
    assert found["credit"]["learning"] == []
    assert found["credit"]["reading"] == ["aten::_to_copy"]
    assert found["credit"]["crossed"] == {"cuda to cpu, torch.float32": 4 * 4 * 6}


def test_a_reward_model_scores_and_learns_on_the_gpu(found):
    assert found["reward"]["outputs"] == found["reward"]["gradients"] == ON_GPU
    assert found["reward"]["waits"] == []


def test_a_wait_would_be_noticed(found):
    assert found["waits"]["waits"] == ["aten::_to_copy", "aten::_local_scalar_dense", "aten::nonzero"]
    assert found["waits"]["crossed"] == {"cuda to cpu, torch.float32": 4 * (sum(PROMPTS) + sum(RESPONSES))}
