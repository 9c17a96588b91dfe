"""A run on a cluster of several nodes that come and go, all on this machine: `python elastic_run.py MODEL DIRECTORY`.

A process of its own, because it starts and kills nodes. The run starts with one generator; two nodes join; one is
killed while it generates, the other is drained. The times of all this go to DIRECTORY/happened.json; the run is in
DIRECTORY/run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # read at import; with it Ray listens on loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from common.config.ppo import Config
from common.files import read_records
from deploy.train import run_training
from tests.fakes import tiny_config

ROLLOUTS = 16  # of a step
PREEMPTION = 2  # Ray's number for it
NODE = {"num_cpus": 1, "object_store_memory": 150 << 20}


class Conductor:
    """Changes the cluster step by step, each time once the run directory shows the effect of the last change."""

    def __init__(self, cluster: Cluster, cfg: Config, run: Path) -> None:
        self._cluster, self._cfg, self._run = cluster, cfg, run
        self.happened: dict[str, Any] = {}
        self.ended = threading.Event()

    def events(self, event: str, role: str = "Generator") -> list[dict]:
        return [e for e in read_records(self._run / "pool-events.jsonl") if (e["event"], e["role"]) == (event, role)]

    def steps(self) -> int:
        return len(read_records(self._run / "metrics.jsonl"))

    def wait_for(self, what: str, condition: Callable[[], bool], limit_s: float = 120) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.ended.is_set():
                raise RuntimeError(f"the run ended before: {what}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {limit_s:g} s for: {what}")
            time.sleep(0.1)
        self.happened[what] = time.time()
        self.happened[f"steps when: {what}"] = self.steps()

    def wait_for_steps(self, number: int) -> None:
        wanted = self.steps() + number
        self.wait_for(f"step {wanted}", lambda: self.steps() >= wanted)

    def conduct(self) -> None:
        try:
            self.wait_for("started", lambda: self.steps() >= 3)
            nodes = []
            for _ in range(2):
                nodes.append(self._cluster.add_node(**NODE))
                self.happened[f"added {nodes[-1].node_id}"] = time.time()
            self.wait_for("three generators", lambda: len(self.events("joined")) == 3)
            self.wait_for_steps(4)
            self.happened["killed"] = time.time()
            self._cluster.remove_node(nodes[0], allow_graceful=False)  # SIGKILL of its raylet
            self.wait_for("death noticed", lambda: len(self.events("died")) >= 1)
            self.wait_for_steps(3)
            self.happened["drained"] = time.time()
            deadline_ms = int((time.time() + 60) * 1000)
            gcs = GcsClient(address=self._cluster.address)
            gcs.drain_node(nodes[1].node_id, PREEMPTION, "the machine is wanted back", deadline_ms)
            self.wait_for("left", lambda: len(self.events("left")) == 1)
            self._cluster.remove_node(nodes[1], allow_graceful=True)
            self.wait_for_steps(2)
        except Exception as error:
            self.happened["error"] = str(error)
        finally:
            self._cfg.__dict__["num_steps"] = self.steps() + 2  # the loop reads it at every step


def main(model: str, directory: Path) -> None:
    # A node whose process is gone is noticed after 3 s. A slow answer of a busy machine counts for nothing.
    quick = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 20_000,
        "health_check_failure_threshold": 3,
    }
    head = {**NODE, "num_cpus": 2, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cfg = tiny_config(
        model,
        num_steps=100_000,
        rollouts_per_step=ROLLOUTS,
        max_staleness=1,
        sampling={"max_new_tokens": 40},  # so that each generator always writes
        # The head has a core for the learner and one for a generator; every other generator needs a node.
        generators={"dtype": "float32", "kv_cache_mib": 16, "min": 1, "max": 3, "cpus": 1, "drain_s": 0.2},
        reference={"dtype": "float32", "max_batch_tokens": 4096},
        ppo={"clip_eps": 0.2, "ppo_epochs": 1, "minibatches": 1},
        evaluation={"prompts": 0},
        ray={"address": cluster.address},
    )
    conductor = Conductor(cluster, cfg, directory / "run")
    with ThreadPoolExecutor(1) as threads:  # nodes are started from the main thread
        training = threads.submit(run_training, cfg, directory / "run")
        training.add_done_callback(lambda done: conductor.ended.set())
        try:
            conductor.conduct()
            training.result(120)
        except TimeoutError as error:  # the run hangs, and would not end: the test kills the whole process group
            print(repr(error), conductor.happened, flush=True)
            os._exit(1)
        finally:
            (directory / "happened.json").write_text(json.dumps(conductor.happened, indent=2))
            cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
