"""A run as a Ray job: the metadata that Ray shows, the package that `ratchet submit` sends, and the start of such a
job.

Runs in the driver: `write_package` where `ratchet submit` is called, `main` on the cluster. Config and arguments are
sent as files of a package, because everyone who may list the cluster's jobs can see their command lines and
environments.
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
# The job's command. It runs the Python interpreter of the cluster's processes, because PATH may have another one, or
# none. The command line of the raylet names it: this process's parent is Ray's job supervisor, whose parent is the
# raylet. -P: otherwise a user's own `common` in the job's working directory would hide Ratchet's.
ENTRYPOINT = (
    "raylet=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status); "
    r"python=$(tr '\0' '\n' < /proc/$raylet/cmdline | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p'); "
    'exec "${python:-python}" -P -m deploy.cluster.job'
)


def shown_of_job(run: Path) -> dict[str, str]:
    """Metadata of the Ray job of a run: its name in Ray's dashboard, and where its report is."""
    return {"job_name": f"ratchet {run.name}", "report": (run.absolute() / "report.html").as_uri()}


def write_package(staging: Path, cfg: Config | None, arguments: Sequence[str]) -> Path:
    """Copies Ratchet's packages into `staging` and adds one with the config and the arguments of `ratchet train`, which
    is returned. Without a config, the arguments name a run to continue."""
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
