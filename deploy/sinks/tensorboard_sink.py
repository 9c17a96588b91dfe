"""A run as TensorBoard event files, RUN/tensorboard. Runs in the driver.

The files are derived: each start of the run writes them again from the records, so no step is in them twice. Only the
`tensorboard` package writes them, because torch's writer would load torch into the driver.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from deploy.sinks.rows import Row


class TensorBoardSink:
    """One event for each row, with all its values."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        place = directory / "tensorboard"
        place.mkdir(exist_ok=True)
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        now = time.time()
        name = f"events.out.tfevents.{now:010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(open(place / name, "wb"))  # noqa: SIM115, `close` closes it
        self._add(Event(wall_time=now, file_version="brain.Event:2"))
        # This event makes a running TensorBoard forget what it has read from the files of an earlier start.
        self._add(Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)))
        self.shown_at = f"tensorboard --logdir {place}"

    def write(self, row: Row) -> None:
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in row.values.items()]
        self._add(self._event(wall_time=row.time, step=row.step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, event) -> None:  # type: ignore[no-untyped-def]
        self._writer.write(event.SerializeToString())
