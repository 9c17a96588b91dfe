"""A node provider for Ray's autoscaler: each node is a raylet on this machine. Runs in the monitor of a cluster's head.

Ray's own provider, with a directory for each node: with a shared one, each node would delete packages that others use.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

HERE = Path(__file__).parent
DIRECTORY = "FAKE_NODES"  # variable with the directory for the nodes' directories


class FakeNodes(FakeMultiNodeProvider):
    """Starts and ends nodes in this process."""

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        directory = tempfile.mkdtemp(prefix="", dir=os.environ[DIRECTORY])
        with patch.object(
            parameter, "RayParams", partial(parameter.RayParams, temp_dir=directory, node_manager_port=0)
        ):
            super()._create_node_with_resources_and_labels(*args)


def environment(directory: str) -> dict[str, str]:
    """The environment of `ray start --head` with such an autoscaler."""
    return {
        DIRECTORY: directory,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # For the monitor, and for generators with another engine.
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent / "site"))),
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_enable_autoscaler_v2": "1",
    }


def configuration(gcs_address: str, node: dict[str, float], *, most: int) -> dict[str, Any]:
    """What `ray start --head --autoscaling-config` reads: up to `most` nodes with these resources, which go when they
    have been idle for 6 seconds."""
    lists = (
        "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
        "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
    )
    return {
        "cluster_name": "test",
        "max_workers": most,
        "provider": {
            "type": "external",
            "module": f"{__name__.rpartition('.')[2]}.{FakeNodes.__name__}",
            "gcs_address": gcs_address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "generators": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        **{key: [] for key in lists.split()},
    }
