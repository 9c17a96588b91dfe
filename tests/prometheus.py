"""A real Prometheus for tests: the program, the configuration of docs/monitoring.md, and a server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

DOCS = Path(__file__).parent.parent / "docs/monitoring.md"


def find_prometheus() -> Path:
    """The directory with `prometheus` and `promtool`. Skips the test if neither can be had."""
    found, fault = _find()
    if found is None:
        pytest.skip(f"Prometheus is not installed, and Debian's package cannot be downloaded: {fault}")
    return found


@cache
def _find() -> tuple[Path | None, str]:
    """Where it is not installed, Debian's package is unpacked, which needs no root and starts no service."""
    cached = Path(tempfile.gettempdir()) / f"ratchet-prometheus-{os.getuid()}"
    if found := shutil.which("prometheus"):
        return Path(found).parent, ""
    if (cached / "usr/bin/prometheus").exists():
        return cached / "usr/bin", ""
    cached.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=cached) as staging:
            download = partial(subprocess.run, ["apt-get", "download", "prometheus"], cwd=staging, capture_output=True)
            if download(timeout=120).returncode:  # a slim image has no lists of packages
                subprocess.run(["apt-get", "update"], check=True, capture_output=True, timeout=120)
                download(timeout=120, check=True)
            [package] = Path(staging).glob("prometheus_*.deb")
            subprocess.run(["dpkg", "-x", package, staging], check=True, capture_output=True, timeout=120)
            with suppress(OSError):  # another process of the tests was faster
                (Path(staging) / "usr").rename(cached / "usr")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return None, str(error)
    return cached / "usr/bin", ""


def documented(*, run: Path = Path("/no/run"), discovery: Path = Path("/no/discovery")) -> str:
    """The prometheus.yml of the docs, with real paths for its example paths and a shorter interval."""
    text = DOCS.read_text(encoding="utf-8")
    [yaml] = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    values = {"/path/to/runs/mine": str(run), "/path/to/discovery": str(discovery), "10s": "1s"}
    for placeholder, value in values.items():
        assert placeholder in yaml
        yaml = yaml.replace(placeholder, value)
    return yaml


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def scraping(config: str, directory: Path, address: str = "") -> Iterator[Callable[..., Any]]:
    """Runs a Prometheus with this configuration, after its own checker. Yields a function that asks its HTTP API."""
    programs = find_prometheus()
    address = address or free_address()
    path = directory / "prometheus.yml"
    path.write_text(config)
    checked = subprocess.run([programs / "promtool", "check", "config", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    arguments = [f"--config.file={path}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"]

    def ask(what: str, **parameters: str) -> Any:
        with urlopen(f"http://{address}/api/v1/{what}?{urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]

    with open(directory / "prometheus.log", "wb") as log:
        process = subprocess.Popen([programs / "prometheus", *arguments], stdout=log, stderr=log)
    try:
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], Any], limit_s: float = 60) -> Any:
    """Its first true answer, or its last one."""
    end = time.monotonic() + limit_s
    while True:
        try:
            answer = condition()
        except OSError:  # it does not listen yet
            answer = None
        if answer or time.monotonic() > end:
            return answer
        time.sleep(0.2)
