"""The screen and the plot of reward training: evaluations with all bins, with empty ones, and without any."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from actors.pool.replica import PoolEvent
from common.config.reward_model import RewardTrainingConfig
from common.model.reward_head import ScoreScale
from deploy.screen.reward_progress import RewardProgress, plot_calibration
from learner.reward_model.calibration import evaluate_preferences

ALL_BINS = np.repeat([0.2, 0.6, 1.1, 1.8, 4.0], 3) * np.tile([1, 1, -1], 5)  # two of three right in each
EMPTY_BINS = np.array([0.1, -0.2, 0.3, 5.0])  # predicted with 52 %, 55 %, 57 % and 99 %
CASES = {"all": ALL_BINS, "some-empty": EMPTY_BINS, "one": np.array([0.1, -0.1]), "none": np.array([])}


def evaluated(differences):
    return evaluate_preferences(differences, np.zeros(len(differences)), step=4, epoch=2.0)


@pytest.fixture
def progress(tmp_path):
    cfg = RewardTrainingConfig.model_validate({"data": {"train": "pairs.jsonl"}, "model": {"path": "a[b]c"}})
    return RewardProgress(cfg, tmp_path / "[run]")


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved."""
    seen, save = [], Figure.savefig

    def recorded(figure, *args, **kwargs):
        seen.append(figure.axes[0])
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", recorded)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_the_plot_is_a_png_of_every_bins_share_and_interval(tmp_path, drawn, case):
    evaluation, target = evaluated(CASES[case]), tmp_path / "calibration.png"
    plot_calibration(evaluation, target)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = drawn
    line, _, (bars,) = axes.containers[0].lines
    assert line.get_xydata() == pytest.approx(
        np.array([(b.predicted, b.right) for b in evaluation.bins]).reshape(-1, 2)
    )
    assert len(bars.get_segments()) == len(evaluation.bins)
    for segment, part in zip(bars.get_segments(), evaluation.bins):
        low, high = part.interval
        assert segment == pytest.approx(np.array([(part.predicted, low), (part.predicted, high)]), abs=1e-12)
    assert [text.get_text() for text in axes.texts] == [str(part.pairs) for part in evaluation.bins]
    assert f"{len(CASES[case])} held-out pairs" in axes.get_title()


@pytest.mark.parametrize(
    ("pairs", "sign"),
    [(1, 1), (1, -1), (12, 1), (11, -1)],
)
def test_a_bin_that_is_all_right_or_all_wrong_can_be_drawn(tmp_path, pairs, sign):
    plot_calibration(evaluated(np.full(pairs, sign * 2.0)), tmp_path / "calibration.png")


@pytest.mark.parametrize("case", CASES)
def test_the_table_has_a_row_for_every_bin_that_holds_pairs(progress, capsys, case):
    evaluation = evaluated(CASES[case])
    progress.evaluation(evaluation)
    progress.end([evaluated(ALL_BINS), evaluation], ScoreScale(mean=-1.5, deviation=0.25), seconds=61.2)
    out = capsys.readouterr().out
    edges = [f"{low:.0%} - {high:.0%}" for low, high in pairwise((0.5, 0.6, 0.7, 0.8, 0.9, 1.0))]
    assert [edge in out for edge in edges] == [
        {"all": True, "some-empty": edge in (edges[0], edges[-1]), "one": edge == edges[0], "none": False}[case]
        for edge in edges
    ]
    assert f"{len(CASES[case])} pairs), loss" in out
    assert "mean -1.500, deviation 0.250" in out
    assert "61 s in all" in out


def test_without_held_out_pairs_there_is_no_table(progress, capsys):
    progress.end([], ScoreScale(), seconds=1)
    out = capsys.readouterr().out
    assert "calibration:" not in out
    assert "mean 0.000, deviation 1.000" in out
    assert "[run]" in out  # a name is no markup
    progress.end([], None, seconds=1)  # nor were scores measured
    assert "deviation" not in capsys.readouterr().out


def test_a_run_shows_its_pair_counts_and_a_row_for_each_step(progress, capsys):
    found = {"pairs": 7, "empty": 1, "identical": 2, "cut": 3, "overlong": 4}
    counts = {"train": found, "heldout": {**found, "cut": 0, "prompt_in_train": 5}}
    progress.begin(counts, train=7, heldout=2)
    assert "prompt_in_train" in counts["heldout"]  # the summary tells it, too
    keys = ("loss", "accuracy", "margin", "grad_norm")
    record = {f"preference/{key}": value for key, value in zip(keys, (0.6931, 0.5, 0.25, 1.75))}
    for step in range(2):
        progress.step({"step": step, "epoch": (step + 1) / 2, "learner/tokens": 99.0, "time/learn_s": 0.1, **record})
    progress.pool(PoolEvent("Reward", "Reward(0)", "died", "lines [of] it", calls=3))
    progress.pool(PoolEvent("Reward", "Reward(1)", "leaving", "its node is leaving"))
    lines = capsys.readouterr().out.splitlines()
    assert "a[b]c · 7 training pairs, 2 held out" in lines[0]
    assert lines[1] == "train: 7 pairs, 3 of them cut to length; dropped: 1 empty, 2 identical, 4 too long"
    assert lines[2] == "heldout: 7 pairs, 0 of them cut to length; dropped: 1 empty, 2 identical, 4 too long"
    assert lines[3] == "5 held-out pairs left out: their prompt is also in the training data"
    assert "[run]; ready after" in lines[4]
    assert lines[5].split() == ["step", "epoch", "loss", "accuracy", "margin", "grad", "tokens", "seconds"]
    assert lines[6].split() == ["1", "0.50", "0.693", "50.0%", "0.25", "1.8", "99", "0.1"]
    assert lines[7].split()[:2] == ["2", "1.00"]
    assert lines[8].strip() == "Reward(0) died; 3 call(s) are sent elsewhere: lines [of] it"
    assert lines[9].strip() == "Reward(1) is leaving: its node is leaving"
