"""Python imports this first in every process of a run under test, because its directory is on PYTHONPATH."""

import os

if os.environ.get("CHAOS_POINTS"):
    from tests.chaos.points import install

    install()
