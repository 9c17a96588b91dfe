"""A run directory is not overwritten unasked and not shared; held-out answers are written as records."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import platform
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
import torch

from common.errors import UserError
from common.user_code.import_path import find_users_modules
from deploy.run.directory import refuse_overwriting, sole_owner
from deploy.run.lock import is_owned
from deploy.run.provenance import VERSION, git_state
from tests.fakes import tiny_config


@pytest.fixture
def cfg(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("model"))


def begin(directory, cfg, *, force=False):
    with sole_owner(directory) as held:
        held.begin(cfg, "train", force=force)


def old_run(directory, cfg):
    """A run directory from before runs had a run.json."""
    (directory / "journal").mkdir(parents=True)
    (directory / "config.toml").write_text(cfg.to_toml())
    return directory


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_a_new_or_empty_directory_may_begin_a_run(tmp_path, cfg):
    refuse_overwriting(tmp_path / "new/one", force=False)
    assert not (tmp_path / "new").exists()
    refuse_overwriting(tmp_path, force=False)
    begin(tmp_path / "new/one", cfg)
    assert names(tmp_path / "new/one") == {"run.json", "config.toml"}


def test_a_run_is_replaced_only_when_asked(tmp_path, cfg):
    for directory in (tmp_path / "new", old_run(tmp_path / "old", cfg)):
        if directory.name == "new":
            begin(directory, cfg)
        with pytest.raises(UserError, match=r"--resume.*--force"):
            refuse_overwriting(directory, force=False)
        refuse_overwriting(directory, force=True)


@pytest.mark.parametrize("mine", ["thesis.tex", "src", ".git", "run.json"])
def test_a_directory_with_files_of_the_user_is_no_run(tmp_path, cfg, mine):
    directory = old_run(tmp_path / "project", cfg)  # their own config.toml and journal/
    (directory / mine).write_text('{"name": "mine"}')
    with pytest.raises(UserError, match="has files that do not belong to a run"):
        refuse_overwriting(directory, force=True)


def test_a_config_alone_or_of_another_program_is_no_run(tmp_path, cfg):
    (tmp_path / "config.toml").write_text(cfg.to_toml())
    with pytest.raises(UserError, match=r"do not belong to a run \(such as config.toml\)"):
        refuse_overwriting(tmp_path, force=True)
    (tmp_path / "config.toml").write_text('baseURL = "http://example.org"')  # Hugo's
    (tmp_path / "answers").mkdir()
    with pytest.raises(UserError, match="do not belong to a run"):
        refuse_overwriting(tmp_path, force=True)


def test_force_deletes_nothing_and_says_where_the_old_run_is(tmp_path, cfg, capsys):
    run = tmp_path / "run"
    begin(run, cfg)
    (run / "policy").mkdir()
    (run / "notes.txt").write_text("mine")
    begin(run, cfg, force=True)
    assert names(run) == {"run.json", "config.toml"}
    assert names(tmp_path / "run.old-1") == {"run.json", "config.toml", "policy", "notes.txt"}
    assert f"the old run is now {tmp_path / 'run.old-1'}" in capsys.readouterr().err
    begin(run, cfg, force=True)
    assert names(tmp_path) == {"run", "run.old-1", "run.old-2"}


def test_force_on_a_link_keeps_the_link_and_renames_its_target(tmp_path, cfg):
    begin(tmp_path / "disk/run", cfg)
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    begin(tmp_path / "run", cfg, force=True)
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "disk") == {"run", "run.old-1"}


@pytest.mark.parametrize("here", ["run", "run/journal"])
def test_force_does_not_move_the_current_directory(tmp_path, cfg, monkeypatch, here):
    begin(tmp_path / "run", cfg)
    (tmp_path / "run/journal").mkdir()
    monkeypatch.chdir(tmp_path / here)
    with pytest.raises(UserError, match=r"the current directory is in it; move it yourself, or name another --run"):
        refuse_overwriting(tmp_path / "run", force=True)


def test_force_does_not_move_a_mount_point(tmp_path, cfg, monkeypatch):
    begin(tmp_path / "run", cfg)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "run")
    with pytest.raises(UserError, match="it is a mount point"):
        refuse_overwriting(tmp_path / "run", force=True)


@pytest.mark.parametrize("cut", range(1, 6))
def test_force_cut_short_leaves_the_old_run_nothing_or_the_new_one(tmp_path, cfg, monkeypatch, cut):
    run, calls = tmp_path / "run", itertools.count(1)
    begin(run, cfg)
    (run / "policy").mkdir()
    rename, mkdir = Path.rename, Path.mkdir

    def cut_before(change):
        def changed(*args, **kwargs):
            if next(calls) == cut:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return changed

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt), sole_owner(run) as held:
        patched.setattr(Path, "rename", cut_before(rename))
        patched.setattr(Path, "mkdir", cut_before(mkdir))
        held.begin(cfg, "train", force=True)
    assert next(calls) > cut or cut == 5  # the last one is after everything
    old = {"run.json", "config.toml", "policy"}
    left = names(run) if run.exists() else set()
    assert left in (old, set(), {"run.json"}, {"run.json", "config.toml"})
    if left != old:
        assert names(tmp_path / "run.old-1") == old
    begin(run, cfg, force=True)  # and the same command works again
    assert names(run) == {"run.json", "config.toml"}


def test_leftovers_of_a_killed_start_do_not_block_a_new_run(tmp_path, cfg):
    (tmp_path / "config.toml.123.tmp").touch()
    (tmp_path / "run.json.77.tmp").touch()
    begin(tmp_path, cfg)
    assert names(tmp_path) == {"run.json", "config.toml"}
    (tmp_path / "config.toml").unlink()
    begin(tmp_path, cfg)
    assert names(tmp_path) == {"run.json", "config.toml"}


def test_the_record_has_time_directory_and_versions_of_the_start(tmp_path, cfg, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find_users_modules(tmp_path / "config")
    git = partial(subprocess.run, check=True, capture_output=True)
    git(["git", "init", "-q", "."])
    Path("tracked").touch()
    git(["git", "add", "tracked"])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    begin(tmp_path / "run", cfg)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["command"], record["directory"]) == ("train", str(tmp_path))
    assert record["import_from"] == [str(tmp_path / "config")]
    (start,) = record["starts"]
    assert start["git"] == {"commit": head, "dirty": False}
    assert start["directory"] == str(tmp_path)
    assert start["versions"]["python"] == platform.python_version()
    assert start["versions"]["ray"] == ray.__version__
    assert start["versions"]["torch"] == torch.__version__
    assert {"ratchet", "transformers"} < start["versions"].keys()
    assert abs(datetime.fromisoformat(start["time"]).timestamp() - time.time()) < 60
    assert start["ratchet_git"] is None or len(start["ratchet_git"]["commit"]) == 40

    Path("tracked").write_text("changed")
    with sole_owner(tmp_path / "run") as held:
        held.resume(cfg)
    resumed = json.loads((tmp_path / "run/run.json").read_text())
    assert resumed["starts"][0] == start
    assert resumed["starts"][1]["git"] == {"commit": head, "dirty": True}
    assert resumed | {"starts": 0} == record | {"starts": 0}


def test_an_old_run_without_a_record_gets_one_when_it_continues(tmp_path, cfg):
    with sole_owner(old_run(tmp_path / "old", cfg)) as held:
        held.resume(cfg)
    assert len(json.loads((tmp_path / "old/run.json").read_text())["starts"]) == 1


def test_a_directory_without_git_or_without_a_commit_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert git_state(tmp_path) is None


def test_the_version_is_that_of_the_package():
    assert version("ratchet-rlhf") == VERSION


def test_two_runs_cannot_own_one_directory(tmp_path, cfg):
    with sole_owner(tmp_path / "run") as held:
        for force in (False, True):
            with pytest.raises(UserError, match="another process works in"):
                begin(tmp_path / "run", cfg, force=True)
            held.begin(cfg, "train", force=force)  # the old run is moved aside, and the new one is held
            (tmp_path / "run/journal").mkdir()
    begin(tmp_path / "run", cfg, force=True)  # and it is free again


def test_of_two_starts_the_slower_one_does_not_replace_the_faster_one(tmp_path, cfg):
    refuse_overwriting(tmp_path / "run", force=False)
    begin(tmp_path / "run", cfg)  # by another process, between check and start
    with pytest.raises(UserError, match=r"exists; .*--force"):
        begin(tmp_path / "run", cfg)


def test_a_directory_that_is_renamed_meanwhile_is_opened_again(tmp_path, monkeypatch):
    run, flock = tmp_path / "run", fcntl.flock
    run.mkdir()

    def late(descriptor, how):
        if not (tmp_path / "run.old-1").exists():
            run.rename(tmp_path / "run.old-1")
            run.mkdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_owner(run):
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(UserError, match="another process"), sole_owner(run):
            pass
        with sole_owner(tmp_path / "run.old-1"):
            pass


def test_a_new_run_directory_is_readable_by_its_owner_only(tmp_path, cfg):
    begin(tmp_path / "runs/new", cfg)
    assert (tmp_path / "runs/new").stat().st_mode & 0o777 == 0o700
    begin(tmp_path / "runs/new", cfg, force=True)
    assert (tmp_path / "runs/new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)  # the user chose these permissions
    begin(tmp_path / "shared", cfg)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["x" * 300, "file/run", "/proc/nope"])
def test_a_directory_that_cannot_be_made_is_refused_before_anything_starts(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run directory .* cannot be (made|used) .*name another"):
        refuse_overwriting(tmp_path / name, force=False)


def test_an_error_of_the_body_is_not_mistaken_for_an_owned_directory(tmp_path):
    with pytest.raises(BlockingIOError), sole_owner(tmp_path):
        raise BlockingIOError


OTHER_NODE = """
import sys, pathlib
from deploy.run.directory import sole_owner
with sole_owner(pathlib.Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


def test_a_refusal_names_the_owner_and_a_killed_owner_is_none(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", OTHER_NODE, run]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "owned\n"
        named = (
            rf"another process works in {run} \(process {other.pid} on {socket.gethostname()}, since \d{{4}}-.*\); stop"
        )
        with pytest.raises(UserError, match=named), sole_owner(run):
            pass
        assert is_owned(run)
        other.kill()
        other.wait()
    assert (run / "run.lock").exists()
    assert not is_owned(run)
    with sole_owner(run):
        assert is_owned(run)
    assert not names(run)


def test_the_lock_is_on_a_file_opened_for_writing(tmp_path, monkeypatch):
    locked, flock = [], fcntl.flock

    def look(descriptor, how):
        found, flags = os.fstat(descriptor), fcntl.fcntl(descriptor, fcntl.F_GETFL)
        locked.append((stat.S_ISREG(found.st_mode), flags & os.O_ACCMODE == os.O_RDWR))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", look)  # NFS: a lock on anything else holds on one node only
    with sole_owner(tmp_path):
        assert locked == [(True, True)]
        assert (tmp_path / "run.lock").exists()
    assert not names(tmp_path)


def test_readers_make_no_lock_and_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    assert not is_owned(tmp_path)
    assert not names(tmp_path)

    def without(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    refusal = r"run.lock cannot be locked \(No locks available\); put the run directory"
    with pytest.raises(UserError, match=refusal), sole_owner(tmp_path):
        pass
    assert not is_owned(tmp_path)
