"""The page of an evaluation: pass@k of all policies, their figures, and answers side by side. Runs anywhere.

`ratchet report` of a directory of `ratchet evaluate` has this tab alone. The evaluation may still run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_record as parse_record
from common.files import read_records
from deploy.evaluation.forgetting_rows import judge_lines
from deploy.evaluation.rows import crossover_lines, figure_rows

MAX_PROMPTS = 24  # whose answers are shown: of many prompts every second, third, ... one


def evaluation_of(directory: Path) -> dict[str, Any]:
    """Everything of the tab. Without evaluation.json there are answers only."""
    record = json_file(directory / "evaluation.json")
    asked = json_file(directory / "evaluated.json")
    paths: Mapping[str, Any] = asked.get("policies", {})
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
    shown = range(0, len(prompts), 1 + (len(prompts) - 1) // MAX_PROMPTS)
    found: list[dict[str, Any]] = [{"question": prompts[n].get("question", ""), "answers": {}} for n in shown]
    for name in names:
        path = directory / "answers" / f"{name}.jsonl"
        if not path.exists():
            continue
        with open(path, "rb") as lines:  # one after another: there may be very many
            for line in lines:
                answer = parse_record(line) or {}
                if answer.get("sample") == 0 and answer.get("prompt") in shown:
                    about = {"text": str(answer.get("response", "")), "score": answer.get("score")}
                    about |= {"void": str(answer["void"])} if "void" in answer else {}
                    found[shown.index(answer["prompt"])]["answers"][name] = about
    return found


def json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none."""
    return (parse_record(path.read_bytes()) if path.is_file() else None) or {}
