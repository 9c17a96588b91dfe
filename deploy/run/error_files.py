"""RUN/errors: the errors of reward sources, each with the answer that caused it. Runs in the driver."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common.files import write_json, write_whole
from common.types import ScoringError, Void
from deploy.run.directory import make_private

DIRECTORY = "errors"
MOST_FILES = 20  # different faults that get a file
MOST_COUNTED = 1000  # different faults that are counted
_COUNTS = "counts.json"
_CHARS = 20_000  # most characters of the prompt and of the response; of a longer text, its end


class ErrorFiles:
    """Writes one file for each different fault of a reward source, with the first answer that caused it. counts.json
    has the number of void rollouts for each fault. A resumed run continues the counts."""

    def __init__(self, run: Path) -> None:
        self._directory = run / DIRECTORY
        self._counts: Counter[str] = Counter()
        self._files: dict[str, str] = {}
        # A new run has no such file. If it cannot be read, the counts start again, because nothing depends on them.
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            for entry in json.loads((self._directory / _COUNTS).read_text(encoding="utf-8")):
                self._counts[entry["fault"]] = int(entry["rollouts"])
                if entry["file"] is not None:
                    self._files[entry["fault"]] = str(entry["file"])

    def keep(self, void: Void) -> Void:
        """Writes the void's error into a file. Returns the void without the error, but with the file's name in its
        reason."""
        if (error := void.error) is None:
            return void
        self._counts[error.fault] += 1
        with suppress(OSError):  # the run continues without the file
            make_private(self._directory)
            if error.fault not in self._files and len(self._files) < MOST_FILES:
                name = f"{len(self._files) + 1:02d}.txt"
                write_whole(self._directory / name, _text(void, error))
                self._files[error.fault] = name
            entries = [
                {"fault": fault, "rollouts": count, "file": self._files.get(fault)}
                for fault, count in self._counts.most_common(MOST_COUNTED)
            ]
            write_json(self._directory / _COUNTS, entries)
        file = self._files.get(error.fault)
        return replace(void, reason=f"{void.reason}; see {DIRECTORY}/{file}" if file else void.reason, error=None)


def _text(void: Void, error: ScoringError) -> str:
    text = (
        f"{void.reason}\n\nsample {void.sample_id}\n\n{error.traceback or 'No traceback.'}\n"
        f"--- prompt ---\n{error.prompt[-_CHARS:]}\n--- response ---\n{error.response[-_CHARS:]}\n"
    )
    return text.encode("utf-8", "backslashreplace").decode()  # UTF-8 cannot encode halves of surrogate pairs
