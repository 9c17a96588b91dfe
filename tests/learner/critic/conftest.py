"""A tiny model, and rollouts of a journal of six steps."""

from __future__ import annotations

import pytest

from learner.critic.rollouts import Rollouts, choose_steps
from tests.fakes import save_tiny_model
from tests.learner.critic.journals import step_table, write_journal


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_journal(directory, [step_table(step) for step in range(6)])
    return Rollouts([choose_steps(directory, slice(None))])
