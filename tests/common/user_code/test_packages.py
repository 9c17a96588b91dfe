"""The files of common/user_code that worker processes load by path."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import common.user_code
from common.user_code.packages import RATCHET_PACKAGES, holds_ratchet, package_root


@pytest.mark.parametrize("name", ["packages", "errors", "results", "calls"])
def test_what_a_worker_loads_imports_only_the_standard_library(name):
    tree = ast.parse(Path(common.user_code.__path__[0], f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        else:
            continue
        assert {module.partition(".")[0] for module in modules} <= {*sys.stdlib_module_names}


def test_ratchets_packages_are_those_in_its_directory(tmp_path):
    found = {path.parent.name for path in Path(package_root()).glob("*/__init__.py")} - {"tests"}
    assert found == set(RATCHET_PACKAGES)
    assert holds_ratchet(package_root())
    assert not holds_ratchet(str(tmp_path))
