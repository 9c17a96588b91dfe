"""Python imports this first in every process that has this directory on PYTHONPATH."""

import os

if os.environ.get("CHAOS_POINTS"):
    from tests.chaos.points import install

    install()

if engine := os.environ.get("SMALL_ENGINE"):  # the file tests/small_engine.py
    import sys
    from importlib.util import spec_from_file_location

    class Finder:
        """Finds the small engine where vLLM's is looked for."""

        @staticmethod
        def find_spec(name, path, target=None):
            return spec_from_file_location(name, engine) if name == "actors.generation.vllm_engine" else None

    sys.meta_path.insert(0, Finder)
