"""What every tree of settings is built from: the section, the bounds of its numbers, and the error for bad input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
MOST_PROCESSES = 10_000  # of one role; each is listed when a run is placed
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Root(Section):
    """A whole config file."""

    @model_validator(mode="before")
    @classmethod
    def refuse_nul(cls, tree: Any) -> Any:
        """No file, model, function or address has a NUL in its name, and most libraries fail on it."""
        if any("\0" in text for text in _texts(tree)):
            raise ValueError("a text has a NUL character in it; remove it")
        return tree

    def to_toml(self) -> str:
        """The resolved tree as `load_config` reads it back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    @model_validator(mode="after")
    def check_rules(self) -> Root:
        """Rules across fields; each message says rule, values and remedy."""
        if faults := list(self._broken_rules()):
            raise ValueError("\n  ".join(faults))
        return self

    def _broken_rules(self) -> Iterator[str]:
        yield from ()


def _texts(tree: Any) -> Iterator[str]:
    """Every text in a tree of tables and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(part)


class Placed(Section):
    """Where a role runs: what each of its processes takes from the cluster."""

    cpus: Annotated[float, Field(ge=0)] = 0
    """CPU cores each process reserves in Ray's bookkeeping; 0 lets it share whatever is there."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs each process reserves; 0 runs it on the CPU."""
    threads: Positive = 1
    """Compute threads of each process. Two busy processes that both use every core slow each other threefold."""
    cores: tuple[NonNegative, ...] = ()
    """CPU cores that each process, and all its threads, keep to; several processes of the role share them. Roles that
    work at the same time disturb each other least on cores of their own. Empty: wherever the scheduler puts it."""


class Replicated(Placed):
    """A role of which there may be several, each able to do the work of any other."""

    min: Processes = 1
    """Processes of this role that the run needs: it starts when so many are ready, and stops, to be gone on with, when
    fewer are for longer than max_shortage_s."""
    max: Processes | None = None
    """As many as are wished for: the cluster gets them as far as it has room, now or when nodes join. `ratchet scale`
    changes the wish. Left out: min."""
    in_flight: Positive = 128
    """Requests each process is sent at once; the others wait their turn, and their time limit does not run."""
    timeout_s: Seconds = 300
    """Longest wait for an answer; what takes longer is an error that names the replica, seconds."""
    probe_timeout_s: Seconds = 30
    """A process that answers no health probe for this long is replaced, however its calls go, seconds."""
    drain_s: Seconds = 10
    """How long a process that must leave may go on with what it has; then a generator hands it over to others, and
    other roles drop it for others to begin again, seconds."""
    max_shortage_s: Seconds = 600
    """How long fewer than `min` may be ready before the run stops, seconds."""

    @property
    def most(self) -> int:
        """Replicas that are wished for."""
        return self.max or self.min

    @model_validator(mode="after")
    def check_bounds(self) -> Replicated:
        if self.most < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min}); raise the first or lower the second")
        return self


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "embedded:smollm2-135m-instruct"
    """A Hugging Face directory, a hub name, or the embedded model. All that is trained starts from it, and it is PPO's
    reference."""
    trust_remote_code: bool = False
    """Whether Python code from the model's directory (`auto_map`) may run, in every process that loads it. Such code
    can do whatever you can; models that transformers knows need none."""


class CheckpointConfig(Section):
    """Learner state on disk."""

    every: Positive = 20
    """Steps between checkpoints. What lies between is done again on resume (PPO: from the journal, without generating
    anything), so this trades disk for time."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    on_signal: bool = False
    """Whether a signal that stops the run (Ctrl-C, SIGTERM, SIGHUP) lets the step under way end and then writes a
    checkpoint. A run that continues then repeats no step, but stopping takes as long as a step; without it, seconds."""


class RayConfig(Section):
    """The cluster."""

    address: str | None = None
    """HOST:PORT of a running cluster; --address goes over it, and it goes over the variable RAY_ADDRESS. With none of
    them, or local, one is started on this machine, on loopback, and stopped at the end."""
    object_store_mib: Positive = 1024
    """Shared memory of a cluster started here, MiB: holds two versions of the weights and a batch or two."""
    startup_timeout_s: Seconds = 300
    """Longest start of any role, model loading included, seconds."""
    dashboard: bool = True
    """Start Ray's dashboard with a cluster started here."""


class MonitoringConfig(Section):
    """The run's figures for Prometheus, on this machine alone."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of http://127.0.0.1:PORT/metrics; 0: any free one, which RUN/prometheus.json names."""
    discovery: str | None = None
    """Directory in which a file names this run to Prometheus while it goes on, beside RUN/prometheus.json. With one
    directory for all runs, Prometheus watches its *.json and finds every run. Left out: none."""
