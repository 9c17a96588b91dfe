"""Can it run here? What a config needs, what a cluster has free, and a refusal that says what is missing.

Pure arithmetic, done before anything starts. Ray then decides what runs where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.config.actors import GeneratorsConfig, SourcesConfig
from common.config.base import Placed, RayConfig
from common.config.ppo import Config, LoRAConfig
from common.config.training import TrainerConfig
from common.errors import UserError
from common.model.size import ModelSize

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has free."""

    name: str
    cpus: float
    gpus: float
    memory: int  # bytes


@dataclass(frozen=True)
class Need:
    """What one process takes."""

    name: str
    section: str  # of the config, to say where to turn
    cpus: float
    gpus: float
    memory: int  # bytes, estimated


IMPORTS = 600 * MIB  # torch and transformers, or vLLM, before any weight


def needs(cfg: Config, model: ModelSize, reward_models: Sequence[ModelSize] = ()) -> list[Need]:
    """Every process of a PPO run with an estimate of its peak memory."""
    networks = 2 if cfg.learner.critic == "separate" else 1
    services = service_needs(cfg, model, reward_models)
    if cfg.learner.lora is not None:  # the learner is its own reference
        services = [need for need in services if need.section != "reference"]
    learner = _training(
        cfg.learner, model, row=min(cfg.max_sequence_tokens, model.context), networks=networks, lora=cfg.learner.lora
    )
    return [*_role("Learner", "learner", cfg.learner, cfg.learner.ranks, learner), *services]


def service_needs(cfg: Config, model: ModelSize, reward_models: Sequence[ModelSize] = ()) -> list[Need]:
    """Generators, reference and reward."""
    reference = IMPORTS + _weights(cfg.reference.dtype, model)
    return [
        *generator_needs(cfg.generators, model),
        *_role("ReferencePolicy", "reference", cfg.reference, cfg.reference.min, reference),
        *reward_needs("reward", cfg.reward, reward_models),
    ]


def trainer_needs(cfg: TrainerConfig, model: ModelSize, *, row: int) -> list[Need]:
    """The ranks of reward training; `row` is the longest pair in tokens."""
    return _role("RewardTrainer", "learner", cfg, cfg.ranks, _training(cfg, model, row=row, padded=True))


def generator_needs(cfg: GeneratorsConfig, model: ModelSize) -> list[Need]:
    """An engine on CPU holds the packed copy beside some plain weights, and stages a new set beside the old. Where
    changes are sent, the generator keeps the buckets they are made from, and makes new ones beside them. With tensor
    parallelism each device has a process, which loads its part of what is staged in bfloat16 for all of them. Raises
    UserError if the model cannot be split so."""
    parts = cfg.tensor_parallel
    _check_split(parts, model)
    kept = 2 * _weights("bfloat16", model) if cfg.updates == "changes" else 0
    memory = IMPORTS + 2 * _weights(cfg.dtype, model) + kept + cfg.kv_cache_mib * MIB
    if parts > 1:
        memory += parts * IMPORTS + _weights("bfloat16", model)
    return _role("Generator", "generators", cfg, cfg.min, memory)


def _check_split(parts: int, model: ModelSize) -> None:
    """What vLLM splits must split evenly; it copies key-value heads where there are fewer than parts."""
    even = {
        f"{model.heads} attention heads": model.heads,
        f"feed-forward width ({model.intermediate})": model.intermediate or 0,
        f"vocabulary ({model.vocabulary}, filled up to a multiple of 64)": -(-model.vocabulary // 64) * 64,
    }
    if parts % model.kv_heads:
        even[f"{model.kv_heads} key-value heads, or be a multiple of them"] = model.kv_heads
    for what, number in even.items():
        if number % parts:
            raise UserError(
                f"generators.tensor_parallel ({parts}) must divide the model's {what}; change it, or use another model"
            )


def reward_needs(section: str, cfg: SourcesConfig, models: Sequence[ModelSize] = ()) -> list[Need]:
    """Reward processes, each holding every reward model among the sources; float32 is assumed."""
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
    """Bytes of one rank: its share of weights, gradients and optimizer state, activations, and a second gradient of an
    embedding that is also the head.

    Trained weights take 16 bytes each (float32 weight, gradient, two Adam moments), frozen ones what the precision
    says. For each token, layer and hidden unit about 18 values stay until the backward pass (measured), three of them
    with checkpointing. On CPU rows of pairs, not packed, keep their attention scores too. While they load, ranks hold
    it all.
    """
    size = 2 if cfg.precision == "bf16" else 4
    adapters = 0 if lora is None else 2 * 7 * model.layers * lora.rank * model.hidden  # about seven matrices a layer
    state = 16 * model.parameters if lora is None else size * model.parameters + 16 * adapters
    tokens = max(row, cfg.token_budget)
    saved = (3 if cfg.gradient_checkpointing else 18) * size * tokens * model.layers * model.hidden
    attention = 2 * 4 * tokens * row * model.heads * model.layers if padded and not cfg.gpus else 0
    loading = 4 * model.parameters if cfg.ranks > 1 else 0
    working = networks * saved + attention + 4 * model.vocabulary * model.hidden
    return IMPORTS + networks * max(state // cfg.ranks, loading) + working


def _weights(dtype: str, model: ModelSize) -> int:
    return (2 if dtype == "bfloat16" else 4) * model.parameters


def _role(name: str, section: str, cfg: Placed, count: int, memory: int) -> list[Need]:
    return [Need(f"{name}({i})", section, cfg.cpus, cfg.gpus, memory) for i in range(count)]


def check_kv_cache(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int) -> None:
    """The engine's cache must hold the longest sequence. Raises UserError."""
    bytes_per_value = 2 if cfg.dtype == "bfloat16" else 4
    tokens = min(max_tokens, model.context)
    kv_heads = max(model.kv_heads, cfg.tensor_parallel)  # every device has one at least
    sequence = tokens * 2 * model.layers * kv_heads * model.head_dim * bytes_per_value
    if cfg.kv_cache_mib * MIB < sequence:
        raise UserError(
            f"generators.kv_cache_mib ({cfg.kv_cache_mib}) must hold at least one sequence of {tokens} "
            f"tokens, {-(-sequence // MIB)} MiB with this model; raise it, or lower the longest prompt or "
            "sampling.max_new_tokens"
        )


def check_object_store(cfg: RayConfig, model: ModelSize) -> None:
    """A store made here must hold what is published. Raises UserError."""
    two_versions = 2 * 2 * model.parameters
    if cfg.object_store_mib * MIB < two_versions:
        raise UserError(
            f"ray.object_store_mib ({cfg.object_store_mib}) must hold two versions of the weights, "
            f"{-(-two_versions // MIB)} MiB with this model; raise it"
        )


def place(wanted: Sequence[Need], nodes: Sequence[Node]) -> dict[str, str]:
    """Process name to node name, largest first, each on the first node with room. Raises UserError if one has none."""
    free = [[node.cpus, node.gpus, float(node.memory)] for node in nodes]
    placed: dict[str, str] = {}
    for need in sorted(wanted, key=lambda n: (-n.gpus, -n.memory, -n.cpus)):
        takes = (need.cpus, need.gpus, need.memory)
        # Ray counts in ten-thousandths, so a sum of fractions that is short by rounding still fits.
        fits = [all(have >= take - 1e-4 for have, take in zip(left, takes)) for left in free]
        if True not in fits:
            raise UserError(_refusal(need, wanted, nodes, free))
        chosen = fits.index(True)
        placed[need.name] = nodes[chosen].name
        free[chosen] = [have - take for have, take in zip(free[chosen], takes)]
    return placed


def _refusal(need: Need, wanted: Sequence[Need], nodes: Sequence[Node], free: Sequence[Sequence[float]]) -> str:
    def total(rows: Sequence[Node] | Sequence[Need]) -> str:
        cpus, gpus, memory = (sum(getattr(row, key) for row in rows) for key in ("cpus", "gpus", "memory"))
        return f"{cpus:g} CPUs, {gpus:g} GPUs, {memory / GIB:.1f} GiB of memory"

    section = need.section
    remedies = (
        f"lower {section}.cpus or the number of processes",
        f"lower {section}.gpus, or 0 to run on the CPU",
        f"use a smaller model, fewer {section} processes, or smaller caches and micro-batches",
    )
    takes = (need.cpus, need.gpus, need.memory)
    short = [
        remedy for i, remedy in enumerate(remedies) if takes[i] - 1e-4 > max((left[i] for left in free), default=0.0)
    ] or list(remedies)  # each is there, but not on one node
    return (
        f"no node has room for {need.name}, which takes {total([need])}: the run takes {total(wanted)} in all, "
        f"the cluster of {len(nodes)} node(s) has {total(nodes)} free; {'; '.join(short)}; or add a node"
    )
