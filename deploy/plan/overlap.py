"""The seconds of a step whose roles work at the same time. Roles on the same device take turns. Runs in the driver;
pure arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from common.config.ppo import Config
from deploy.plan.placement import Placement

Busy = Mapping[str, float]  # by section of the config: seconds that each of its processes works in a step
OneGpu = Sequence[Collection[str]]  # for each GPU the section of each of its processes


def one_gpu(placement: Placement) -> OneGpu:
    """The section of each process on each GPU. Processes with a share of an unknown GPU count as all on one GPU, each
    section once."""
    found: dict[tuple[int, int], list[str]] = {}
    unknown: set[str] = set()
    for place in placement.places:
        for gpu in place.gpus:
            found.setdefault((place.node, gpu), []).append(place.need.section)
        if 0 < place.need.gpus < 1 and not place.gpus:
            unknown.add(place.need.section)
    return [*found.values(), *([sorted(unknown)] if unknown else [])]


def on_one_gpu(busy: Busy, gpus: OneGpu) -> float:
    """The most seconds that one GPU works for these roles. Its processes take turns, also those of one role."""
    return max((sum(busy.get(section, 0.0) for section in sections) for sections in gpus), default=0.0)


def fractions(cfg: Config, busy: Busy) -> OneGpu:
    """The same without places: all roles with a fraction of a GPU count as on one."""
    return [{section for section in busy if 0 < getattr(cfg, section).gpus < 1}]


def overlapping(cfg: Config, busy: Busy, gpus: OneGpu, *, cores: float | None) -> tuple[float, str]:
    """The seconds until all roles have done the work of a step, and a phrase that says what decides them.
    `cores`: of all nodes; None: roles on CPUs take turns."""
    seconds, detail = max(busy.values()), "generating, scoring and learning at the same time (max_staleness above 0)"
    for sections in gpus:
        together = sum(busy.get(section, 0.0) for section in sections)
        if together > seconds:
            names = " and ".join(sorted({section for section in sections if busy.get(section)}))
            seconds, detail = together, f"phases overlap (max_staleness above 0), but {names} share a GPU"
    on_cpus = {section: time for section, time in busy.items() if not getattr(cfg, section).gpus}
    if len(on_cpus) > 1:
        work = sum(time * _threads(cfg, section) for section, time in on_cpus.items())
        together = work / cores if cores else sum(on_cpus.values())
        if together > seconds:
            seconds, detail = together, "phases overlap (max_staleness above 0), and share the cores"
    return seconds, detail


def _threads(cfg: Config, section: str) -> int:
    """The threads of all processes of a section."""
    processes = {
        "learner": cfg.learner.fewest_ranks,
        "generators": cfg.generators.min * cfg.generators.tensor_parallel,
        "reference": cfg.reference.min,
        "reward": cfg.reward.min,
    }
    threads: int = getattr(cfg, section).threads
    return processes[section] * threads
