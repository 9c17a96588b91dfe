"""Reads TensorBoard event files with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path


def points(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, time and value of every point in RUN/tensorboard, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.wall_time, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every point, by tag."""
    return {tag: [(step, value) for step, _, value in found] for tag, found in points(directory).items()}
