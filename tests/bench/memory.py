"""How much memory does a learner's process take beyond the minimum for training?

memory_vs_state: the largest resident set (VmHWM) of a new process, over weights, gradients and Adam's two moments in
float32: 16 bytes a parameter of policy and critic. Interpreter, libraries, allocator and activations all count. The
process loads a `Learner` with the default settings, makes two updates of two epochs on ragged rollouts, and packs the
weights to publish. It has the environment of Ratchet's workers. Ray is imported, as in theirs, but not running; the
copy of the weights in Ray's object store is outside the process. The parts have the resident set after each stage.

Learners run without glibc's cache of small blocks (`GLIBC_TUNABLES`): a cached block keeps its large free neighbours
from merging. That saves 4 % of the memory. A generator would be slower without the cache.
"""

from __future__ import annotations

from pathlib import Path

from tests.bench.batch import MODEL, batch, config
from tests.bench.fresh import call
from tests.bench.results import Result

BYTES_PER_PARAMETER = 4 * 4
MB = 1e6


def record(model: str) -> dict[str, float]:
    """Resident megabytes of this process at each stage, and the peak until then."""
    import ray  # noqa: F401

    from learner.ppo.learner import Learner

    parts: dict[str, float] = {}
    highest = 0.0  # the kernel reads VmHWM from counters that are a few pages behind, so it may fall a little

    def note(stage: str) -> None:
        nonlocal highest
        now, peak = resident()
        highest = max(highest, peak)
        parts[f"{stage}_mb"], parts[f"{stage}_peak_mb"] = now, highest

    note("imported")
    learner, table = Learner(config(model)), batch(model)
    note("loaded")
    learner.update(table)
    note("first_update")
    learner.update(table)
    note("second_update")
    for _ in learner.publish():  # bucket by bucket, as the object store takes them
        pass
    note("published")
    parameters = sum(parameter.numel() for parameter in learner.network.parameters())
    return parts | {"state_mb": BYTES_PER_PARAMETER * parameters / MB, "parameters": parameters}


def resident() -> tuple[float, float]:
    """Resident set of this process now, and its largest so far, in megabytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    now, peak = (int(status[key].split()[0]) * 1024 / MB for key in ("VmRSS", "VmHWM"))
    return now, peak


def measure() -> dict[str, Result]:
    parts = call("tests.bench.memory:record", MODEL, worker=config(MODEL).learner)
    return {"memory_vs_state": Result(parts["published_peak_mb"] / parts["state_mb"], "<= 1.5", parts)}
