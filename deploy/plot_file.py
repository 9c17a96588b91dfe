"""A plot as a PNG file. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import replaced_file


@contextmanager
def plot_file(target: Path, columns: int = 1, *, size: tuple[float, float]) -> Iterator[Any]:
    """Yields `columns` axes next to each other, in a figure of `size` (width and height in inches). Saves the figure
    when the block ends. If the block raises an error, or the process is killed, an older file stays as it was."""
    import matplotlib  # here, because only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield axes[0]
        with replaced_file(target) as staging:
            figure.savefig(staging, dpi=120, format="png")
    finally:
        pyplot.close(figure)
