"""The numbers of one finished run, from its directory: metrics.jsonl, evaluations.jsonl and RUN/credit."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from common.files import read_records

# The phases of a step that the run waits for. Evaluations, checkpoints and the start of the engines do not count.
PHASES = ("time/generate_s", "time/score_s", "time/journal_s", "time/learn_s", "time/publish_s")


class Finished:
    """One run of `ratchet train`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def config(self) -> dict[str, Any]:
        return tomllib.loads((self.directory / "config.toml").read_text(encoding="utf-8"))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return sorted(read_records(self.directory / "metrics.jsonl"), key=lambda record: record["step"])

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return sorted(read_records(self.directory / "evaluations.jsonl"), key=lambda record: record["policy_version"])

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))

    def mean(self, key: str, *, last: int = 0) -> float | None:
        """The mean of a metric over all steps that have it, or over the `last` of them."""
        values = [record[key] for record in self.metrics if key in record]
        return float(np.mean(values[-last:])) if values else None

    def first_version(self, pass_rate: float) -> int | None:
        """The first policy version that passes on this share of the held-out prompts."""
        return next((e["policy_version"] for e in self.evaluations if (e["pass_at_1"] or 0) >= pass_rate), None)

    def responses_to(self, pass_rate: float) -> float | None:
        version = self.first_version(pass_rate)
        return None if version is None else version * self.config["rollouts_per_step"]

    def seconds_to(self, pass_rate: float) -> float | None:
        """Seconds in the phases of all steps before that version."""
        version = self.first_version(pass_rate)
        if version is None:
            return None
        return sum(record.get(key, 0.0) for record in self.metrics if record["step"] < version for key in PHASES)

    def last_pass_rate(self) -> float | None:
        return self.evaluations[-1]["pass_at_1"] if self.evaluations else None

    def best_pass_rate(self) -> float | None:
        rates = [e["pass_at_1"] for e in self.evaluations if e["pass_at_1"] is not None]
        return max(rates) if rates else None

    def lost_pass_rate(self) -> float | None:
        """The best held-out pass@1 less the last one."""
        best, last = self.best_pass_rate(), self.last_pass_rate()
        return None if best is None or last is None else best - last

    def advantage_variances(self) -> Iterator[tuple[int, float]]:
        """Step, and the variance of the advantages of all tokens before whitening. From RUN/credit, which has them
        with and without a critic."""
        for path in sorted((self.directory / "credit").glob("step-*.parquet")):
            column = pq.read_table(path, columns=["advantages"])["advantages"]
            values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            yield int(path.stem.removeprefix("step-")), float(values.astype(np.float64).var())

    def first_advantage_variance(self) -> float | None:
        return dict(self.advantage_variances()).get(0)

    def mean_advantage_variance(self) -> float | None:
        found = [variance for _, variance in self.advantage_variances()]
        return float(np.mean(found)) if found else None

    def judged_at_kl(self, judge: str, kl: float) -> float | None:
        """The mean score of a judge where the KL per response first reaches `kl`, between two evaluations: on the
        straight line that joins them. None if no evaluation reaches it."""
        before: tuple[float, float] | None = None
        for record in self.evaluations:
            here = record["kl_per_response"], record["components"][judge]
            if here[0] >= kl:
                if before is None or here[0] == before[0]:
                    return here[1]
                share = (kl - before[0]) / (here[0] - before[0])
                return before[1] + share * (here[1] - before[1])
            before = here
        return None

    def last_judged(self, judge: str) -> float | None:
        return self.evaluations[-1]["components"].get(judge) if self.evaluations else None

    def last_kl(self) -> float | None:
        return self.evaluations[-1]["kl_per_response"] if self.evaluations else None
