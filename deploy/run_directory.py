"""The run directory: never overwritten unasked, never shared by two runs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.config import Root, UserError
from common.files import write_whole
from common.types import Rollout, Score, Void


def refuse_overwriting(directory: Path, *, force: bool, can_resume: bool = True) -> None:
    """Raises UserError unless a new run may begin in `directory`."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"run directory {directory} is a file; name another")
    if any(directory.iterdir()):
        if not (directory / "config.toml").exists():
            raise UserError(f"run directory {directory} holds something that is no run; empty it or name another")
        if not force:
            raise UserError(
                f"run directory {directory} exists; {f'go on with --resume {directory}, ' if can_resume else ''}"
                "replace it with --force, or name another"
            )


@contextmanager
def sole_owner(directory: Path, *, make: bool = True) -> Iterator[None]:
    """Makes the directory and holds it: two runs in one would tear its journal. Raises UserError if it is taken."""
    if make:
        directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains in {directory}; stop it first, or name another") from None
        yield
    finally:
        os.close(descriptor)


def is_owned(directory: Path) -> bool:
    """Whether a run goes on in the directory."""
    try:
        with sole_owner(directory, make=False):
            return False
    except FileNotFoundError:
        return False
    except UserError:
        return True


def clear(directory: Path) -> None:
    """Empties the directory, keeping it and whoever holds it. Its config goes last: with it gone it is no run."""
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name == "config.toml"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_config(directory: Path, cfg: Root) -> None:
    """RUN/config.toml: the resolved configuration."""
    write_whole(directory / "config.toml", cfg.to_toml())


def write_answers(
    path: Path, answers: Sequence[tuple[Rollout, Score | Void]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Held-out answers with their scores, one JSON record a line; a void has its reason instead of a score."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for rollout, score in answers:
            record: dict[str, Any] = {
                "prompt": rollout.prompt.text,
                "response": tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True),
                "finish_reason": rollout.finish_reason,
            }
            if isinstance(score, Void):
                record["void"] = score.reason
            else:
                record |= {"score": score.total, "components": dict(score.components), "origins": dict(score.origins)}
            file.write(json.dumps(record) + "\n")
