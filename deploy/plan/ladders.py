"""The settings that decide whether a run fits, the least harmful change first.

Runs in the driver; pure arithmetic. A ladder is a list of values of one setting, the smallest change first. The ladders
are in this order: those that only divide GPUs in another way, those that make a step slower, those that use other
processes, and those that change what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from actors.generation.kv_cache import bytes_per_sequence
from common.config.base import Root
from common.config.training import CPU_TOKENS
from common.memory import MIB
from common.model.size import ModelSize

Settings = Mapping[str, Any]  # values by key, such as {"learner.ranks": 4}
MOST_RANKS, MOST_PARTS = 64, 8
SHARES = [0.05, *(n / 10 for n in range(1, 11))]  # of a GPU


class Given:
    """The config that is changed, with settings by key."""

    def __init__(self, cfg: Root, model: ModelSize | None) -> None:
        self.cfg, self.model = cfg, model

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting; the default if it is left out, or if this kind of config does not have it."""
        part: Any = self.cfg
        for name in key.split("."):
            part = part[int(name)] if isinstance(part, tuple) else getattr(part, name, None)
            if part is None:
                return default
        return part

    def halved(self, key: str, least: int) -> Iterator[Settings]:
        """Halves the setting again and again. The last value is `least`."""
        value = self.get(key, 0)
        while value > least:
            value = max(value // 2, least)
            yield {key: value}


Values = Callable[[Given], Iterator[Settings]]


def _half(key: str, least: int) -> Values:
    return lambda given: given.halved(key, least)


def _to(key: str, value: Any, *, of: Any) -> Values:
    """A setting that has the value `of` gets another one."""

    def values(given: Given) -> Iterator[Settings]:
        if given.get(key) == of:
            yield {key: value}

    return values


def _larger_share(section: str) -> Values:
    def values(given: Given) -> Iterator[Settings]:
        now = given.get(f"{section}.gpus", 0)
        yield from ({f"{section}.gpus": share} for share in SHARES if 0 < now < share)

    return values


def _smaller_share(section: str) -> Values:
    def values(given: Given) -> Iterator[Settings]:
        now = given.get(f"{section}.gpus", 0)
        yield from ({f"{section}.gpus": share} for share in reversed(SHARES) if share < now <= 1)

    return values


def _reserve_a_cpu(section: str) -> Values:
    """An autoscaler adds nodes only for processes that reserve something."""

    def values(given: Given) -> Iterator[Settings]:
        if given.get("ray.autoscaler") and given.get(f"{section}.cpus") == given.get(f"{section}.gpus") == 0:
            yield {f"{section}.cpus": 1}

    return values


def _on_cpu(section: str) -> Values:
    def values(given: Given) -> Iterator[Settings]:
        if given.get(f"{section}.gpus"):
            yield {f"{section}.gpus": 0}

    return values


def _fewer_cpus(section: str) -> Values:
    """Halves the CPU cores that each process of a section reserves, again and again, down to none."""

    def values(given: Given) -> Iterator[Settings]:
        cpus = given.get(f"{section}.cpus", 0)
        while cpus > 1:
            yield {f"{section}.cpus": (cpus := int(cpus // 2))}
        if cpus:
            yield {f"{section}.cpus": 0}

    return values


def _fewer(section: str) -> Values:
    def values(given: Given) -> Iterator[Settings]:
        yield from ({f"{section}.min": n} for n in range(given.get(f"{section}.min", 1) - 1, 0, -1))

    return values


def _reference_passes(given: Given) -> Iterator[Settings]:
    yield from given.halved("reference.max_batch_tokens", given.get("max_sequence_tokens", 0))


def _reward_passes(given: Given) -> Iterator[Settings]:
    for index in range(len(given.get("reward.sources", ()))):
        source = f"reward.sources.{index}"
        yield from given.halved(f"{source}.max_batch_tokens", given.get(f"{source}.max_tokens", 0))


def _cache(given: Given) -> Iterator[Settings]:
    engines, tokens = given.get("generators"), given.get("max_sequence_tokens")
    if given.model is not None and tokens is not None:
        sequence = bytes_per_sequence(engines, given.model, max_tokens=tokens)[1]
        yield from given.halved("generators.kv_cache_mib", -(-sequence // MIB))


def _running(given: Given) -> Iterator[Settings]:
    if given.get("generators.gpus"):  # only on a GPU the estimate contains the logits of a step
        yield from given.halved("generators.max_running", 16)


def _buffer(given: Given) -> Iterator[Settings]:
    if given.get("max_staleness"):
        step = given.get("rollouts_per_step") * given.get("longest_rollout_bytes")
        yield from given.halved("buffer_mib", -(-step // MIB))


def _fewer_ranks(given: Given) -> Iterator[Settings]:
    fewest, ranks = given.get("learner.min_ranks"), given.get("learner.ranks", 1)
    key = "learner.ranks" if fewest is None else "learner.min_ranks"
    yield from ({key: n} for n in range((fewest or ranks) - 1, 0, -1))


def _more_ranks(given: Given) -> Iterator[Settings]:
    """Doubles the number of ranks again and again. Each rank has a whole GPU."""
    ranks, gpus = given.get("learner.ranks", 1), given.get("learner.gpus", 0)
    while gpus and (ranks := 2 * ranks) <= MOST_RANKS:
        more = {"learner.ranks": ranks}
        if gpus < 1:
            more["learner.gpus"] = 1
        if given.get("learner.min_ranks") is not None:
            more["learner.min_ranks"] = ranks
        yield more


def _more_parts(given: Given) -> Iterator[Settings]:
    parts = given.get("generators.tensor_parallel", 1)
    while given.get("generators.gpus") and (parts := 2 * parts) <= MOST_PARTS:
        yield {"generators.tensor_parallel": parts, "generators.gpus": parts}


def _turns(given: Given) -> Iterator[Settings]:
    """With max_staleness = 0 engines that share the learner's GPU sleep during an update."""
    if 0 < given.get("learner.gpus", 0) < 1 and given.get("max_staleness"):
        yield {"max_staleness": 0}


def _adapters(given: Given) -> Iterator[Settings]:
    learner = given.get("learner")
    if hasattr(learner, "lora") and learner.lora is None and learner.critic_frozen is None:
        yield {"learner.lora.rank": 16}


def _share_from_engine(given: Given) -> Iterator[Settings]:
    """The learner's share of a GPU grows by a twentieth at a time, and the engine's shrinks by as much."""
    learner, engine = given.get("learner.gpus", 0), given.get("generators.gpus", 0)
    if 0 < learner < 1 and 0 < engine < 1:
        for moved in (n / 20 for n in range(1, 20)):
            if engine - moved > 0.01:
                yield {"learner.gpus": round(learner + moved, 4), "generators.gpus": round(engine - moved, 4)}


def _shorter_responses(given: Given) -> Iterator[Settings]:
    """With an environment its limit is halved, down to one turn."""
    turn = given.get("sampling.max_new_tokens", 64)
    if given.get("environment") is None:
        yield from given.halved("sampling.max_new_tokens", 64)
    else:
        yield from given.halved("environment.max_tokens", turn)


SERVICES = {"reference": "the reference", "reward": "the reward process", "labeller": "the labeller"}
REPLICATED = {"generators": "each engine", **SERVICES}
ROLES = {"learner": "the learner", **REPLICATED}
LADDERS: list[tuple[str, Values]] = [
    # The same gradient and the same samples.
    *((f"the autoscaler adds a node for {role}", _reserve_a_cpu(section)) for section, role in REPLICATED.items()),
    *((f"{role} gets more of its GPU", _larger_share(section)) for section, role in ROLES.items()),
    *((f"{role} gets less of its GPU", _smaller_share(section)) for section, role in SERVICES.items()),
    ("the reference scores in smaller passes", _reference_passes),
    ("reward models score in smaller passes", _reward_passes),
    *((f"{role} shares cores with others", _fewer_cpus(section)) for section, role in SERVICES.items()),
    ("the learner shares cores with others", _fewer_cpus("learner")),
    ("each engine shares cores with others", _fewer_cpus("generators")),
    ("the same gradient in more passes", _half("learner.micro_batch_tokens", CPU_TOKENS)),
    ("the engine lends its memory to each update", _to("generators.sleep", True, of=False)),
    # The same, and slower.
    ("each engine step has fewer tokens", _half("generators.max_batched_tokens", 1024)),
    ("each engine works on fewer rollouts at once", _cache),
    ("each engine works on fewer rollouts at once", _running),
    ("the learner gets more of its GPU, and the engine less", _share_from_engine),
    ("each engine gets less of its GPU, and its KV cache is smaller", _smaller_share("generators")),
    ("the learner gets less of its GPU", _smaller_share("learner")),
    ("fewer rollouts wait for the learner", _buffer),
    ("more bytes are sent after a step", _to("generators.updates", "full", of="changes")),
    ("an update takes about a quarter longer", _to("learner.gradient_checkpointing", True, of=False)),
    # The same with other processes.
    ("more GPUs train", _more_ranks),
    ("each engine takes more GPUs", _more_parts),
    *((f"fewer processes of {role}", _fewer(section)) for section, role in SERVICES.items()),
    ("fewer engines generate", _fewer("generators")),
    ("fewer processes train, and a step takes longer", _fewer_ranks),
    *((f"{role} runs on the CPU, far slower", _on_cpu(section)) for section, role in SERVICES.items()),
    # Something else is learned, or with other rounding.
    ("generators wait during an update, and lend it their memory", _turns),
    ("log-probabilities of the reference are rounded more", _to("reference.dtype", "bfloat16", of="float32")),
    ("the engine rounds more", _to("generators.dtype", "bfloat16", of="float32")),
    ("the learner rounds more", _to("learner.precision", "bf16", of="fp32")),
    ("critic and policy share their weights", _to("learner.critic", "shared", of="separate")),
    ("only adapters are trained", _adapters),
    ("responses are cut earlier", _shorter_responses),
    ("longer prompts are refused", _half("prompts.max_tokens", 64)),
    ("the gradient is noisier", _half("rollouts_per_step", 16)),
]
