"""Runs the works of an experiment, one after the other. A finished one is skipped, one that was cut is continued.

ROOT/NAME/seed-0 is the run directory of a work, ROOT/NAME/seed-0.log what it printed, and ROOT/NAME/seed-0.json its
command: a directory that was made with another command is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config.base import Root
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from deploy.demo import has_setting
from tests.results.works import Arm, Work

REPOSITORY = Path(__file__).parents[2]
CONFIGS = "deploy/configs"

ROOTS: dict[str, type[Root]] = {
    "train": Config,
    "train-critic": Config,
    "evaluate": Config,
    "sample-pairs": PairSamplingConfig,
    "train-reward": RewardTrainingConfig,
}

# Runs `ratchet` with these arguments, prints into the file, and returns the exit code.
Ratchet = Callable[[Sequence[str], Path], int]


def ratchet(arguments: Sequence[str], log: Path) -> int:
    """In a process of its own."""
    with open(log, "ab") as file:
        command = [sys.executable, "-P", "-m", "deploy.cli", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=file, check=False).returncode


class Runner:
    """Runs works below `root`. `settings` go to every work that has them, such as generators.gpus=0.4."""

    def __init__(self, root: Path, settings: Sequence[str] = (), run: Ratchet = ratchet) -> None:
        self._root = root.absolute()
        self._settings = tuple(settings)
        self._run = run
        self.failed: list[str] = []

    def run_all(self, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        """Seed by seed, so that an early end leaves whole tables of fewer seeds."""
        for seed in seeds:
            for arm in arms:
                self.bring_to_end(arm.work, seed)

    def bring_to_end(self, work: Work, seed: int) -> bool:
        """True if the work and its needs are finished. A work that fails does not stop the others: a policy that
        collapses may end its run."""
        seed = seed if work.seeded else 0
        if not all(self.bring_to_end(need, seed) for need in work.needs):
            return False
        directory = self._root / work.directory(seed)
        if directory.relative_to(self._root).as_posix() in self.failed:
            return False
        self._remember(work, seed, directory)
        if (directory / work.result).exists():
            return True
        if (directory / "config.toml").exists():
            arguments = [work.command, "--resume", str(directory)]
        else:
            arguments = [*self.command(work, seed), "--run", str(directory)]
        print(f"{time.strftime('%H:%M:%S')} ratchet {' '.join(arguments)}", flush=True)
        began = time.perf_counter()
        code = self._run(arguments, directory.with_suffix(".log"))
        print(f"    exit code {code} after {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            self.failed.append(directory.relative_to(self._root).as_posix())
        return not code

    def command(self, work: Work, seed: int) -> list[str]:
        """The arguments of `ratchet`, without the run directory."""
        places = {f"{{{need.name}}}": str(self._root / need.directory(seed)) for need in work.needs}

        def filled(texts: Sequence[str]) -> list[str]:
            for name, place in places.items():
                texts = [text.replace(name, place) for text in texts]
            return list(texts)

        settings = filled(work.settings)
        settings += [setting for setting in self._settings if has_setting(ROOTS[work.command], setting)]
        return [work.command, f"{CONFIGS}/{work.config}", *settings, f"seed={seed}", *filled(work.options)]

    def _remember(self, work: Work, seed: int, directory: Path) -> None:
        """Raises ValueError if the directory was made with another command."""
        path, command = directory.with_suffix(".json"), self.command(work, seed)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(command) + "\n", encoding="utf-8")
        elif (before := json.loads(path.read_text(encoding="utf-8"))) != command:
            raise ValueError(
                f"{directory} was made with other arguments ({' '.join(before)}); remove it and {path.name}, or name "
                "another directory with --runs"
            )
