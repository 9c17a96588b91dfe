"""Expected seconds of each phase of a training step: work (deploy/plan/work.py) divided by measured rates. Runs in the
driver.

A number is one of three kinds. "about": from measured rates. "at least": a part of the phase was not measured, and is
left out. None: there is no rate, and the phase says which one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config.base import Placed
from common.config.ppo import Config
from common.config.sources import ModelSourceConfig
from common.model.size import ModelSize
from deploy.plan import work
from deploy.plan.overlap import OneGpu, fractions, on_one_gpu, overlapping
from deploy.plan.rates import KINDS, Rates, Speed, speed
from deploy.plan.work import Lengths


@dataclass(frozen=True)
class Phase:
    """One phase of a step."""

    name: str
    seconds: float | None
    detail: str  # what is counted; without seconds, why there are none
    at_least: bool = False
    part: bool = False  # of the phase before; the step does not count it again


@dataclass(frozen=True)
class StepSeconds:
    """The phases of a step, and the step."""

    lengths: Lengths
    phases: tuple[Phase, ...]
    step: Phase
    origins: tuple[str, ...]  # of the rates


def step_seconds(
    cfg: Config,
    model: ModelSize,
    reward_models: Sequence[ModelSize],
    rates: Mapping[str, Rates],
    *,
    lengths: Lengths | None = None,
    cache_bytes: int | None = None,
    cores: float | None = None,
    gpus: OneGpu | None = None,
) -> StepSeconds:
    """The seconds of a step with rollouts of these lengths; by default, the longest ones. `rates`: by device.
    `cache_bytes`: KV cache of an engine, if it is known. `cores`: of all nodes, for roles that share them. `gpus`: the
    roles on each GPU, if they are known."""
    lengths = lengths or Lengths.longest(cfg)
    generate = _generate(cfg, model, lengths, rates, cache_bytes)
    score, scoring = _score(cfg, model, reward_models, lengths, rates, gpus)
    learn, *parts = _learn(cfg, model, lengths, rates)
    publish = _publish(cfg, model, rates)
    busy = {**scoring, "generators": generate.seconds or 0.0}
    busy["learner"] = busy.get("learner", 0.0) + (learn.seconds or 0.0)
    step = _step(cfg, (generate, score, learn, publish), busy, gpus, cores=cores)
    workers = {"generators": generate, **dict.fromkeys(scoring, score), "learner": learn if learn.seconds else publish}
    used = {_device(getattr(cfg, section)) for section, phase in workers.items() if phase.seconds is not None}
    origins = tuple(f"{rates[device].kind}: {rates[device].origin}" for device in sorted(used))
    return StepSeconds(lengths, (generate, score, learn, *parts, publish), step, origins)


def _device(section: Placed) -> str:
    return "gpu" if section.gpus > 0 else "cpu"


def _missing(section: Placed, rates: Mapping[str, Rates], *, float32: bool) -> str | None:
    """Why there is no rate for this role, or None if there is one."""
    device = _device(section)
    if device not in rates:
        known = [kind for kind, one in KINDS.items() if one.device == device]
        names = f"--rate {' or '.join(known)}, or --rate FILE with" if known else "--rate FILE takes"
        where = "GPUs" if device == "gpu" else "CPUs"
        return f"no rate for these {where}: {names} what python -m tests.bench.rates --out FILE has measured on one"
    return "rates are measured in bfloat16 only, and this role computes in float32" if float32 else None


def _threads(section: Placed, rates: Rates) -> float:
    """How many times as fast as one thread of a CPU the process is; 1 on a GPU."""
    return rates.threads(section.threads) if rates.device == "cpu" else 1.0


def _generate(
    cfg: Config, model: ModelSize, lengths: Lengths, rates: Mapping[str, Rates], cache_bytes: int | None
) -> Phase:
    engines = cfg.generators
    if missing := _missing(engines, rates, float32=engines.dtype == "float32"):
        return Phase("generate", None, missing)
    found, done = rates[_device(engines)], work.generation(cfg, model, lengths, cache_bytes=cache_bytes)
    rate, faster = found.decoding, _threads(engines, found) * engines.tensor_parallel
    prefill, decode = done.prefill / rate.prefill_per_s, done.decode / rate.decode_per_s
    reading = done.steps * done.step_bytes / rate.read_bytes_per_s
    seconds = max(prefill + decode, reading) if rate.data_sheet else prefill + decode + reading
    overhead = done.steps * rate.step_s + done.rollouts * lengths.response * rate.rollout_s
    detail = f"{engines.min} engine(s), at most {done.running} at once in each, {done.steps:.0f} steps"
    if rate.data_sheet:
        detail += "; by the card's data sheet, not measured"
    if rate.step_s:
        detail += ", plus vLLM's own time on another machine (see below)"
    if cfg.environment is not None:
        detail += "; the time in which environments answer is not counted, and their tokens count as the policy's"
    at_least = rate.data_sheet or engines.tensor_parallel > 1 or cfg.environment is not None
    return Phase("generate", seconds / faster + overhead, detail, at_least)


def _score(
    cfg: Config,
    model: ModelSize,
    reward_models: Sequence[ModelSize],
    lengths: Lengths,
    rates: Mapping[str, Rates],
    gpus: OneGpu | None,
) -> tuple[Phase, dict[str, float]]:
    """The phase, and the seconds of each role that works in it: the reference (with LoRA, the learner) and the reward
    models. They work at the same time unless they share a GPU. All of it comes after generation if all responses end
    together."""
    lora, reference = cfg.learner.lora is not None, cfg.reference
    sources = [source for source in cfg.reward.sources if isinstance(source, ModelSourceConfig)]
    measurer: Placed = cfg.learner if lora else reference
    replicas = cfg.learner.fewest_ranks if lora else reference.min
    float32 = cfg.learner.precision == "fp32" if lora else reference.dtype == "float32"
    budget = cfg.learner.token_budget if lora else reference.max_batch_tokens
    if missing := _missing(measurer, rates, float32=float32):
        return Phase("score", None, missing), {}
    measured = work.measuring(cfg, model, lengths) / replicas
    seconds = {"learner" if lora else "reference": _passes(measured, model, measurer, rates, tokens=budget)}
    measured_at = speed(rates[_device(measurer)].passes, parameters=model.parameters, tokens=budget)
    detail = "reference" if not lora else "the learner without its adapters is the reference"
    if reward_models:
        if missing := _missing(cfg.reward, rates, float32=any(source.dtype == "float32" for source in sources)):
            return Phase("score", None, missing), {}
        tokens = min(source.max_batch_tokens for source in sources) if sources else budget
        seconds["reward"] = sum(
            _passes(work.scoring(cfg, [one], lengths) / cfg.reward.min, one, cfg.reward, rates, tokens=tokens)
            for one in reward_models
        )
        detail += ", and at the same time the reward model(s)"
    whole = max(seconds.values())
    if (together := on_one_gpu(seconds, fractions(cfg, seconds) if gpus is None else gpus)) > whole:
        whole, detail = together, detail.replace("at the same time", "on the same GPU")
    detail += "; less where it overlaps with generation"
    if len(reward_models) < len(cfg.reward.sources):
        detail += "; reward functions and services are not counted"
    return Phase("score", whole, detail, _too_small(measured_at, budget)), seconds


def _passes(
    operations: float, model: ModelSize, section: Placed, rates: Mapping[str, Rates], *, tokens: float
) -> float:
    """Seconds of passes without gradients."""
    found = rates[_device(section)]
    rate = speed(found.passes, parameters=model.parameters, tokens=tokens).per_s
    return operations / rate / _threads(section, found)


def _too_small(measured: Speed, tokens: float) -> bool:
    """True if passes have fewer tokens than any that were measured: their rate is lower."""
    return tokens < 0.9 * measured.tokens


def _learn(cfg: Config, model: ModelSize, lengths: Lengths, rates: Mapping[str, Rates]) -> list[Phase]:
    """The update, and then its parts."""
    learner = cfg.learner
    if missing := _missing(learner, rates, float32=learner.precision == "fp32"):
        return [Phase("learn", None, missing)]
    found, done, ranks = rates[_device(learner)], work.update(cfg, model, lengths), learner.fewest_ranks
    before = _passes(done.before / ranks, model, learner, rates, tokens=done.pass_tokens)
    measured = speed(found.training, parameters=model.parameters, tokens=done.pass_tokens)
    training = done.training / ranks / measured.per_s / _threads(learner, found)
    several = ranks > 1
    small = _too_small(measured, done.pass_tokens)
    at_least = several or small
    parts = [
        Phase("old log-probabilities", before, "passes without gradients", at_least, part=True),
        Phase("passes", training, f"forward and backward, {done.pass_tokens:.0f} tokens each", at_least, part=True),
    ]
    if found.optimizer_bytes_per_s is not None:
        # Its time is that of the memory: more threads do not help.
        moved = done.optimizer_bytes / ranks / found.optimizer_bytes_per_s
        parts.append(Phase("optimizer", moved, f"{cfg.ppo.minibatches} step(s) a pass", several, part=True))
    detail = f"rates of a model with {measured.parameters / 1e6:,.0f}M weights"
    if several:
        detail += f"; {ranks} ranks, whose exchange of weights and gradients was not measured"
    if small:
        detail += f"; passes of at least {measured.tokens:,} tokens were measured, and smaller ones are slower"
    return [Phase("learn", sum(part.seconds or 0 for part in parts), detail, at_least), *parts]


def _publish(cfg: Config, model: ModelSize, rates: Mapping[str, Rates]) -> Phase:
    if missing := _missing(cfg.learner, rates, float32=False):
        return Phase("publish", None, missing)
    found, sent = rates[_device(cfg.learner)], work.published_bytes(model)
    detail = f"{sent / 1e9:.2f} GB"
    if not found.publish_whole:
        detail += ", packing alone: store, network and engines were not measured"
    return Phase("publish", sent / found.publish_bytes_per_s, detail, not found.publish_whole)


def _step(
    cfg: Config, phases: Sequence[Phase], busy: Mapping[str, float], gpus: OneGpu | None, *, cores: float | None
) -> Phase:
    """The step: generate, score and learn, and then publish. `busy`: seconds of each role."""
    if unknown := [phase.name for phase in phases if phase.seconds is None]:
        return Phase("step", None, f"no number for {', '.join(unknown)}")
    *before, publish = (phase.seconds or 0.0 for phase in phases)
    if cfg.max_staleness == 0:
        seconds, detail = sum(before), "one phase after another (max_staleness = 0)"
        if cfg.lent_share:
            detail += "; the engine's sleep and waking were not measured"
    else:
        seconds, detail = overlapping(cfg, busy, fractions(cfg, busy) if gpus is None else gpus, cores=cores)
    at_least = any(phase.at_least for phase in phases) or cfg.lent_share > 0
    return Phase("step", seconds + publish, f"{detail}; then publish", at_least)
