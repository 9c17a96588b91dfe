"""A run directory is not overwritten unasked and not shared."""

from __future__ import annotations

import pytest

from common.config import UserError
from deploy.run_directory import clear, refuse_overwriting, sole_owner


def test_a_new_or_empty_directory_may_begin_a_run(tmp_path):
    refuse_overwriting(tmp_path / "new", force=False)
    refuse_overwriting(tmp_path, force=False)


def test_a_run_is_replaced_only_when_asked_and_anything_else_never(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(UserError, match=r"--resume.*--force"):
        refuse_overwriting(tmp_path, force=False)
    refuse_overwriting(tmp_path, force=True)
    (tmp_path / "config.toml").rename(tmp_path / "thesis.toml")
    with pytest.raises(UserError, match="no run"):
        refuse_overwriting(tmp_path, force=True)


def test_two_runs_cannot_hold_one_directory(tmp_path):
    with sole_owner(tmp_path / "run"):
        with pytest.raises(UserError, match="another process trains in"), sole_owner(tmp_path / "run"):
            pass
        (tmp_path / "run/journal").mkdir()
        clear(tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []
    with sole_owner(tmp_path / "run"):  # and it is free again
        pass


def test_an_error_inside_is_not_taken_for_a_held_directory(tmp_path):
    with pytest.raises(BlockingIOError), sole_owner(tmp_path):
        raise BlockingIOError
