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
from deploy.report.steps import lists
from learner.ppo.critic_quality import realised_returns

# The phases of a step that the run waits for. Evaluations, checkpoints and the start of the engines do not count.
PHASES = ("time/generate_s", "time/score_s", "time/journal_s", "time/learn_s", "time/publish_s")


class Finished:
    """One run of `ratchet train`, `train-critic` (which has a summary only) or `evaluate` (evaluation.json only)."""

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

    def compared(self, policy: str) -> dict[str, Any]:
        """The figures of a policy in a finished `ratchet evaluate`."""
        return json.loads((self.directory / "evaluation.json").read_text(encoding="utf-8"))["policies"][policy]

    def mean(self, key: str, steps: slice = slice(None)) -> float | None:
        """The mean of a metric over all steps that have it, or over some of them."""
        values = [record[key] for record in self.metrics if key in record][steps]
        return float(np.mean(values)) if values else None

    def largest(self, key: str) -> float | None:
        """The largest value of a metric in any step."""
        return max((record[key] for record in self.metrics if key in record), default=None)

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

    def first_pass_rate(self) -> float | None:
        return self.evaluations[0]["pass_at_1"] if self.evaluations else None

    def last_pass_rate(self) -> float | None:
        return self.last("pass_at_1")

    def best_pass_rate(self) -> float | None:
        rates = [e["pass_at_1"] for e in self.evaluations if e["pass_at_1"] is not None]
        return max(rates) if rates else None

    def lost_pass_rate(self) -> float | None:
        """The best held-out pass@1 less the last one."""
        best, last = self.best_pass_rate(), self.last_pass_rate()
        return None if best is None or last is None else best - last

    def variances(self) -> Iterator[tuple[int, float, float]]:
        """Step, and two variances over all tokens of the step, from RUN/credit: of the realised returns, and of these
        minus the baseline. The second is that of the advantages with lambda 1. The baseline is the critic's value;
        without a critic the advantages are already what is left.

        The advantages that a critic gives in the run say nothing here: with lambda 0.95 a critic that predicts 0
        everywhere has small advantages too, because the score fades.
        """
        gamma = self.config["ppo"]["gamma"]
        for path in sorted((self.directory / "credit").glob("step-*.parquet")):
            table = pq.read_table(path)
            rewards, baseline, advantages = (lists(table, name) for name in ("rewards", "values", "advantages"))
            ends = lists(table, "ends")
            assert rewards is not None
            assert ends is not None
            returns = realised_returns(rewards.values, ends.values, rewards.lengths, gamma=gamma)
            if baseline is not None:
                left = returns - baseline.values
            else:
                assert advantages is not None
                left = advantages.values.astype(np.float64)
            yield int(path.stem.removeprefix("step-")), float(returns.var()), float(left.var())

    def first_variance_left(self) -> float | None:
        return next((left for step, _, left in self.variances() if step == 0), None)

    def share_left(self) -> float | None:
        """The variance that the baseline leaves, as a share of that of the returns: both are sums over all steps."""
        found = list(self.variances())
        total = sum(returns for _, returns, _ in found)
        return sum(left for _, _, left in found) / total if total else None

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

    def judged(self, judge: str) -> list[float]:
        """The mean score of a judge, or of a reward source, in each evaluation."""
        return [record["components"][judge] for record in self.evaluations if judge in record["components"]]

    def last_judged(self, judge: str) -> float | None:
        return next(iter(self.judged(judge)[-1:]), None)

    def best_judged(self, judge: str) -> float | None:
        return max(self.judged(judge), default=None)

    def last(self, key: str) -> float | None:
        """A figure of the last evaluation."""
        return self.evaluations[-1][key] if self.evaluations else None

    def last_kl(self) -> float | None:
        return self.last("kl_per_response")
