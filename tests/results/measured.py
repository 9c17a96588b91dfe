"""The figures of finished runs, kept in the repository, so that seeds can be added later and on another machine.

tests/results/measured/NAME.json has the figures of the experiment NAME: for each work its command, and for each seed
the value of every column, by title. A figure that a run does not have is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.results.finished import Finished
from tests.results.works import Arm, Experiment, Work

MEASURED = Path(__file__).parent / "measured"
CRITIC_SECONDS = "seconds of the critic's training"

Figures = Mapping[str, float | None]  # of one run, by the title of the column
Measured = dict[str, dict[int, Figures]]  # by work and seed


def finished_runs(work: Work, root: Path, seeds: Sequence[int]) -> dict[int, Path]:
    """The directories of the finished runs of a work, by seed."""
    paths = {seed: root / work.directory(seed) for seed in seeds}
    return {seed: path for seed, path in paths.items() if (path / work.result).exists()}


def figures(experiment: Experiment, arm: Arm, root: Path, seed: int, directory: Path) -> Figures:
    """The figures of one finished run."""
    run = Finished(directory)
    found = {column.title: column.value(run) for column in experiment.columns}
    if arm.critic is not None:
        found[CRITIC_SECONDS] = Finished(root / arm.critic.directory(seed)).summary["seconds"]
    return found


def measure(experiment: Experiment, arms: Sequence[Arm], root: Path, seeds: Sequence[int]) -> Measured:
    """The figures of all runs of these arms that are finished below `root`."""
    return {
        arm.work.name: {
            seed: figures(experiment, arm, root, seed, directory)
            for seed, directory in finished_runs(arm.work, root, seeds).items()
        }
        for arm in arms
    }


def command(work: Work) -> str:
    """What a work runs. The figures of another command do not count."""
    return " ".join((work.command, work.config, *work.settings, *work.options))


def kept(path: Path, arms: Sequence[Arm]) -> Measured:
    """The figures of a file, without those of works whose command has changed since."""
    if not path.exists():
        return {}
    commands = {arm.work.name: command(arm.work) for arm in arms}
    return {
        name: {int(seed): found for seed, found in entry["seeds"].items()}
        for name, entry in json.loads(path.read_text(encoding="utf-8")).items()
        if entry["command"] == commands.get(name)
    }


def keep(path: Path, arms: Sequence[Arm], new: Measured) -> Measured:
    """Adds new figures to the file, in place of those of the same work and seed. Returns all that it has then."""
    before = kept(path, arms)
    merged = {arm.work.name: {**before.get(arm.work.name, {}), **new.get(arm.work.name, {})} for arm in arms}
    entries = {
        arm.work.name: {
            "command": command(arm.work),
            "seeds": {str(seed): found for seed, found in sorted(merged[arm.work.name].items())},
        }
        for arm in arms
        if merged[arm.work.name]
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return merged
