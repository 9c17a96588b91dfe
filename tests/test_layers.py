"""Imports point one way, and only the files named in the design need Ray or vLLM."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("common", "actors", "learner", "deploy")
FILES = sorted(path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
MAY_IMPORT = {
    "common": {"common"},
    "actors": {"common", "actors"},
    "learner": {"common", "learner"},
    "deploy": {"common", "actors", "learner", "deploy"},
}
RAY_FILES = {
    Path("actors/pool/ray_actor.py"),
    Path("actors/pool/ray_host.py"),
    Path("actors/pool/ray_meters.py"),
    Path("learner/ranks/group.py"),
}
VLLM_FILES = {Path(f"actors/generation/vllm_{name}.py") for name in ("engine", "weights", "reload")}

BLOCKED = """
import importlib, sys
sys.modules["ray"] = sys.modules["vllm"] = None  # importing either raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def imported(path):
    """Top-level names of every module that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(path.parts[0] if node.level else node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            names.update(str(arg.value).partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant))
    return names


def importers(module):
    return {path for path in FILES if module in imported(path)}


def test_the_walk_sees_every_layer():
    assert {path.parts[0] for path in FILES} == set(LAYERS)
    assert {"common", "ray"} <= imported(Path("actors/pool/ray_actor.py"))
    assert "vllm" in imported(Path("actors/generation/vllm_engine.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    assert imported(path) & set(LAYERS) <= MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_product_file_imports_the_tests(path):
    assert imported(path) & {"tests", "fakes", "pytest"} == set()


def test_ray_is_imported_only_where_roles_become_actors_the_group_and_deploy():
    assert {path for path in importers("ray") if path.parts[0] != "deploy"} <= RAY_FILES


def test_vllm_is_imported_only_by_its_engine_and_its_weights():
    assert importers("vllm") == VLLM_FILES


def test_everything_else_imports_without_ray_and_vllm():
    outside = [path for path in FILES if path.parts[0] != "deploy" and path not in RAY_FILES | VLLM_FILES]
    outside += [Path("deploy/cli.py"), Path("deploy/capacity.py"), Path("deploy/tasks/larger.py")]  # need no cluster
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in outside]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *names], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(len(names))), done.stderr[-2000:]


def test_the_block_is_felt_by_what_needs_ray():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "actors.pool.ray_actor"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError: import of ray halted" in done.stderr
