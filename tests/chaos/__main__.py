"""`python -m tests.chaos`: kills real runs, audits them, and writes runs/chaos.json."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.chaos import results
from tests.chaos.campaign import Campaign
from tests.chaos.scenarios import ROOT, SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"scenarios; by default all of {', '.join(SCENARIOS)}")
    parser.add_argument("--kills", type=int, default=200, help="signals sent in all")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule and of the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins later than this")
    parser.add_argument("--steps", type=int, help="steps of each run, otherwise its scenario's")
    parser.add_argument("--hang-s", type=float, default=150, help="longest time without a step or a message, seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/chaos.json")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.what if name not in SCENARIOS]:
        parser.error(f"{unknown[0]} is no scenario; they are {', '.join(SCENARIOS)}")
    home = ROOT / "runs/chaos"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    summary: dict = {}

    def keep(campaign: Campaign) -> None:
        nonlocal summary
        summary = results.summarise(campaign.outcomes, campaign.findings, seed=chosen.seed, skipped=campaign.skipped)
        results.write(chosen.results, summary)

    campaign = Campaign(home, chosen.seed, chosen.hang_s, chosen.steps, say=lambda text: print(text, flush=True))
    campaign.run(chosen.what or list(SCENARIOS), chosen.kills, chosen.minutes, keep)
    keep(campaign)  # with the scenarios that were skipped last
    print(results.table(summary))
    return 0 if results.holds(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
