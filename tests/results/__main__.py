"""`python -m tests.results`: runs experiments with several seeds, and writes the tables of docs/results.md.

    python -m tests.results list
    python -m tests.results run baselines --seeds 0 1 2     # hours; cut it and start it again as you like
    python -m tests.results table baselines --seeds 0 1 2   # prints the table of the runs that are finished
    python -m tests.results write baselines --seeds 0 1 2   # keeps their figures, and writes the table of all kept ones
    python -m tests.results plot baselines --seeds 0 1 2    # pass@1 by responses, into docs/baselines.png

The runs are ordinary ones, below runs/results. `write` keeps their figures in tests/results/measured/ and writes the
table into docs/results.md. Keep the machine quiet while `baselines` runs: it compares seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.results.curves import plot
from tests.results.experiments import EXPERIMENTS
from tests.results.measured import MEASURED, keep, measure
from tests.results.runner import REPOSITORY, Runner
from tests.results.tables import section, table, written

PAGE = REPOSITORY / "docs/results.md"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.results", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "run", "table", "write", "plot"))
    parser.add_argument("experiment", nargs="?", choices=tuple(EXPERIMENTS))
    parser.add_argument("--arms", nargs="+", default=[], help="only these [default: all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="directory of all runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for every run")
    options = parser.parse_args(arguments)
    if options.action == "list":
        for name, experiment in EXPERIMENTS.items():
            names = ", ".join(arm.work.name for arm in experiment.arms)
            print(f"{name} (about {experiment.minutes} minutes a seed on two cores): {names}")
        return 0
    if options.experiment is None:
        parser.error(f"name an experiment: {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[options.experiment]
    try:
        arms = experiment.chosen(options.arms)
        if options.action == "run":
            runner = Runner(options.runs, options.set)
            runner.run_all(arms, options.seeds)
            print("\n".join(f"failed: {name}, see {options.runs / name}.log" for name in runner.failed))
            return 1 if runner.failed else 0
        if options.action == "plot":
            plot(arms, options.runs, options.seeds, PAGE.parent / f"{options.experiment}.png")
            return 0
        if options.action == "table":
            print(table(experiment, arms, measure(experiment, arms, options.runs, options.seeds)))
            return 0
        if options.arms:
            parser.error("write makes the whole table: leave --arms out")
        new = measure(experiment, arms, options.runs, options.seeds)
        text = section(experiment, options.experiment, arms, keep(MEASURED / f"{options.experiment}.json", arms, new))
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), options.experiment, text), encoding="utf-8")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
