"""The Dockerfiles, read as text: what they copy exists, their versions agree, and the image's user is not root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "cluster" / "docker"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name):
    """(instruction, its text) of a Dockerfile, without comments and with lines joined."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def arguments(name):
    return dict(text.split("=", 1) for kind, text in instructions(name) if kind == "ARG" and "=" in text)


def sent(path):
    """Whether `docker build` sends a file of the checkout: the last rule of .dockerignore that fits decides."""
    kept = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!").removeprefix("**/")
            if any(fnmatch(part, pattern) for part in ([path.parts[0]] if rule[:2] != "**" else path.parts)):
                kept = rule.startswith("!")
    return kept


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_everything_that_is_copied_exists_and_is_sent(name):
    copies = [text.split() for kind, text in instructions(name) if kind == "COPY"]
    from_checkout = [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]
    assert {"actors", "common", "deploy", "learner", "pyproject.toml", "README.md", "LICENSE"} <= set(from_checkout)
    for source in from_checkout:
        assert (ROOT / source).exists(), source
        assert sent(Path(source)), source
    stages = {text.split()[-1] for kind, text in instructions(name) if kind == "FROM" and " AS " in text}
    assert {words[0].removeprefix("--from=") for words in copies if words[0].startswith("--from")} == stages


def test_neither_runs_nor_environments_are_sent():
    assert not any(map(sent, [Path("runs/demo"), Path(".venv/bin"), Path(".git"), Path("tests/fakes.py")]))
    assert not sent(Path("deploy/__pycache__/cli.pyc"))


def test_both_images_have_the_same_python_and_an_extra_that_exists():
    cpu, gpu = arguments("Dockerfile.cpu"), arguments("Dockerfile.gpu")
    assert cpu["PYTHON_VERSION"] == gpu["PYTHON_VERSION"]  # otherwise their Ray nodes would not join each other
    assert cpu["UV_VERSION"] == gpu["UV_VERSION"]
    minor = tuple(map(int, cpu["PYTHON_VERSION"].split(".")))[:2]
    assert minor >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    for own, found in (("cpu", cpu), ("gpu", gpu)):
        assert {own, *found["EXTRAS"].split(",")} <= set(PROJECT["optional-dependencies"])
        installs = [text for kind, text in instructions(f"Dockerfile.{own}") if kind == "RUN" and "pip install" in text]
        assert [f'".[{own},${{EXTRAS}}]"' in text for text in installs] == [True]
    assert gpu["CUDA_VERSION"].startswith(gpu["CUDA_PACKAGES"].replace("-", ".") + ".")


def runs(name, stage):
    """The RUN instructions of a stage, 0 the first one, as one text."""
    stages = [[]]
    for kind, text in instructions(name):
        stages = [*stages, []] if kind == "FROM" else stages
        stages[-1] += [text] if kind == "RUN" else []
    return "\n".join(stages[stage + 1])


@pytest.mark.parametrize(("name", "own"), [("Dockerfile.cpu", "cpu"), ("Dockerfile.gpu", "gpu")])
def test_images_install_what_the_page_says(name, own):
    page = (ROOT / "docs" / "install.md").read_text()
    [model] = re.findall(r"^pip install --no-deps (.+)$", page, re.MULTILINE)
    [removed] = re.findall(r"^pip uninstall --yes (.+)$", page, re.MULTILINE)
    installs = runs(name, 1)
    assert f"uv pip install --no-cache --no-deps {model}" in installs
    assert (f"uv pip uninstall {removed}" in installs) == (own == "cpu")  # "for `[cpu]` alone"
    assert "reasoning-gym` | prompts and rewards of reasoning-gym; it needs a C compiler" in page
    assert {"gcc", "libc6-dev"} <= set(installs.split())
    assert {"reasoning-gym", "demo", "aws", "gcp"} <= set(arguments(name)["EXTRAS"].split(","))


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_images_have_what_rays_launcher_uses_in_them(name):
    installs = runs(name, 2)
    assert {"rsync", "openssh-client"} <= set(installs.split())
    [environment] = [text for kind, text in instructions(name) if kind == "ENV" and " PATH=" in text]
    values = dict(word.split("=", 1) for word in environment.split())
    assert values["HOME"] == "/home/ratchet"  # where it mounts the token
    # Login shells, such as the launcher's, set PATH to the system's own.
    [login] = re.findall(r'echo "export PATH=(.*):\\\$PATH" > /etc/profile.d/ratchet.sh', installs)
    assert f"{login}:$PATH" == values["PATH"]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_images_have_pinned_bases_two_stages_and_a_user(name):
    found, values = instructions(name), arguments(name)
    bases = [text.split()[0] for kind, text in found if kind == "FROM"]
    tags = [re.sub(r"\$\{(\w+)}", lambda match: values[match[1]], base).partition(":")[2] for base in bases]
    assert all(re.match(r"\d+\.\d+\.\d+", tag) for tag in tags), tags
    assert len(bases) == 3  # uv, the environment, the image
    last = max(index for index, (kind, _) in enumerate(found) if kind == "FROM")
    assert [text for kind, text in found[last:] if kind == "USER"] == ["1000"]
    [health] = [text for kind, text in found[last:] if kind == "HEALTHCHECK"]
    assert health.endswith('CMD ["sh", "/opt/ratchet/health.sh"]')
    assert ("COPY", "deploy/cluster/docker/health.sh /opt/ratchet/health.sh") in found[last:]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (the extra dev has it)")
@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_hadolint_finds_nothing(name):
    done = subprocess.run([HADOLINT, DOCKER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("command", "code"), [("ratchet\0train\0my.toml\0", 0), ("python\0/bin/ray\0start\0", 1)])
def test_the_health_check_asks_only_containers_of_ray_start(tmp_path, command, code):
    first = tmp_path / "cmdline"
    first.write_text(command)
    environment = {**os.environ, "AGENT_PORT": "1"}  # nothing answers there
    done = subprocess.run(["sh", DOCKER / "health.sh", first], env=environment, capture_output=True)
    assert done.returncode == code
