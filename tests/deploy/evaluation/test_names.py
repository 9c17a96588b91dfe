"""The names of policies on the command line."""

from __future__ import annotations

import pytest

from common.errors import UserError
from deploy.evaluation.names import policy_names


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/policy", "runs/b/policy", "lr=3"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_a_policy_is_named_by_the_end_of_its_path(here):
    assert policy_names(["runs/a/policy"]) == {"policy": str(here / "runs/a/policy")}
    assert policy_names(["org/model-2"]) == {"model-2": "org/model-2"}  # of a hub
    assert policy_names(["embedded:tiny"]) == {"embedded-tiny": "embedded:tiny"}


def test_policies_with_the_same_end_are_named_by_more_of_it(here):
    names = policy_names(["runs/a/policy", "first=runs/a", "runs/b/policy"])
    assert names == {
        "a-policy": str(here / "runs/a/policy"),
        "first": str(here / "runs/a"),
        "b-policy": str(here / "runs/b/policy"),
    }


def test_a_directory_with_an_equals_sign_needs_no_name(here):
    assert policy_names(["lr=3"]) == {"lr-3": str(here / "lr=3")}
    assert policy_names(["x=lr=3"]) == {"x": str(here / "lr=3")}


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (["base=runs/a"], "its name base is that of model.path; choose one: --policy NAME="),
        (["x=runs/a", "x=runs/b"], "runs/b: its name x is also that of "),
        (["runs/a", "runs/a"], "runs/a is given twice; leave one out"),
        (["x=runs/a", "y=runs/a"], "runs/a is given twice; leave one out"),
        (["a/b=runs/a"], "its name (a/b) may have letters, digits, dots, dashes and underscores"),
        ([".=runs/a"], "its name (.) may have"),
    ],
)
def test_names_that_cannot_be_used_are_refused(policies, message):
    with pytest.raises(UserError) as refused:
        policy_names(policies)
    assert message in str(refused.value)
