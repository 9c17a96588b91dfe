"""`ratchet report`: one HTML file that shows a run, from its directory alone. Runs in the driver, or anywhere.

The run may be finished, may still run, or may have crashed. Nothing here imports Ray, torch or vLLM.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import check_replaces, write_whole
from deploy.report.critic import critic_of
from deploy.report.curves import curves_of
from deploy.report.evaluation import evaluation_of
from deploy.report.events import events_of
from deploy.report.page import beginning, render
from deploy.report.rollouts import Rollouts
from deploy.report.run_files import RunFiles, read_config
from deploy.report.sampling import BUDGET, MAX_ROWS
from deploy.report.scores import scores_of
from deploy.report.steps import StepFiles
from deploy.report.token_text import TokenText
from deploy.report.tuning import tuning_of
from deploy.report.variance import variance_of
from deploy.run.lock import is_owned
from deploy.run.record import read_record
from deploy.screen.console import Output, complain

NAME = "report.html"


def run_report(directory: Path, to: Path | None = None) -> Path:
    """Writes the page and prints its path on the last line."""
    target = to or directory / NAME
    if to is not None or directory.is_dir():  # otherwise the message is about the directory
        _check_target(target)
    started = time.perf_counter()
    command = read_record(directory).get("command")
    if command == "evaluate":
        blocks = evaluation_blocks(directory)
    elif command == "tune":
        blocks = tuning_blocks(directory)
    else:
        blocks = page_blocks(RunFiles.read(directory))
    text = render(f"{directory.resolve().name} · Ratchet", blocks)
    try:
        write_whole(Path(os.path.realpath(target)), text)  # a link stays
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another file with --to") from None
    for name in blocks["run"]["unreadable"]:
        complain(f"{directory / name} cannot be read, so the report leaves it out")
    size = f"{len(text) / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s"
    console = Output()
    for line in (f"{_contents(blocks)}; {size}", str(target)):
        console.print(line, markup=False, soft_wrap=True)
    return target


def _check_target(target: Path) -> None:
    """Raises UserError if the page could not be written, if another file would be lost, or if a device would become a
    file."""
    try:
        if not target.exists():
            place = Path(os.path.realpath(target)).parent
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"{target} cannot be written: no file can be made in {place}; name another with --to")
            return
        if not target.is_file():
            raise UserError(f"{target} is not a regular file; name another file with --to")
        check_replaces(target, beginning(), "ratchet report", otherwise="another file with --to")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another file with --to") from None


def _contents(blocks: Mapping[str, Any]) -> str:
    if (evaluation := blocks.get("evaluation")) is not None:
        return f"{len(evaluation['paths'])} policies, answers to {len(evaluation['answers'])} prompts"
    if (tuning := blocks.get("tuning")) is not None:
        return f"{len(tuning['trials'])} trials, {len(tuning['finalists'])} finalists"
    (rollouts, _, detailed), steps = blocks["rollouts"]["kept"]["all"], blocks["run"]["steps"]
    some = "all" if detailed == rollouts else f"{detailed:,}"
    return f"{steps:,} steps, {rollouts:,} rollouts, {some} with text and token numbers"


def page_blocks(run: RunFiles, *, max_rows: int = MAX_ROWS, budget: int = BUDGET) -> dict[str, Any]:
    """The data of the page, by the name of its block."""
    files = StepFiles(run.directory)
    rollouts = Rollouts(files, text := TokenText.of_run(run.directory, str(run.setting("model.path", ""))))
    rollouts.read()
    table, details = rollouts.page(max_rows=max_rows, budget=budget)
    variance = variance_of(run.directory, files.unreadable)
    tabs = ["curves", "rollouts", "critic", *(["variance"] if variance else []), "scores"]
    found = {"tokenizer": text.found, "credit": rollouts.has_credit, "unreadable": files.unreadable, "tabs": tabs}
    return {
        "run": {**_about(run), **found},
        "curves": curves_of(run),
        "events": events_of(run),
        "scores": scores_of(run),
        "critic": critic_of(run, files),
        "variance": variance,
        "rollouts": table,
        "details": details,
    }


def evaluation_blocks(directory: Path) -> dict[str, Any]:
    """The data of the page of an evaluation, by the name of its block."""
    evaluation = evaluation_of(directory)
    return _one_tab(directory, "evaluation", evaluation, finished=evaluation["finished"])


def tuning_blocks(directory: Path) -> dict[str, Any]:
    """The data of the page of a tuning, by the name of its block."""
    tuning = tuning_of(directory, running=is_owned(directory))
    return _one_tab(directory, "tuning", tuning, finished=not tuning["missing"])


def _one_tab(directory: Path, tab: str, data: Mapping[str, Any], *, finished: bool) -> dict[str, Any]:
    """A page with one tab, for a directory of several runs or policies."""
    config = read_config(directory / "config.toml")
    state = "running" if is_owned(directory) else "finished" if finished else "stopped"
    about = _head(directory, read_record(directory), state)
    known = {"model": config.get("model", {}).get("path"), "seed": config.get("seed"), "tabs": [tab]}
    return {"run": {**about, **known, "unreadable": []}, tab: data}


def _head(directory: Path, record: Mapping[str, Any], state: str) -> dict[str, Any]:
    """What the head and the foot of every page show."""
    starts = record.get("starts")
    starts = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    starts = starts or [{}]
    return {
        "name": directory.resolve().name,
        "directory": str(directory.resolve()),
        "state": state,
        "started": starts[0].get("time"),
        "starts": len(starts),
        "versions": starts[-1].get("versions", {}),
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _about(run: RunFiles) -> dict[str, Any]:
    settings = (
        *("ppo.gamma", "ppo.lam", "ppo.value_lam", "ppo.policy_loss", "ppo.clip_eps", "ppo.clip_eps_high"),
        *("kl.coef", "sampling.max_new_tokens", "rollouts_per_step"),
    )
    return {
        **_head(run.directory, run.record, _state(run)),
        "steps": len(run.metrics),
        "num_steps": None if run.is_critic else run.setting("num_steps"),
        "model": run.setting("model.path"),
        "seed": run.setting("seed"),
        "settings": {name: run.setting(name) for name in settings},
        "last": run.metrics[-1] if run.metrics else {},
        "is_critic": run.is_critic,
        "before": run.evaluations[0] if run.evaluations else None,
        "after": run.evaluations[-1] if run.evaluations else None,
    }


def _state(run: RunFiles) -> str:
    if run.running:
        return "running"
    all_steps = run.is_critic or len(run.metrics) >= run.setting("num_steps", 0)
    return "finished" if run.summary and all_steps else "stopped"
