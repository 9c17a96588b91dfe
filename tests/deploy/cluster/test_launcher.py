"""The files of Ray's cluster launcher, checked by Ray; and the command that copies all files that are changed by
hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

import deploy.cluster
from common.errors import UserError
from deploy.cluster import commands
from deploy.cluster.kuberay import GROUPS

LAUNCHER = Path(deploy.cluster.__file__).parent / "launcher"


def read(name):
    return yaml.safe_load((LAUNCHER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["aws", "gcp", "machines"])
def test_ray_accepts_the_launchers_files(name):
    prepared = prepare_config(read(name))
    validate_config(prepared)
    with pytest.raises(ValidationError):
        validate_config({**prepared, "max_worker": 3})  # such a fault is found
    starts = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in start for start in starts if "ray start" in start)
    assert "~/.ray/auth_token" in prepared["file_mounts"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_launchers_nodes_have_the_groups_that_roles_ask_for(name):
    types = read(name)["available_node_types"]
    assert {kind: node["labels"] for kind, node in types.items()} == {kind: {"group": kind} for kind in types}
    assert set(GROUPS.values()) < set(types)
    assert types["learner"]["min_workers"] == types["learner"]["max_workers"]
    assert types["generators"]["min_workers"] == 0 < types["generators"]["max_workers"]


def test_files_that_cannot_be_copied_leave_nothing(tmp_path, monkeypatch):
    def full(source, target):
        target.mkdir()
        raise shutil.Error([(str(source), str(target), "[Errno 28] No space left on device")])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(UserError, match=r"No space left on device.*name a new directory"):
        commands.files(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_shared_storage_is_the_images_users_once_it_is_mounted(name):
    commands = read(name)["initialization_commands"]
    order = [text for text in commands for mark in ("update", "install", "mount -t", "chown 1000:1000") if mark in text]
    assert [text.split()[-1] for text in order] == ["update", "nfs-common", "/shared", "/shared"]
    assert order[-1] == commands[-1] == "sudo chown 1000:1000 /shared"


def test_the_files_of_all_platforms_are_copied_once(tmp_path, capsys):
    to = tmp_path / "mine"
    commands.files(to)
    copied = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
    assert {"launcher/aws.yaml", "slurm/ratchet.sbatch"} <= copied
    assert not any("Dockerfile" in path for path in copied)  # they build in a checkout only
    assert capsys.readouterr().out.split() == sorted(str(to / name) for name in copied)
    with pytest.raises(UserError, match="exists; name a new directory"):
        commands.files(to)
