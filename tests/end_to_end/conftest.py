"""Shared by the tests on real Ray.

Ray's workers import the test modules but not this one: an import here costs each of them nothing.
"""

from __future__ import annotations

import os
from multiprocessing import forkserver, get_context
from unittest.mock import patch

import pytest

from common.config.base import RayConfig
from deploy.cluster.connection import cluster
from tests import small_engine


@pytest.fixture(scope="module")
def ray_cluster():
    """One cluster for all tests of a module. Yields its nodes."""
    with cluster(RayConfig(object_store_mib=128, dashboard=False)) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def forked_from_vllm(request, tmp_path_factory):
    """The processes of this module are forked from one that has imported vLLM. Other modules' processes are not. vLLM
    leaves files in TMPDIR, so that is one of pytest's directories."""
    forkserver._forkserver._stop()
    get_context("forkserver").set_forkserver_preload(["actors.generation.vllm_engine", request.module.__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t")))
        yield
    forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def small_engines():
    """A small engine in vLLM's place, for runs that test something else."""
    with patch.dict(os.environ, small_engine.variables()):
        yield
