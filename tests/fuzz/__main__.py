"""Fuzzes for a while with new seeds: `python -m tests.fuzz --cases 20000`, or one case again: `... config:17`."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import TARGETS, Fuzzer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"targets, or one case as TARGET:SEED; targets: {', '.join(TARGETS)}")
    parser.add_argument("--cases", type=int, default=2000, help="cases of each target")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="longest time for each target")
    parser.add_argument("--first", type=int, default=secrets.randbelow(10**9), help="first seed; else a new one")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    found = 0
    for what in chosen.what or TARGETS:
        target, _, seed = what.partition(":")
        if target not in TARGETS:
            parser.error(f"{target} is no target; they are {', '.join(TARGETS)}")
        first, count = (int(seed), 1) if seed else (chosen.first, chosen.cases)
        with tempfile.TemporaryDirectory(prefix="fuzz") as directory:
            fuzzer = Fuzzer(target, Path(directory))
            began, done, failed = time.monotonic(), 0, 0
            for number in range(first, first + count):
                if time.monotonic() - began > 60 * chosen.minutes:
                    break
                done += 1
                if (failure := fuzzer.run(number)) is not None:
                    failed += 1
                    print(failure, flush=True)
                    if seed:
                        show(Path(directory) / target / "scratch")
            fuzzer.close()
            took = time.monotonic() - began
            print(f"{target}: {done} cases from seed {first} in {took:.1f} s, {failed} failed", flush=True)
        found += failed
    return 1 if found else 0


def show(scratch: Path) -> None:
    """Prints the input of a case."""
    for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
        print(f"{path.relative_to(scratch)}: {path.read_bytes()[:2000]!r}")


if __name__ == "__main__":
    sys.exit(main())
