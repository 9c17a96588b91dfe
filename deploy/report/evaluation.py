"""The page of an evaluation: pass@k of all policies, their figures, and answers side by side. Runs anywhere.

`ratchet report` of a directory of `ratchet evaluate` has this tab alone. The evaluation may still run.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from common.files import read_record as parse_record
from common.files import read_records
from deploy.evaluation.answers import place_of
from deploy.evaluation.forgetting_rows import judge_lines
from deploy.evaluation.rows import crossover_lines, figure_rows

MAX_PROMPTS = 24  # most prompts whose answers are shown; with more prompts, every second, third, ... one


def evaluation_of(directory: Path) -> dict[str, Any]:
    """The data of the tab. There are no figures if evaluation.json is missing, or is older than evaluated.json: an
    evaluation that continues may ask for more policies and samples."""
    record = json_file(directory / "evaluation.json")
    asked = json_file(directory / "evaluated.json")
    paths: Mapping[str, Any] = asked.get("policies", {})
    recorded = [(name, figures["path"]) for name, figures in record.get("policies", {}).items()]
    if (recorded, record.get("samples")) != (list(paths.items()), asked.get("samples")):
        record = {}
    found = {
        "paths": dict(paths),
        "base": record.get("base"),
        "samples": asked.get("samples"),
        "finished": bool(record),
        "curves": {},
        "crossovers": {},
        "rows": [],
        "sentences": [],
        "warnings": [],
        "kl": {},
        "answers": _answers(directory, list(paths)),
    }
    if record:
        policies = record["policies"]
        found["curves"] = {name: figures["pass_at_k"] for name, figures in policies.items() if "pass_at_k" in figures}
        found["crossovers"] = {name: of["crossover"] for name, of in policies.items() if "crossover" in of}
        found["rows"] = figure_rows(record)
        found["sentences"] = crossover_lines(record)
        found["warnings"] = judge_lines(record)
        found["kl"] = {name: figures.get("kl_by_position", []) for name, figures in policies.items()}
    return found


def _answers(directory: Path, names: list[str]) -> list[dict[str, Any]]:
    """Some prompts with the first answer of each policy: {question, answers: {name: {text, score or void}}}."""
    prompts = read_records(directory / "prompts.jsonl")
    shown = range(0, len(prompts), max(1, ceil(len(prompts) / MAX_PROMPTS)))
    found: list[dict[str, Any]] = [{"question": prompts[n].get("question", ""), "answers": {}} for n in shown]
    for name in names:
        path = directory / "answers" / f"{name}.jsonl"
        if not path.exists():
            continue
        with open(path, "rb") as lines:  # one after another: there may be very many
            for line in lines:
                prompt, sample = place_of(line) or (-1, -1)
                if sample == 0 and prompt in shown and (answer := parse_record(line)) is not None:
                    about = {"text": str(answer.get("response", "")), "score": answer.get("score")}
                    about |= {"void": str(answer["void"])} if "void" in answer else {}
                    found[shown.index(prompt)]["answers"][name] = about
    return found


def json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none."""
    return (parse_record(path.read_bytes()) if path.is_file() else None) or {}
