"""What a submitted run carries besides the user's directory, and how it begins on the cluster.

`write_package` runs where `ratchet submit` is called, `main` in the job's driver. Config and arguments travel as files
of a package, not as command line or environment: those two are shown to everyone who may list the cluster's jobs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from common.config.ppo import Config
from common.user_code.packages import RATCHET_PACKAGES

PACKAGE = "ratchet_job"
# The job's command. Its parent process is Ray's job supervisor, whose parent is the raylet, and the raylet's command
# line names the interpreter that all the cluster's processes run with: PATH may have another one, or none. -P: a user's
# own `common` in the job's working directory must not hide ours.
ENTRYPOINT = (
    "raylet=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status); "
    r"python=$(tr '\0' '\n' < /proc/$raylet/cmdline | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p'); "
    'exec "${python:-python}" -P -m deploy.cluster.job'
)


def write_package(staging: Path, cfg: Config | None, arguments: Sequence[str]) -> Path:
    """Fills `staging` with Ratchet's packages, and returns one that has the config and arguments of `ratchet train`;
    without a config they name a run to continue. All are in one directory, as in an installation."""
    for name in RATCHET_PACKAGES:
        shutil.copytree(import_module(name).__path__[0], staging / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = staging / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "arguments.json").write_text(json.dumps(list(arguments)), encoding="utf-8")
    if cfg is not None:
        (package / "config.toml").write_text(cfg.to_toml(), encoding="utf-8")
    return package


def command_line(package: Path, address: str) -> list[str]:
    """The arguments of `ratchet` in the job."""
    config = package / "config.toml"
    arguments = json.loads((package / "arguments.json").read_text(encoding="utf-8"))
    return ["train", *([str(config)] if config.exists() else []), *arguments, "--address", address]


def main() -> None:
    [package] = import_module(PACKAGE).__path__
    sys.argv = ["ratchet", *command_line(Path(package), os.environ["RAY_ADDRESS"])]
    from deploy.cli import main as command

    command()


if __name__ == "__main__":
    main()
