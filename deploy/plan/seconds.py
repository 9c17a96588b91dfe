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
) -> StepSeconds:
    """The seconds of a step with rollouts of these lengths; by default, the longest ones. `rates`: by device.
    `cache_bytes`: KV cache of an engine, if it is known. `cores`: of all nodes, for roles that share them."""
    lengths = lengths or Lengths.longest(cfg)
    generate = _generate(cfg, model, lengths, rates, cache_bytes)
    score = _score(cfg, model, reward_models, lengths, rates)
    learn, *parts = _learn(cfg, model, lengths, rates)
    publish = _publish(cfg, model, rates)
    step = _step(cfg, generate, score, learn, publish, cores=cores)
    used = {_device(section) for section in (cfg.generators, cfg.reference, cfg.learner)}
    origins = tuple(f"{rates[device].kind}: {rates[device].origin}" for device in sorted(used & rates.keys()))
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
    detail = f"{engines.min} engine(s), {done.running} at once in each, {done.steps:.0f} steps"
    if rate.data_sheet:
        detail += "; by the card's data sheet, not measured"
    return Phase("generate", seconds / faster, detail, rate.data_sheet or engines.tensor_parallel > 1)


def _score(
    cfg: Config,
    model: ModelSize,
    reward_models: Sequence[ModelSize],
    lengths: Lengths,
    rates: Mapping[str, Rates],
) -> Phase:
    """Reference and reward models work at the same time, and after generation if all responses end together."""
    lora, reference = cfg.learner.lora is not None, cfg.reference
    sources = [source for source in cfg.reward.sources if isinstance(source, ModelSourceConfig)]
    measurer: Placed = cfg.learner if lora else reference
    replicas = cfg.learner.fewest_ranks if lora else reference.min
    float32 = cfg.learner.precision == "fp32" if lora else reference.dtype == "float32"
    budget = cfg.learner.token_budget if lora else reference.max_batch_tokens
    if missing := _missing(measurer, rates, float32=float32):
        return Phase("score", None, missing)
    measured = work.measuring(cfg, model, lengths) / replicas
    seconds = [_passes(measured, model, measurer, rates, tokens=budget)]
    measured_at = speed(rates[_device(measurer)].passes, parameters=model.parameters, tokens=budget)
    detail = "reference" if not lora else "the learner without its adapters is the reference"
    if reward_models:
        if missing := _missing(cfg.reward, rates, float32=any(source.dtype == "float32" for source in sources)):
            return Phase("score", None, missing)
        tokens = min(source.max_batch_tokens for source in sources) if sources else budget
        seconds.append(
            sum(
                _passes(work.scoring(cfg, [one], lengths) / cfg.reward.min, one, cfg.reward, rates, tokens=tokens)
                for one in reward_models
            )
        )
        detail += ", and at the same time the reward model(s)"
    detail += "; less where it overlaps with generation"
    if len(reward_models) < len(cfg.reward.sources):
        detail += "; reward functions and services are not counted"
    return Phase("score", max(seconds), detail, _too_small(measured_at, budget))


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


def _step(cfg: Config, generate: Phase, score: Phase, learn: Phase, publish: Phase, *, cores: float | None) -> Phase:
    phases = (generate, score, learn, publish)
    if unknown := [phase.name for phase in phases if phase.seconds is None]:
        return Phase("step", None, f"no number for {', '.join(unknown)}")
    generate_s, score_s, learn_s, publish_s = (phase.seconds or 0.0 for phase in phases)
    one_by_one = generate_s + score_s + learn_s
    together = max(generate_s, score_s, learn_s)
    if cfg.max_staleness == 0:
        seconds, detail = one_by_one, "one phase after another (max_staleness = 0)"
        if cfg.lent_share:
            detail += "; the engine's sleep and waking were not measured"
    elif cfg.generators.gpus == cfg.learner.gpus == 0:
        busy = (
            generate_s * cfg.generators.threads * cfg.generators.tensor_parallel * cfg.generators.min
            + score_s * cfg.reference.threads * cfg.reference.min
            + learn_s * cfg.learner.threads * cfg.learner.fewest_ranks
        )
        seconds = max(together, busy / cores if cores else one_by_one)
        detail = "phases overlap (max_staleness above 0), and share the cores"
    elif 0 < cfg.learner.gpus < 1 and 0 < cfg.generators.gpus < 1:
        seconds, detail = one_by_one, "phases overlap, but share a GPU, so none is faster than one after another"
    else:
        seconds, detail = together, "generating, scoring and learning at the same time (max_staleness above 0)"
    at_least = any(phase.at_least for phase in phases) or cfg.lent_share > 0
    return Phase("step", seconds + publish_s, f"{detail}; then publish", at_least)
