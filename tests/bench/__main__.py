"""`make bench`, or `python -m tests.bench [MODULE ...]`: every measurement, each module in a fresh process.

The modules run one after the other, so that none disturbs another; keep the machine quiet meanwhile. Prints a table
and writes runs/bench.json. Exits with 1 if a module failed, not if a number is missed: that is for the reader to judge.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.bench.fresh import call
from tests.bench.results import Result, table, write_results

# Which measurements each module answers with:
MODULES = {
    "learner": ["learner_vs_bare"],
    "mask": ["mask_vs_clip"],
    "credit": ["credit_vs_update", "credit_vs_journal"],
    "memory": ["memory_vs_state"],
    "step": ["step_vs_plain"],
    "overlap": ["overlap_step"],
    "generation": ["generator_vs_vllm"],
    "turns": ["turns_vs_one", "engine_busy"],
    "weights": ["update_vs_memcpy", "publish_vs_memcpy", "changes_vs_full"],
    "scoring": ["scoring"],
    "elastic": ["three_replicas_vs_one"],
    "control": ["rollouts_per_s", "cost_ratio_1000_replicas", "cost_ratio_100k_outstanding"],
}


def main(modules: list[str], path: Path = Path("runs/bench.json")) -> int:
    if unknown := set(modules) - set(MODULES):
        sys.exit(f"{', '.join(sorted(unknown))}: no such benchmark; there are {', '.join(MODULES)}")
    results: dict[str, Result] = {}
    failed = []
    for module in modules or MODULES:
        print(f"{module} ...", flush=True)
        started = time.perf_counter()
        try:
            answers = call(f"tests.bench.{module}:measure")
        except subprocess.CalledProcessError:
            failed.append(module)  # its own traceback is above
            continue
        print(f"{module}: {time.perf_counter() - started:.0f} s", flush=True)
        measured = {name: Result(**answer) for name, answer in answers.items()}
        if missing := set(MODULES[module]) - set(measured):
            failed.append(f"{module} (no {', '.join(sorted(missing))})")
        write_results(path, measured)  # now: a later module may fail
        results |= measured
    print(table(results))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
