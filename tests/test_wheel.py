"""The wheel: what is in it, what the code reads from it, and a run from it, outside of the checkout."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import HeaderParser
from fnmatch import fnmatch
from pathlib import Path

import pytest

from common.files import read_records
from common.user_code.packages import RATCHET_PACKAGES
from deploy.run.provenance import VERSION
from tests.fakes import save_tiny_model

ROOT = Path(__file__).parents[1]
# Every place where code names a file next to it, and the files that it reads there.
READ = {
    "actors/scoring/function_worker.py": ["common/user_code/__init__.py", "common/reward_input.py"],
    "actors/scoring/worker_process.py": ["actors/scoring/function_worker.py"],
    "common/data/reasoning_gym_prompts.py": ["common/data/reasoning_gym_script.py"],
    "common/data/verifiers_prompts.py": ["common/data/verifiers_script.py"],
    "common/user_code/errors.py": [],  # whether a frame of a traceback is Ratchet's own
    "common/user_code/packages.py": [],  # the directory of all packages
    "deploy/cluster/commands.py": ["deploy/cluster/docker/*", "deploy/cluster/launcher/*", "deploy/cluster/slurm/*"],
    "deploy/ending/driver_watcher.py": [],  # likewise
    "deploy/evaluation/texts.py": ["deploy/evaluation/held-out-text.txt"],
    "deploy/monitoring/installation.py": ["deploy/monitoring/alerts.yml"],
    "deploy/presets.py": ["deploy/configs/presets/*.toml"],
    "deploy/report/page.py": ["deploy/report/page/page.html", "deploy/report/page/page.css", "deploy/report/page/*.js"],
    "deploy/shipped.py": ["deploy/configs/*.toml"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy, because a build writes into its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    for name in RATCHET_PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True, timeout=300)
    [built] = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def in_wheel(wheel) -> set[str]:
    """The files of the four packages in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def in_folders() -> set[str]:
    """The files of the four packages in this checkout."""
    found = (path.relative_to(ROOT) for name in RATCHET_PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def names_a_file(path: str) -> bool:
    """True if the code of a module uses __file__ of its own, or importlib.resources."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if "__file__" not in text and "importlib.resources" not in text:
        return False
    tree = ast.parse(text)
    return any(
        (isinstance(node, ast.Name) and node.id == "__file__")
        or (isinstance(node, ast.ImportFrom) and node.module == "importlib.resources")
        for node in ast.walk(tree)
    )


def test_the_wheel_has_every_file_of_the_packages_and_no_other(in_wheel):
    assert in_wheel == in_folders()


def test_the_wheel_has_what_the_code_reads_at_run_time(in_wheel):
    assert {path for path in in_wheel if path.endswith(".py") and names_a_file(path)} == set(READ)
    for reader, patterns in READ.items():
        for pattern in patterns:
            assert any(fnmatch(name, pattern) for name in in_wheel), (reader, pattern)


def test_type_checkers_find_the_types_of_each_package(in_wheel):
    assert {f"{name}/py.typed" for name in RATCHET_PACKAGES} <= in_wheel


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = wheel.name.partition("-py3")[0] + ".dist-info/"
        metadata = HeaderParser().parsestr(archive.read(f"{info}METADATA").decode())
        assert archive.read(f"{info}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "ratchet = deploy.cli:main" in archive.read(f"{info}entry_points.txt").decode()
        assert set(archive.read(f"{info}top_level.txt").decode().split()) == set(RATCHET_PACKAGES)
    assert (metadata["Name"], metadata["Version"]) == ("ratchet-rlhf", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Operating System :: POSIX :: Linux" in metadata.get_all("Classifier")
    assert {"cpu", "gpu", "demo", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_has_the_version():
    assert f"\n## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin directory of a fresh environment with the wheel. It sees the libraries of this one, but not Ratchet: a
    directory that is named in a .pth file does not get its own .pth files read, such as that of an editable install."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    [packages] = place.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin/python")]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=without_this_checkout(), check=True, timeout=300)
    return place / "bin"


def without_this_checkout() -> dict[str, str]:
    """The environment without PYTHONPATH, through which pip and programs would find this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture
def elsewhere(installed, tmp_path, monkeypatch):
    """Runs a program of that environment in an empty directory. Returns what it has printed."""
    here = tmp_path / "elsewhere"
    here.mkdir()
    environment = without_this_checkout()

    def call(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [installed / program, *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.mark.ray
def test_the_demo_trains_two_steps_from_the_wheel(elsewhere, installed, tmp_path):
    found = elsewhere("python", "-P", "-c", "import actors, common, deploy, learner; print(deploy.__file__)")
    assert Path(found.strip()).is_relative_to(installed.parent)
    assert "train-reward" in elsewhere("ratchet", "--help")
    assert "larger\n" in elsewhere("ratchet", "config", "--list")
    model = save_tiny_model(tmp_path / "model")
    smaller = ["num_steps=2", "rollouts_per_step=8", "evaluation.prompts=8", "generators.kv_cache_mib=16"]
    machine = ["--cpus", "4", "--memory", "16"]
    assert "Generator" in elsewhere("ratchet", "plan", "larger", f"model.path={model}", *smaller, *machine)
    elsewhere("ratchet", "train", "larger", f"model.path={model}", *smaller, "--run", "runs/demo")
    run = tmp_path / "elsewhere/runs/demo"
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [0, 1]
    elsewhere("ratchet", "report", "runs/demo")
    assert "larger" in (run / "report.html").read_text(encoding="utf-8")
