"""What the plots of an evaluation show, from a record made by hand."""

import pytest
from matplotlib.figure import Figure

from deploy.evaluation.plots import plot_judges, plot_kl_by_position, plot_pass_at_k, write_plots


def figure(value, low=None, high=None):
    return {"value": value, "interval": None if low is None else [low, high]}


def part(first, last, *figures):
    return {"first": first, "last": last, "tokens": 9, **figure(*figures)}


BASE = {
    "pass_at_k": [figure(0.125, 0, 0.5), figure(0.25, 0, 0.5), figure(0.5, 0.25, 0.75)],
    "kl_by_position": [part(0, 0, 0.0, -0.5, 0.5), part(1, 2, 0.125)],
    "score": figure(1.0, 0.5, 1.5),
    "judges": {"gold": {"score": figure(0.5, 0.25, 0.75)}},
}
MINE = {
    "pass_at_k": [figure(0.25, 0.125, 0.5)] * 3,
    "crossover": {"value": 3, "interval": [2, None], "share": 0.9, "up_to": 3},
    "kl_by_position": [part(0, 0, 2.0, 1.0, 3.0), part(1, 2, 4.0, 3.0, 5.0)],
    "score": figure(3.0, 2.0, 4.0),
    "judges": {"gold": {"score": figure(0.25)}},
}
RECORD = {"base": "base", "samples": 3, "prompts": 8, "policies": {"base": BASE, "mine": MINE}}
EMPTY = {"kl_by_position": [], "score": figure(None), "judges": {"gold": {"score": figure(None)}}}


@pytest.fixture
def drawn(monkeypatch):
    """The plots that were saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure) or path.touch())
    return saved


def lines_of(axes):
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines()}


def bars_of(axes):
    """The points with error bars by label: x, y, and the ends of the bars."""
    found = {}
    for box in axes.containers:
        point, _, bars = box.lines
        ends = [segment.tolist() for bar in bars for segment in bar.get_segments()]
        found[box.get_label()] = (point.get_xdata().tolist(), point.get_ydata().tolist(), ends)
    return found


def test_pass_at_k_has_every_curve_and_the_crossover(drawn, tmp_path):
    assert plot_pass_at_k(RECORD, tmp_path) == tmp_path / "pass-at-k.png"
    [axes] = drawn[0].axes
    assert lines_of(axes)["base"] == ([1, 2, 3], [0.125, 0.25, 0.5])
    assert lines_of(axes)["mine"] == ([1, 2, 3], [0.25] * 3)
    crossing = bars_of(axes)["k = 3: the base, asked k times, beats mine, asked once"]
    assert crossing == ([3], [0.25], [[[2, 0.25], [3, 0.25]]])
    assert [path.name for path in tmp_path.iterdir()] == ["pass-at-k.png"]


def test_kl_has_a_point_in_the_middle_of_each_bin(drawn, tmp_path):
    assert plot_kl_by_position(RECORD, tmp_path) == tmp_path / "kl-by-position.png"
    [axes] = drawn[0].axes
    assert lines_of(axes) == {"base": ([1, 2.5], [0, 0.125]), "mine": ([1, 2.5], [2, 4])}
    heights = [sorted(set(band.get_paths()[0].vertices[:, 1])) for band in axes.collections]
    assert heights == [[-0.5, 0.125, 0.5], [1, 3, 5]]  # without an interval, the band is the value


def test_each_policy_is_a_point_over_the_score_of_training(drawn, tmp_path):
    assert plot_judges(RECORD, tmp_path) == tmp_path / "reward-and-judges.png"
    [axes] = drawn[0].axes
    assert axes.get_ylabel() == "gold"
    points = bars_of(axes)
    assert points["base"] == ([1], [0.5], [[[0.5, 0.5], [1.5, 0.5]], [[1, 0.25], [1, 0.75]]])
    assert points["mine"][:2] == ([3], [0.25])
    assert ([1, 3], [0.5, 0.25]) in lines_of(axes).values()  # from the base


def test_plots_without_figures_are_not_written(drawn, tmp_path):
    assert write_plots({**RECORD, "policies": {"base": EMPTY}}, tmp_path) == []
    both = write_plots({**RECORD, "policies": {"base": EMPTY, "mine": MINE}}, tmp_path)
    assert [path.name for path in both] == ["pass-at-k.png", "kl-by-position.png", "reward-and-judges.png"]
    assert list(bars_of(drawn[-1].axes[0])) == ["mine"]
