"""The parts that all trees of settings use: sections, bounds of numbers, and sections that several trees have.

Runs anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]
MOST_PROCESSES = 10_000  # of one role; the check of the cluster's room lists each of them
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]


def _number_or_length(value: Any) -> Any:
    """Raises one message for a wrong value. pydantic would give one for each type of the union."""
    if value != "length":
        with suppress(TypeError, ValueError):
            if not isinstance(value, bool) and 0 <= float(value) <= 1:
                return float(value)
        raise ValueError(f'must be a number from 0 to 1, or "length"; it is {value!r}')
    return value


Lambda = Annotated[
    Annotated[float, Field(ge=0, le=1)] | Literal["length"], BeforeValidator(_number_or_length)
]  # of GAE
WEB_ADDRESS = r"https?://[^\s/@?#]+(/[^\s@?#]*)?"  # without a user, a password or a query: configs are not secret
WebAddress = Annotated[str, Field(pattern=f"^{WEB_ADDRESS}$")]
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"  # as Ray and Kubernetes write the two parts of a label


def _node_labels(given: Mapping[str, str]) -> Mapping[str, str]:
    for key, value in given.items():
        if not (re.fullmatch(rf"([a-z0-9.-]{{1,253}}/)?{_LABEL}", key) and re.fullmatch(_LABEL, value)):
            raise ValueError(
                f"{key} = {value!r} is not a label of a Ray node: both parts need letters and digits, 63 at most, with "
                '-, _ and . between them; write it as in { group = "generators" }'
            )
    return given


NodeLabels = Annotated[Mapping[str, str], AfterValidator(_node_labels)]
# Marks a setting, or a whole section of a root, that may change when a run continues. Such a setting does not decide
# what is learned. It may decide how it is computed, so that a run can get past a crash: steps that are repeated with
# another value agree up to rounding. All other settings are fixed when the run begins.
MAY_CHANGE = "may change on --resume"
MayChange = Annotated[T, MAY_CHANGE]
# Marks a setting that decides what is learned, and may change when a run continues. The journal records the step from
# which the new value holds, so that every replay changes it at the same step.
RECORDED = "may change with --change on --resume, from a recorded step on"
Recorded = Annotated[T, RECORDED]


class Section(BaseModel):
    """A frozen group of settings. An unknown key is an error."""

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
    """The resources that each process of a role takes from the cluster."""

    cpus: Annotated[float, Field(ge=0)] = 0
    """CPU cores each process reserves in Ray's bookkeeping; 0: it reserves none and shares the cores of its node."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs each process reserves; 0 runs it on the CPU."""
    threads: Positive = 1
    """Compute threads of each process. Two busy processes that both use every core slow each other threefold."""
    cores: MayChange[tuple[NonNegative, ...]] = ()
    """CPU cores that each process may use, with all its threads; all processes of the role share them. Roles that work
    at the same time disturb each other least on separate cores. Empty: the operating system chooses."""
    labels: MayChange[NodeLabels] = {}
    """Ray labels of the nodes that may have the role's processes, such as { group = "generators" }: nodes started with
    ray start --labels group=generators, or nodes of an autoscaler's group with this label. Empty: any node."""


class Pooled(Placed):
    """A role with one or more processes (replicas) that all do the same work."""

    min: MayChange[Processes] = 1
    """Fewest processes the run works with. It starts once this many are ready, and stops (continue with --resume) if
    fewer are ready for longer than max_shortage_s."""
    max: MayChange[Processes | None] = None
    """Most processes the run asks for; the cluster starts them when it has room, now or after nodes join. `ratchet
    scale` changes the number during the run. Left out: min."""
    timeout_s: MayChange[Seconds] = 300
    """Longest wait for an answer, seconds; a longer one is an error that names the replica."""
    probe_timeout_s: MayChange[Seconds] = 30
    """A process that answers no health probe for this many seconds is replaced, even if its calls succeed."""
    drain_s: MayChange[Seconds] = 10
    """Time that a leaving process has to finish its work, seconds. After that, a generator hands its unfinished
    responses to other generators. A process of another role drops its requests, and other processes answer them from
    the beginning."""
    max_shortage_s: MayChange[Seconds] = 600
    """Longest time with fewer than `min` ready processes before the run stops, seconds."""

    if TYPE_CHECKING:  # a setting of each section, under the name that suits the role

        @property
        def in_flight(self) -> int:
            """Requests sent to each process at once."""

    @property
    def max_replicas(self) -> int:
        """Most replicas the run asks for."""
        return self.max or self.min

    @model_validator(mode="after")
    def check_bounds(self) -> Pooled:
        """`max` must be at least `min`."""
        if self.max_replicas < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min}); raise the first or lower the second")
        return self


class Replicated(Pooled):
    """A role whose replicas answer requests."""

    in_flight: MayChange[Positive] = 128
    """Requests sent to each process at once. Further requests wait in the driver; timeout_s does not count that
    wait."""


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "embedded:smollm2-135m-instruct"
    """A Hugging Face directory, a hub name, or the embedded model. Training starts from it, and PPO uses it as its
    reference."""
    trust_remote_code: bool = False
    """Run Python code from the model's directory (`auto_map`) in every process that loads the model. Such code can do
    whatever you can; models that transformers knows need none."""


class RayConfig(Section):
    """The cluster."""

    address: str | None = None
    """HOST:PORT of a running cluster. --address overrides it; it overrides the variable RAY_ADDRESS. Without all three,
    or with local, Ratchet starts a cluster on this machine, on loopback, and stops it at the end."""
    autoscaler: bool = False
    """The running cluster has an autoscaler, which adds nodes for processes that wait for room. At the start of a run,
    only the learner's ranks and the processes that reserve no CPU or GPU must then fit on existing nodes. Other
    processes wait for new nodes, up to startup_timeout_s. False: a run is refused unless the fewest processes that it
    needs fit on existing nodes."""
    object_store_mib: Positive | None = None
    """Shared memory of a cluster started here, MiB: must hold two versions of the weights and the rollouts. Left out:
    what these take, or 1024 if that is more."""
    startup_timeout_s: Seconds = 300
    """Longest start of any role, model loading included, seconds."""
    max_silence_s: Annotated[float, Field(gt=0, le=50)] = 40
    """The run stops (continue with --resume) when the cluster's control service, or the node manager of the driver's
    machine, has not answered for this long, seconds. After 60 s Ray itself would end the driver without a message."""
    dashboard: bool = True
    """Start Ray's dashboard with a cluster started here."""
    prometheus: WebAddress | None = None
    """Address at which Ray's dashboard finds Prometheus (RAY_PROMETHEUS_HOST), such as http://127.0.0.1:9090. This and
    the next two settings are for a cluster started here. Left out: Ray's variables, if they are set."""
    grafana: WebAddress | None = None
    """Address at which Ray's dashboard finds Grafana (RAY_GRAFANA_HOST), such as http://127.0.0.1:3000."""
    grafana_dashboards: str | None = None
    """Directory in which Ray writes its Grafana dashboards (RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR), so that Grafana
    shows them next to Ratchet's; `ratchet monitoring` makes one, DIRECTORY/grafana/dashboards."""


class LoggingConfig(Section):
    """Trackers that get a run's numbers in addition to its directory."""

    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers. tensorboard: event files in RUN/tensorboard. wandb: Weights & Biases, configured by its own variables
    such as WANDB_MODE and WANDB_PROJECT. One that fails is reported once and never ends the run."""

    @model_validator(mode="after")
    def check_sinks_differ(self) -> LoggingConfig:
        """No sink twice."""
        if twice := [name for name in dict.fromkeys(self.sinks) if self.sinks.count(name) > 1]:
            raise ValueError(f"sinks ({', '.join(self.sinks)}) names {twice[0]} twice; name it once")
        return self


class MonitoringConfig(Section):
    """The run's figures for Prometheus, served on this machine only."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of http://127.0.0.1:PORT/metrics; 0: any free port, which is written to RUN/prometheus.json."""
    discovery: str | None = None
    """Directory for a second copy of RUN/prometheus.json during the run. Use one directory for all runs, and let
    Prometheus watch its *.json: it then finds every run. Left out: no copy."""
