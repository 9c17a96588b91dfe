"""`ratchet submit`: a run of PPO as a Ray job, on a cluster that need not have Ratchet installed.

Runs in a process of its own, which is not the driver of the run. It sends Ratchet's own packages, the current directory
(reward functions, prompts) and the config, but no environment variables. So API keys must be set where the cluster's
processes are started.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import aiohttp
import ray
import typer
from ray._private import ray_constants
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.job_submission import JobSubmissionClient

from actors.scoring.kinds import kind_of
from common.config.ppo import Config
from common.data.source_names import ParsedSource, matching_files, parsed_source
from common.errors import UserError
from common.memory import MIB
from common.user_code.functions import load_function
from common.user_code.import_path import IMPORT_FROM
from deploy.cluster.addresses import refused
from deploy.cluster.job import ENTRYPOINT, shown_of_job, write_package
from deploy.ending import signals
from deploy.ending.limits import limited
from deploy.run.provenance import IN_A_JOB
from deploy.screen.console import Lenient, complain, printable

EXCLUDED = ["/runs", "__pycache__"]  # not sent, in addition to what Ray, .gitignore and .rayignore exclude
AGENT_S = 30  # longest wait for the agent of a cluster that has just started
ANSWER_S = 60  # longest wait for an answer of the cluster
SEND_S = 600  # longest wait until the cluster has the files and has started the job
NO_AGENT = (
    f"the cluster's head node has no agent that takes jobs, and none came in {AGENT_S} s; its dashboard_agent.log says "
    "why: if another program has the agent's port, start the cluster with --dashboard-agent-listen-port=0"
)
LIMIT = ray_constants.DASHBOARD_CLIENT_MAX_SIZE  # largest request that the cluster accepts, bytes


def submit_run(
    cfg: Config,
    arguments: Sequence[str],
    directory: Path,
    *,
    resume: bool,
    modules: Sequence[Path],
    address: str,
    follow: bool,
) -> int:
    """Sends `ratchet train` with these arguments and, for a new run, this config; returns the exit code. Functions are
    also imported from the directories `modules`, which are relative to the current one.

    Everything that can be checked here is checked before anything is sent; models cannot, because they are on the
    cluster.
    """
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # otherwise Ray prints a line for every package that is sent
    check_travels(cfg, Path.cwd())
    with no_proxy_for(address):
        with limited(f"the first request to the cluster at {address}", ANSWER_S):
            client = _connect(address)
        try:
            sending = limited(f"sending the job to the cluster at {address}", SEND_S)
            with sending, tempfile.TemporaryDirectory(prefix="ratchet-") as staging:
                write_package(Path(staging), None if resume else cfg, arguments)
                # All packages in one directory, as in an installation: Ray would put each into its own directory.
                ours = client._upload_package_if_needed(staging, include_gitignore=False)
                job = _submit(
                    client,
                    entrypoint=ENTRYPOINT,
                    runtime_env={
                        "working_dir": str(Path.cwd()),
                        # Separate from the user's files, which may have the same names. Python finds ours first.
                        "py_modules": [ours],
                        "excludes": EXCLUDED,
                        "env_vars": {IN_A_JOB: "1", IMPORT_FROM: json.dumps([str(path) for path in modules])},
                    },
                    metadata={"run": str(directory), **shown_of_job(directory)},
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"the cluster at {address} did not take the job: {error}") from error
        _print_commands(job, directory, address)
        return _follow(client, job) if follow else 0


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """Submits the job. Retries for AGENT_S, since a cluster that has just started has no agent yet to run jobs."""
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise UserError(NO_AGENT) from error
        time.sleep(0.5)


def _print_commands(job: str, directory: Path, address: str) -> None:
    """Prints Ray's commands for the job."""
    at = f"{job} --address {address}"
    typer.echo(
        f"submitted {job}; run directory on the cluster: {directory}\n"
        f"follow: ray job logs --follow {at}\nstop:   ray job stop {at}\nlist:   ray job list --address {address}"
    )


def check_travels(cfg: Config, directory: Path) -> None:
    """Raises UserError if the current directory is too large to send, or does not have the prompts or functions of the
    config."""
    sent: dict[Path, int] = {}

    def visit(path: Path) -> None:
        if path.is_file():
            sent[path.relative_to(directory)] = path.stat().st_size

    default = ray_constants.get_runtime_env_default_excludes()
    _dir_travel(directory, [_get_excludes(directory, [*default, *EXCLUDED])], visit, include_gitignore=True)
    if (size := sum(sent.values())) > LIMIT:
        largest = max(sent, key=lambda path: sent[path])
        raise UserError(
            f"the current directory, which is sent with the job, has {size / MIB:.0f} MiB, but the limit is "
            f"{LIMIT / MIB:.0f} (largest: {largest}); exclude files with .gitignore or .rayignore"
        )
    prompts = {"prompts.train": cfg.prompts.train, "prompts.heldout": cfg.prompts.heldout}
    for key, source in prompts.items():
        if source is None or os.path.isabs(os.path.expanduser(source)):
            continue
        named = parsed_source(source, key)
        if named.kind == "function":
            load_function(source, key)
        elif named.kind in ("files", "directory") and not _all_sent(_files(named), sent):
            raise UserError(
                f"{key} ({source}) would not be sent with the job: it must be in the current directory and not be "
                "excluded there, or have an absolute path that the cluster's nodes see"
            )
    for reward_source in (*cfg.reward.sources, *cfg.evaluation.judges):
        kind_of(reward_source).check_travels(reward_source, cfg.reward)


def _files(named: ParsedSource) -> list[str]:
    """The files of a source: those that match its pattern, or all files below its directory."""
    if named.kind == "directory":
        return [str(path) for path in Path(named.name).rglob("*") if path.is_file()]
    return matching_files(named.name)


def _all_sent(files: Sequence[str], sent: Container[Path]) -> bool:
    return bool(files) and all(Path(os.path.normpath(file)) in sent for file in files)


def _connect(address: str) -> JobSubmissionClient:
    url = _url(address)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10).close()
        with _in_environment(ray_constants.RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE, address):
            return JobSubmissionClient(address)  # otherwise it would prefer RAY_ADDRESS to its argument
    except ray.exceptions.AuthenticationError as error:
        raise refused(f"--address ({address})") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"no Ray dashboard answers at --address ({address}): {error}; it is the URL that ray start --head prints, "
            "port 8265 by default; where it listens on loopback only, use a tunnel"
        ) from error


def _url(address: str) -> SplitResult:
    """Raises UserError if the address is no URL of a dashboard."""
    with suppress(ValueError):  # brackets that do not fit, or no valid port
        url = urlsplit(address)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return url
    raise UserError(f"--address ({address}) must be the URL of the cluster's dashboard, such as http://127.0.0.1:8265")


@contextmanager
def no_proxy_for(address: str) -> Iterator[None]:
    """During the block, requests to this URL's host use no proxy, because they contain the cluster's token."""
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join(filter(None, [others, _url(address).hostname]))
    with _in_environment("no_proxy", hosts), _in_environment("NO_PROXY", hosts):
        yield


@contextmanager
def _in_environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's log to its end. Returns the exit code of the job's driver."""
    log = Lenient()

    async def stream() -> None:
        async for lines in client.tail_job_logs(job):
            log.write(printable(lines))
            log.flush()

    try:
        signals.run(stream())
        while True:
            with limited(f"the request for the state of job {job}, which continues,", ANSWER_S):
                info = client.get_job_info(job)
            if info.status.is_terminal():
                break
            time.sleep(1)
    except (KeyboardInterrupt, OSError, RuntimeError, aiohttp.ClientError) as error:
        reason = f" ({error})" if str(error) else ""
        complain(f"no longer following{reason}; the job continues")
        sys.exit(128 + getattr(error, "number", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 1)
    typer.echo(f"job {job}: {info.status.value.lower()}")
    return 0 if info.status.value == "SUCCEEDED" else info.driver_exit_code or 1
