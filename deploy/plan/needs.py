"""Estimates the CPUs, GPUs and memory of each process of a run, by pure arithmetic. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.generation.kv_cache import CONTEXT_AND_GRAPHS, bytes_per_sequence, bytes_per_value, other_bytes
from common.config.actors import GeneratorsConfig, SourcesConfig
from common.config.base import Placed
from common.config.ppo import Config, LoRAConfig
from common.config.sources import ModelSourceConfig
from common.config.training import TrainerConfig
from common.errors import UserError
from common.memory import MIB
from common.model.size import CONTEXT, ModelSize, pass_bytes
from deploy.plan.object_store import Stored, generator_store, learner_store
from deploy.plan.parts import (
    ENGINE,
    REFERENCE,
    REWARD,
    TRAINER,
    adapter_weights,
    engine_weights,
    gathered,
    kept_until_backward,
    libraries,
    tied,
)
from learner.ppo.frozen import frozen_names

Parts = Mapping[str, int]  # bytes of each part, by name


@dataclass(frozen=True)
class Need:
    """The resources that one process takes."""

    name: str
    section: str  # of the config, for the message
    cpus: float
    gpus: float
    host: Parts  # memory of its machine at its peak, estimated
    device: Parts = field(default_factory=dict)  # memory of each of its GPUs
    lent: float = 0.0  # further share of its GPU that it may fill while the engine there sleeps
    in_turn: Parts = field(default_factory=dict)  # the parts of `device` that exist only while the engine sleeps
    store: Stored = field(default_factory=dict)  # what the object store of its node holds for all its processes
    labels: Mapping[str, str] = field(default_factory=dict)  # that a Ray node must have to run it

    @property
    def memory(self) -> int:
        """Bytes of its machine, without the object store."""
        return sum(self.host.values())


ScoringModel = tuple[ModelSourceConfig, ModelSize]  # a reward source, and the size of its model
Phases = Sequence[Sequence[Need]]  # for each phase of a command, the processes that run at the same time


def needs(cfg: Config, model: ModelSize, reward_models: Sequence[ScoringModel] = ()) -> list[Need]:
    """Every process of a PPO run with an estimate of its peak memory."""
    networks = 2 if cfg.ppo.has_critic and cfg.learner.critic == "separate" else 1
    services = service_needs(cfg, model, reward_models)
    if cfg.learner.lora is not None:  # the learner is its own reference
        services = [need for need in services if need.section != "reference"]
    row = min(cfg.max_sequence_tokens, model.context)
    frozen = _frozen(cfg, model) if networks == 2 else 0
    first, *others = _training(
        "Learner", cfg.learner, model, row=row, networks=networks, lora=cfg.learner.lora, frozen=frozen
    )
    if cfg.ppo.has_critic and cfg.ppo.value_epochs and networks == 1:  # the head trains on states that are kept
        tokens = cfg.rollouts_per_step * cfg.max_response_tokens
        kept = (2 if cfg.learner.precision == "bf16" else 4) * tokens * model.hidden // cfg.learner.fewest_ranks
        first, *others = (_with_host(need, {"states for value epochs": kept}) for need in (first, *others))
    stores = {"generators": generator_store(cfg, model)}
    services = [replace(need, store=stores.get(need.section, {})) for need in services]
    if cfg.lent_share:
        first, services = _taking_turns(first, services, cfg, model)
    return [replace(first, store=learner_store(cfg, model)), *others, *services]


def _taking_turns(learner: Need, services: list[Need], cfg: Config, model: ModelSize) -> tuple[Need, list[Need]]:
    """During an update the engine's weights are in pinned memory of its machine (torch rounds each tensor up to a power
    of two). It keeps only its context and graphs on the GPU, and the learner may fill its share."""
    size = 2 if cfg.learner.precision == "bf16" else 4
    between = pass_bytes(model, cfg.learner.token_budget, value_bytes=size)  # the reference of LoRA, and comparisons
    device = {**learner.device, "one pass": between, "the engine that sleeps": CONTEXT_AND_GRAPHS}
    lasting = ("CUDA", "weights", "optimizer state", "one pass")
    in_turn = {name: size for name, size in device.items() if name not in lasting}
    asleep = {"weights while it sleeps": 2 * bytes_per_value(cfg.generators) * model.parameters}
    engines = [_with_host(need, asleep) if need.section == "generators" else need for need in services]
    return replace(learner, lent=cfg.lent_share, device=device, in_turn=in_turn), engines


def _with_host(need: Need, more: Parts) -> Need:
    """The process with more parts in its machine's memory."""
    return replace(need, host={**need.host, **more})


def service_needs(cfg: Config, model: ModelSize, reward_models: Sequence[ScoringModel] = ()) -> list[Need]:
    """The processes of generators, reference, reward and environment, without the learner."""
    return [
        *generator_needs(cfg.generators, model, max_tokens=cfg.max_sequence_tokens),
        *reference_needs(cfg, model),
        *reward_needs("reward", cfg.reward, reward_models),
        *environment_needs(cfg),
    ]


def environment_needs(cfg: Config) -> list[Need]:
    """The environment processes, if there is an environment. The memory of its class and of its tools is not known, and
    not counted."""
    if (environment := cfg.environment) is None:
        return []
    process = libraries(REWARD, gpus=environment.gpus, dtype="float32")  # it also has the tokenizer of the policy
    return _role("Environments", "environment", environment, environment.min, process, {})


def reference_needs(cfg: Config, model: ModelSize) -> list[Need]:
    """The reference replicas, with this model in them."""
    parts = _scoring([(model, cfg.reference.dtype, cfg.reference.max_batch_tokens)])
    process = libraries(REFERENCE, gpus=cfg.reference.gpus, dtype=cfg.reference.dtype)
    return _role("ReferencePolicy", "reference", cfg.reference, cfg.reference.min, process, parts)


def trainer_needs(cfg: TrainerConfig, model: ModelSize, *, row: int) -> list[Need]:
    """The ranks of reward training. `row` is the longest pair in tokens."""
    return _training("RewardTrainer", cfg, model, row=row, padded=True)


def critic_needs(cfg: Config, model: ModelSize, *, row: int | None = None) -> list[Need]:
    """The ranks of critic training. On a shared trunk they hold its weights, and compute passes without gradients.
    `row`: the longest prompt with its response, in tokens; by default, the longest that the config allows."""
    row, learner = min(row or cfg.max_sequence_tokens, model.context), cfg.learner
    if learner.critic == "separate":
        return _training("CriticTrainer", learner, model, row=row, lora=learner.lora, frozen=_frozen(cfg, model))
    tokens, size = max(row, learner.token_budget), 2 if learner.precision == "bf16" else 4
    weights = (4 if learner.lora is None else size) * model.parameters  # bytes when loaded, see weights_dtype
    on_cpus = learner.ranks > 1 and not learner.gpus  # there each rank first loads all weights
    parts = {
        "weights": weights if on_cpus else weights // learner.fewest_ranks,
        "activations": pass_bytes(model, tokens, value_bytes=size),
    }
    if learner.fewest_ranks > 1:
        parts["gathered weights and gradients"] = gathered(model, 0, value_bytes=size, trains=False)
    process = libraries(TRAINER, gpus=learner.gpus, dtype=learner.precision)
    return _role("CriticTrainer", "learner", learner, learner.fewest_ranks, process, parts, loading=weights)


def _frozen(cfg: Config, model: ModelSize) -> int:
    """Weights of a separate critic that do not train. Raises UserError for a pattern that freezes nothing."""
    frozen = cfg.learner.critic_frozen
    return sum(model.body[name] for name in frozen_names(model.body, frozen)) if frozen else 0


def generator_needs(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int, updated: bool = True) -> list[Need]:
    """The generators. If they are `updated`, each has its weights twice: an engine keeps the old set while it stages a
    new one. On a GPU the staged set is in the machine's memory. A KV cache without a given size must hold one sequence
    of `max_tokens`.

    With updates = "changes" a generator keeps the buckets that deltas are applied to, next to the new ones.
    With tensor parallelism each device has a process of its own, and one more copy in bfloat16 is staged for all of
    them. Raises UserError if vLLM cannot split the model into this many parts."""
    parts = cfg.tensor_parallel
    _check_split(parts, model)
    weights = bytes_per_value(cfg) * (model.parameters if cfg.gpus else engine_weights(model))
    cache = (cfg.kv_cache_mib or 0) * MIB or bytes_per_sequence(cfg, model, max_tokens=max_tokens)[1]
    host = libraries(ENGINE, gpus=cfg.gpus, dtype=cfg.dtype)
    if cfg.updates == "changes":
        host["buckets for deltas"] = 2 * 2 * model.parameters
    if parts > 1:
        host["libraries of its workers"] = parts * ENGINE.libraries
        host["weights for its workers"] = 2 * model.parameters
    if cfg.gpus == 0:
        step = other_bytes(cfg, model) - CONTEXT_AND_GRAPHS
        staged = weights if updated else 0
        host |= {"weights": weights, "staged weights": staged, "KV cache": cache, "one step": step}
        return [Need(f"Generator({i})", "generators", cfg.cpus, 0, host, labels=cfg.labels) for i in range(cfg.min)]
    device = {
        "weights": weights // parts,
        "KV cache" if cfg.kv_cache_mib else "KV cache, at least": cache // parts,
        "CUDA, its graphs and one step": other_bytes(cfg, model),
    }
    # torch rounds each pinned tensor up to a power of two. The staged set of several parts is counted above.
    if parts == 1 and updated:
        host["staged weights"] = 2 * weights
    names = [f"Generator({i})" for i in range(cfg.min)]
    return [Need(name, "generators", cfg.cpus, cfg.gpus, host, device, labels=cfg.labels) for name in names]


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


def reward_needs(section: str, cfg: SourcesConfig, models: Sequence[ScoringModel] = ()) -> list[Need]:
    """The reward processes, each with every reward model of the sources and judges, and a pass of each."""
    half = any(source.dtype == "bfloat16" for source, _ in models)
    process = libraries(REWARD, gpus=cfg.gpus, dtype="bfloat16" if half else "float32")
    parts = _scoring([(model, source.dtype, source.max_batch_tokens) for source, model in models])
    return _role("Reward", section, cfg, cfg.min, process, parts)


def _scoring(models: Sequence[tuple[ModelSize, str, int]]) -> Parts:
    """The parts of a process that scores with these models, each in its dtype and in passes of up to this many
    tokens."""
    return {
        "weights": sum(_value_bytes(dtype) * model.parameters for model, dtype, _ in models),
        "one pass": sum(pass_bytes(model, tokens, value_bytes=_value_bytes(dtype)) for model, dtype, tokens in models),
    }


def _training(
    name: str,
    cfg: TrainerConfig,
    model: ModelSize,
    *,
    row: int,
    networks: int = 1,
    lora: LoRAConfig | None = None,
    frozen: int = 0,
    padded: bool = False,
) -> list[Need]:
    """The ranks. Each holds its share of weights, gradients and optimizer state; activations; a second gradient of the
    output embedding, in case it is shared with the input; and what several ranks gather for a pass.

    A trained weight takes 16 bytes (float32 weight, gradient, two Adam moments). A weight of the base below adapters
    takes 2 or 4 bytes, by precision. Each of the `frozen` weights of a critic takes 4 bytes. Pairs are padded, not
    packed (`padded`), and on CPU they also keep their attention scores. While several ranks load, each holds all
    weights; on GPUs every rank loads them in its machine's memory.
    """
    size = 2 if cfg.precision == "bf16" else 4
    trained = model.parameters if lora is None else adapter_weights(model, lora)
    below = 0 if lora is None else size * model.parameters
    tokens = max(row, cfg.token_budget)
    saved = kept_until_backward(model, tokens, value_bytes=size, checkpointing=cfg.gradient_checkpointing, lora=lora)
    attention = 2 * 4 * tokens * row * model.heads * model.layers if padded and not cfg.gpus else 0
    second = 4 * model.vocabulary * model.hidden if lora is None and tied(model) else 0
    working = {"activations": networks * saved + attention, "second gradient of the embedding": second}
    ranks = cfg.fewest_ranks
    if ranks > 1:
        working["gathered weights and gradients"] = gathered(
            model, working["activations"], value_bytes=size, networks=networks, trains=lora is None
        )
    state = {
        "weights": networks * ((4 * trained + below) // ranks),
        "gradients": 4 * (networks * trained - frozen) // ranks,
        "optimizer state": 8 * (networks * trained - frozen) // ranks,
    }
    loading = networks * (4 * model.parameters if lora is None else below)
    if cfg.gpus == 0 and cfg.ranks > 1:
        state = {"weights, gradients and optimizer state": max(sum(state.values()), loading)}
    process = libraries(TRAINER, gpus=cfg.gpus, dtype=cfg.precision)
    return _role(name, "learner", cfg, ranks, process, state | working, loading=loading)


def _value_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _role(
    name: str,
    section: str,
    cfg: Placed,
    count: int,
    process: Parts,
    parts: Parts,
    *,
    loading: int | None = None,
) -> list[Need]:
    """Processes whose `parts` are in the memory of their device, and `process` in that of their machine. On a GPU they
    first load weights of `loading` bytes in the machine's memory; by default those of `parts`."""
    on_machine, on_gpu = {**process, **parts}, {}
    if cfg.gpus > 0:
        loaded = parts.get("weights", 0) if loading is None else loading
        on_machine = {**process, "weights while they load": loaded}
        on_gpu = {"CUDA": CONTEXT, **parts}
    names = [f"{name}({i})" for i in range(count)]
    return [Need(name, section, cfg.cpus, cfg.gpus, on_machine, on_gpu, labels=cfg.labels) for name in names]
