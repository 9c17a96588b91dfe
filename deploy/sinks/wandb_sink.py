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
from deploy.sinks.wandb_log import last_row

START_S = 30  # longest wait for W&B's answer at the start; a shorter run waits for it at its end
FINISH_S = 20  # longest wait for the last values to be sent; `wandb sync` can send the rest later


class WandbSink:
    """One W&B run for one run directory, also when the run is resumed. RUN/wandb/run.json has its id.

    A row's number at W&B is its `place`. A resumed run first finds the last number that W&B has, online from the server
    and offline from W&B's own log. So no row is lost or sent twice.
    """

    def __init__(self, directory: Path, settings: Root) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # otherwise it prints lines between the rows of the screen
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; call `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
        self._logging = settings.logging if isinstance(settings, Config) else None
        place = directory / "wandb/run.json"
        place.parent.mkdir(exist_ok=True)
        known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        run = wandb.init(
            id=known.get("id"),
            resume="allow" if known else None,
            project=known.get("project") or os.environ.get("WANDB_PROJECT") or "ratchet",
            entity=known.get("entity") or os.environ.get("WANDB_ENTITY"),
            name=os.environ.get("WANDB_NAME") or directory.resolve().name,
            dir=directory,
            config=settings.model_dump(mode="json"),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=START_S,
                finish_timeout=FINISH_S,
                x_transaction_log_flush_interval=1,  # seconds of rows that a kill can cost offline; they are sent again
            ),
        )
        write_json(place, {"id": run.id, "project": run.project, "entity": run.entity})
        self._sent = last_row(directory, run.id) if run.offline else run.starting_step - 1
        run.define_metric("*", step_metric="step")
        self._wandb, self._run, self._directory = wandb, run, directory
        self.shown_at = run.url or f"wandb sync {run.settings.sync_dir}"

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

    def close(self) -> None:
        self._run.finish()
