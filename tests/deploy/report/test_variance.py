"""The variance tab's data, from the file that `ratchet evaluate --variance` writes."""

from __future__ import annotations

from typing import Any

import pytest

from common.files import write_json
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from deploy.report.variance import variance_of
from tests.critic_figures import PARTS
from tests.deploy.report.made_run import write_run


def figure(value: float, *interval: float | None) -> dict[str, Any]:
    return {"value": value, "interval": list(interval) or None}


def noise(
    error: dict[str, Any], scale: dict[str, Any] | None, against: dict[str, Any] | None, **others: Any
) -> dict[str, Any]:
    names = {"gradient_norm": 2.0, "standard_error": 1.0, "signal": 3.0}
    return {**names, "relative_standard_error": error, "noise_scale": scale, "against_none": against, **others}


ACCOUNT: dict[str, Any] = {
    "run": "/runs/one",
    "batches": [4, 6],
    "checkpoint": "step-000004",
    **{"step": 4, "responses": 64, "prompts": 32, "tokens": 400, "mismatch_kl": 0.001, "whitens": True},
    "gradients": {"parts": 16, "weights": 1000, "kept": 101},
    "returns": {"mean": 0.5, "variance": figure(2.0, 1.5, 2.5)},
    "explained_variance": {
        part: {"tokens": 64, "explained_variance": figure(0.3, -7.0, 0.4), "returns_variance": figure(2.0, 1.0, 3.0)}
        for part in PARTS
    },
    "estimators": {
        "critic, lam 0.95": {
            "is_runs_own": True,
            "mean": 0.1,
            "variance": figure(0.5, 0.4, 0.6),
            "of_returns": figure(0.25, 0.2, 0.3),
            "whitened": noise(figure(0.7, 0.6, 0.8), figure(61.6, 36, 114), None, direction=figure(0.99, 0.9, 1.0)),
            "unwhitened": noise(figure(0.9, 0.8, 1.1), None, None),
        },
        "none": {
            "is_runs_own": False,
            "mean": 0.5,
            "variance": figure(2.0, 1.5, 2.5),
            "of_returns": figure(1.0, 1.0, 1.0),
            "whitened": noise(figure(0.98, 0.9, 1.05), figure(1550, 150, None), figure(1.0, 1.0, 1.0)),
            "unwhitened": noise(figure(1.01, 0.98, 1.05), None, None),
        },
    },
    "left_out": {"group": "one response"},
}


def test_the_tab_has_the_figures_of_the_file(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    write_json(run / "variance.json", ACCOUNT)
    blocks = page_blocks(RunFiles.read(run))
    assert blocks["run"]["unreadable"] == []
    assert blocks["run"]["tabs"] == ["curves", "rollouts", "critic", "variance", "scores"]
    found = blocks["variance"]
    assert (found["step"], found["batches"], found["tokens"]) == (4, [4, 6], 400)
    critic, none = found["estimators"]
    assert (critic["name"], critic["own"], critic["error"]) == ("critic, lam 0.95", True, [0.7, 0.6, 0.8])
    assert (none["noise_scale"], none["direction"]) == ([1550, 150, None], None)
    assert [one["part"] for one in found["explained"]] == ["all tokens", "first token", *(
        f"quarter {number}" for number in (1, 2, 3, 4)), "last token"]  # fmt: skip
    assert found["explained"][0]["share"] == [0.3, -7.0, 0.4]


def test_a_run_without_whitening_shows_the_gradients_that_it_uses(tmp_path):
    write_json(tmp_path / "variance.json", {**ACCOUNT, "whitens": False})
    found = variance_of(tmp_path, [])
    assert found["used"] == "unwhitened"
    assert (found["estimators"][1]["error"], found["estimators"][1]["other_error"]) == (
        [1.01, 0.98, 1.05], [0.98, 0.9, 1.05]
    )  # fmt: skip


def test_a_run_without_an_account_has_no_tab(tmp_path):
    unreadable: list[str] = []
    assert variance_of(tmp_path, unreadable) is None
    assert unreadable == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"estimators": 3}', "[" * 100_000, '{"step": "\\ud800"}'])
def test_a_damaged_file_is_left_out_and_named(tmp_path, text):
    run = write_run(tmp_path / "run", steps=1, credit=False)
    (run / "variance.json").write_text(text)
    blocks = page_blocks(RunFiles.read(run))
    assert blocks["variance"] is None
    assert "variance" not in blocks["run"]["tabs"]
    assert blocks["run"]["unreadable"] == ["variance.json"]
