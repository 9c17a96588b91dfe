"""The rollouts of a run: a table of all of them, and texts and token numbers of those that the page has room for.

Runs anywhere. Reads the journal twice, one step at a time. The first pass reads the numbers of the table, which also
decide which rollouts are kept. The second pass reads the texts and tokens of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from common.types import SampleId
from deploy.report.page import json_text
from deploy.report.sampling import BUDGET, MAX_ROWS, Facts, details_kept, extremes, prompt_of, rows_kept
from deploy.report.steps import Lists, Step, StepFiles, lists
from deploy.report.token_numbers import BYTES_PER_NUMBER, CREDIT, JOURNAL, Pieces, packed, short
from deploy.report.token_text import TokenText
from deploy.report.turns import turn_rows, turns_of

LONGEST_TEXT = 8_000  # characters of a prompt, and of the response of a void rollout
NUMBERS = ("step", "score", "tokens", "staleness", "kl", "clipped")


class Rollouts:
    """Collects the rows of the table, one step after the other."""

    def __init__(self, files: StepFiles, text: TokenText) -> None:
        self._files, self._text = files, text
        self._rows: list[dict[str, Any]] = []
        self._prompts: dict[str, str] = {}  # texts of kept rollouts' prompts, by number
        self._first_prompts: dict[str, int] = {}  # hash of the first text, by number
        self._prompt_sizes: dict[str, int] = {}  # bytes of the first text, by number
        self._void_texts: dict[int, str] = {}  # by row
        self._places: dict[int, list[tuple[int, int]]] = {}  # step -> (row of its table, row here)
        self.has_credit = False

    def read(self) -> None:
        """The first pass."""
        batches = self._files.void_batches()
        for step in self._files.each(self._files.numbers()):
            self._add_voids(step)
            self._add_batch(step, batches.get(step.number))

    def page(self, *, max_rows: int = MAX_ROWS, budget: int = BUDGET) -> tuple[dict[str, Any], dict[str, Any]]:
        """The table, and the details; docs/report.md says which rollouts are kept."""
        facts = self._facts()
        rows = rows_kept(facts, max_rows)
        kept = details_kept(facts, rows, budget)
        place = {row: i for i, row in enumerate(rows)}
        details, pieces = self._details(kept)
        chosen = [self._rows[row] for row in rows]
        names = list(dict.fromkeys(name for row in chosen for name in row["components"]))
        table = {
            **{key: [short(row[key]) for row in chosen] for key in NUMBERS},
            "id": [row["id"] for row in chosen],
            "finish": [row["finish"] for row in chosen],
            "generator": _indexed(row["generator"] for row in chosen),
            "void": _indexed(row["void"] for row in chosen),
            "components": {name: [short(row["components"].get(name)) for row in chosen] for name in names},
            "kept": self._kept_counts(facts, rows, kept),
        }
        if any(row["turns"] for row in chosen):
            table["turns"] = [row["turns"] for row in chosen]
        shown = {prompt_of(row["id"]) for row in (self._rows[i] for i in kept)}
        prompts = {number: text for number, text in self._prompts.items() if number in shown}
        return table, {"rows": {place[row]: detail for row, detail in details.items()}, "prompts": prompts} | pieces

    def _add_voids(self, step: Step) -> None:
        for sample_id, reason, *response in step.metadata.get("voids", []):
            text = (response[0] if response else None) or ""
            self._void_texts[len(self._rows)] = text
            self._rows.append(_row(step.number, sample_id, void=str(reason), extra=_size(text)))

    def _add_batch(self, step: Step, void: str | None) -> None:
        table, credit = step.table, self._files.credit(step, ["kl", "clipped"])
        self.has_credit |= credit is not None
        ids = [
            str(SampleId(*row)) for row in zip(*(table[n].to_pylist() for n in ("epoch", "prompt_index", "replica")))
        ]
        tokens, versions = lists(table, "response_ids"), lists(table, "policy_versions")
        turns, prompts = turn_rows(table), table["prompt"].to_pylist()
        kl, shares = _kl(step, lists(credit, "kl")), _shares(lists(credit, "clipped"), len(ids))
        scores, components = table["score"].to_pylist(), table["components"].to_pylist()
        finish, generators = table["finish_reason"].to_pylist(), table["generator"].to_pylist()
        for i, sample_id in enumerate(ids):
            oldest = versions.row(i) if versions else None
            stale = step.metadata["policy_version"] - int(oldest.min()) if oldest is not None and len(oldest) else 0
            self._places.setdefault(step.number, []).append((i, len(self._rows)))
            length = int(tokens.lengths[i]) if tokens else 0
            found, prompt = turns_of(turns[i], length), prompts[i] or ""
            shares_prompt = self._is_shared(prompt, sample_id)
            self._rows.append(
                _row(
                    step.number,
                    sample_id,
                    void=void,
                    score=scores[i],
                    components=dict(components[i] or ()),
                    tokens=found.sampled,
                    turns=found.count or None,
                    shared=prompt_of(sample_id) if shares_prompt else None,
                    extra=(found.size if found.count else 0) + (0 if shares_prompt else _size(prompt)),
                    finish=finish[i],
                    generator=generators[i],
                    staleness=stale,
                    kl=None if kl is None else float(kl[i]),
                    clipped=None if shares is None else float(shares[i]),
                )
            )

    def _is_shared(self, text: str, sample_id: str) -> bool:
        """True if the prompt is the first one with its number, which the page has once for all rollouts. An environment
        may replace prompts."""
        number, found = prompt_of(sample_id), hash(text)
        if number not in self._first_prompts:
            self._first_prompts[number], self._prompt_sizes[number] = found, _size(text)
        return self._first_prompts[number] == found

    def _facts(self) -> Facts:
        def column(key: str) -> np.ndarray:
            return np.array([np.nan if row[key] is None else row[key] for row in self._rows], np.float64)

        columns = len(JOURNAL) + len(CREDIT) * self.has_credit
        tokens = column("tokens")
        return Facts(
            step=column("step").astype(np.int64),
            ids=[row["id"] for row in self._rows],
            score=column("score"),
            tokens=np.nan_to_num(tokens).astype(np.int64),
            kl=column("kl"),
            clipped=column("clipped"),
            void=np.array([row["void"] is not None for row in self._rows], bool),
            size=200 + np.nan_to_num(tokens) * (columns * BYTES_PER_NUMBER + 6) + column("extra"),
            shared=[row["shared"] for row in self._rows],
            prompt_size=self._prompt_sizes,
        )

    def _kept_counts(self, facts: Facts, rows: list[int], kept: list[int]) -> dict[str, list[int]]:
        """For each class of rollouts: how many the run has, the table has, and the page has with text and tokens."""
        inside, detailed = set(rows), set(kept)
        classes: dict[str, Iterable[int]] = {
            "all": range(len(facts)),
            "void": np.flatnonzero(facts.void).tolist(),
            "extreme": extremes(facts),
            "clipped": np.flatnonzero(facts.clipped > 0).tolist(),
        }
        return {
            name: [len(members := list(found)), sum(i in inside for i in members), sum(i in detailed for i in members)]
            for name, found in classes.items()
        }

    def _details(self, kept: list[int]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
        """The second pass: texts and token numbers of the kept rows."""
        chosen, pieces = set(kept), Pieces(self._text)
        details: dict[int, dict[str, Any]] = {
            row: {"text": text[:LONGEST_TEXT]} for row, text in self._void_texts.items() if row in chosen
        }
        wanted = {
            step: places for step, found in self._places.items() if (places := [p for p in found if p[1] in chosen])
        }
        for step in self._files.each(sorted(wanted)):
            columns = {name: column for name in JOURNAL if (column := lists(step.table, name)) is not None}
            credit = self._files.credit(step, CREDIT)
            columns |= {name: column for name in CREDIT if (column := lists(credit, name)) is not None}
            ids, turns = lists(step.table, "response_ids"), turn_rows(step.table)
            for i, row in wanted[step.number]:
                tokens = ids.row(i) if ids else None
                if tokens is None:
                    continue
                episode = turns_of(turns[i], len(tokens))
                numbers = {name: packed(column.row(i), episode.sampled) for name, column in columns.items()}
                details[row] = {"tokens": pieces.of(tokens.tolist())} | {
                    name: found for name, found in numbers.items() if found is not None
                }
                text = (step.table["prompt"][i].as_py() or "")[:LONGEST_TEXT]
                if (number := self._rows[row]["shared"]) is None:
                    details[row]["prompt"] = text
                else:
                    self._prompts[number] = text
                if episode.count:
                    details[row] |= episode.detail()
        return details, {"pieces": pieces.texts}


def _row(step: int, sample_id: str, **known: Any) -> dict[str, Any]:
    nothing: Mapping[str, Any] = dict.fromkeys(
        ("void", "score", "tokens", "turns", "finish", "generator", "staleness", "kl", "clipped", "shared")
    )
    return {"step": step, "id": sample_id, "components": {}, "extra": 0, **nothing, **known}


def _size(text: str) -> int:
    """Bytes in the page of a text that is cut to LONGEST_TEXT characters."""
    return len(json_text(text[:LONGEST_TEXT]))


def _kl(step: Step, learned: Lists | None) -> np.ndarray | None:
    """KL of each rollout from the reference, nats. Without a credit file, from the sampler's log-probabilities."""
    if learned is not None:
        return learned.sums()
    sampled, reference = lists(step.table, "rollout_logprobs"), lists(step.table, "ref_logprobs")
    if sampled is None or reference is None or not np.array_equal(sampled.lengths, reference.lengths):
        return None
    return sampled.sums() - reference.sums()


def _shares(clipped: Lists | None, rows: int) -> np.ndarray | None:
    return None if clipped is None else clipped.sums() / np.maximum(1, clipped.lengths)


def _indexed(values: Iterable[str | None]) -> dict[str, Any]:
    """A column of texts as {texts, rows}: a row is the index of its text, or -1 for None."""
    texts: dict[str, int] = {}
    rows = [-1 if value is None else texts.setdefault(value, len(texts)) for value in values]
    return {"texts": list(texts), "rows": rows}
