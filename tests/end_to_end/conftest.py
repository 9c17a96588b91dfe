"""Shared by the tests on real Ray.

Ray's workers import the test modules but not this one: an import here costs each of them nothing.
"""

from __future__ import annotations

import pytest

from common.config.base import RayConfig
from deploy.cluster.connection import cluster


@pytest.fixture(scope="module")
def ray_cluster():
    """One cluster for all tests of a module. Yields its nodes."""
    with cluster(RayConfig(object_store_mib=128, dashboard=False)) as nodes:
        yield nodes
