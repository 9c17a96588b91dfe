"""Imports point one way; few files need Ray or vLLM, and the driver's loop no torch; each module says where it runs."""

import ast
import re
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
    Path("learner/ranks/adapter_reference.py"),
    Path("learner/ranks/group.py"),
    Path("learner/ranks/node_waits.py"),
    Path("learner/ranks/rank_group.py"),
    Path("learner/ranks/processes.py"),
}
VLLM_FILES = {Path(f"actors/generation/vllm_{name}.py") for name in ("engine", "settings", "weights", "reload")}
VLLM_FILES.add(Path("actors/environments/vllm_tool_calls.py"))

# Its arguments: packages to block, with commas between them; modules to import.
BLOCKED = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it raises ImportError
for name in sys.argv[2:]:
    importlib.import_module(name)
print(len(sys.argv) - 2)
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


def test_ppo_does_not_import_the_training_of_critics():
    """`ratchet train-critic` uses the maths of PPO, and PPO starts from the files that it writes."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in FILES if path.is_relative_to("learner/ppo")}
    assert len(texts) > 10
    assert not [path for path, text in texts.items() if re.search(r"^\s*(from|import) learner\.critic\b", text, re.M)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_product_file_imports_the_tests(path):
    assert imported(path) & {"tests", "fakes", "pytest"} == set()


def test_ray_is_imported_only_by_the_named_files_and_deploy():
    assert {path for path in importers("ray") if path.parts[0] != "deploy"} <= RAY_FILES


def test_vllm_is_imported_only_by_the_files_that_are_named_after_it():
    assert importers("vllm") == VLLM_FILES


def module(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_without(blocked, paths):
    """The process that imports these modules while importing the `blocked` packages fails."""
    names = [module(path) for path in paths]
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, blocked, *names], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_everything_else_imports_without_ray_and_vllm():
    outside = [path for path in FILES if path.parts[0] != "deploy" and path not in RAY_FILES | VLLM_FILES]
    no_cluster = ("cli", "plan/capacity", "tasks/larger", "export", "replay", "audit")
    outside += [Path(f"deploy/{name}.py") for name in no_cluster]
    done = imports_without("ray,vllm", outside)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(outside))), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("folder", "blocked"), [("learner/loop", "torch,ray,vllm"), ("actors/pool", "torch,vllm")], ids=["loop", "pool"]
)
def test_the_loop_and_the_pool_of_the_driver_import_no_torch(folder, blocked):
    files = [path for path in FILES if path.parent == Path(folder)]
    assert len(files) > 8
    done = imports_without(blocked, files)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(files))), done.stderr[-2000:]


@pytest.mark.parametrize("package", ["ray", "torch"])
def test_a_module_that_needs_a_blocked_package_fails(package):
    needs = {"ray": "actors/pool/ray_actor.py", "torch": "learner/ppo/learner.py"}
    done = imports_without(package, [Path(needs[package])])
    assert done.returncode == 1
    assert f"ModuleNotFoundError: import of {package} halted" in done.stderr


def says_where_it_runs(docstring):
    """A sentence of it begins with "Runs "."""
    return re.search(r"(^|[.:!?]\s+)Runs\s[^.]+\.", docstring) is not None


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_says_in_its_first_docstring_where_it_runs(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    assert says_where_it_runs(docstring), 'add a sentence such as "Runs in the driver." (CONTRIBUTING.md)'


def test_a_sentence_about_running_is_not_enough():
    assert says_where_it_runs("A buffer.\n\nRuns in the driver. More.")
    assert says_where_it_runs("Runs anywhere.")
    assert not says_where_it_runs("The buffer. It runs in the driver.")
    assert not says_where_it_runs("Many Runs in one file.")
