"""A run at Weights & Biases: config, metrics, evaluations, and a table of samples. Runs in the driver.

W&B's own variables decide where it goes: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY and so on. In offline
mode everything is in RUN/wandb, and `wandb sync` sends it later.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from common.config.base import Root
from common.config.ppo import Config
from common.files import write_json
from deploy.sinks.rows import SAMPLE_COLUMNS, Row, samples

START_S = 30  # longest wait for W&B's answer at the start; at the end of a short run, the process waits for it too
FINISH_S = 20  # longest wait for the last values to be sent; `wandb sync` can send the rest later


class WandbSink:
    """One W&B run for one run directory, also when the run is resumed.

    RUN/wandb/run.json has its id and the place of the last row that was sent. W&B numbers its rows by the same places
    and drops a number that it has already, so a row that a killed run sent without noting it is not there twice.
    """

    def __init__(self, directory: Path, settings: Root) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # its lines would come between the rows of the screen
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; call `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
        self._wandb, self._directory = wandb, directory
        self._logging = settings.logging if isinstance(settings, Config) else None
        self._file = directory / "wandb/run.json"
        self._file.parent.mkdir(exist_ok=True)
        known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        self._sent: int = known.get("sent", -1)
        self._run = wandb.init(
            id=known.get("id"),
            resume="allow" if known else None,
            project=known.get("project") or os.environ.get("WANDB_PROJECT") or "ratchet",
            entity=known.get("entity") or os.environ.get("WANDB_ENTITY"),
            name=os.environ.get("WANDB_NAME") or directory.resolve().name,
            dir=directory,
            config=settings.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=START_S, finish_timeout=FINISH_S),
        )
        self._note()
        self._run.define_metric("*", step_metric="step")
        self.shown_at = self._run.url or f"wandb sync {self._run.settings.sync_dir}"

    def write(self, row: Row) -> None:
        if row.place <= self._sent:
            return
        values: dict[str, Any] = {"step": row.step, **row.values}
        logging = self._logging
        if logging and not row.is_evaluation and row.step % logging.samples_every == 0:
            rows = samples(self._directory, row.step, logging.samples)
            if rows:
                values["samples"] = self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)
        self._run.log(values, step=row.place, commit=True)
        self._sent = row.place
        self._note()

    def close(self) -> None:
        self._run.finish()

    def _note(self) -> None:
        run = self._run
        write_json(self._file, {"id": run.id, "project": run.project, "entity": run.entity, "sent": self._sent})
