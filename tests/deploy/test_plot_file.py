"""A plot appears whole or not at all."""

import pytest
from matplotlib import pyplot

from deploy.plot_file import plot_file


def test_a_plot_has_the_columns_and_the_size_that_were_asked_for(tmp_path):
    with plot_file(tmp_path / "a.png", 2, size=(3, 1)) as [left, right]:
        left.plot([0, 1], [0, 1])
        assert right.figure is left.figure
        assert left.figure.get_size_inches().tolist() == [3, 1]
    png = (tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert [int.from_bytes(png[at : at + 4]) for at in (16, 20)] == [360, 120]  # 120 dots an inch


def test_an_error_while_drawing_keeps_the_old_plot(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), plot_file(target, size=(3, 1)):
        _ = 1 / 0
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    assert not pyplot.get_fignums()  # nothing stays in memory
