"""The steps that every command with a run directory takes before its own work. Runs in the driver.

A command first owns its run directory (deploy/run/directory.py). `load_inputs` then checks everything a user can get
wrong, with nothing written and nothing started. `session` joins or starts the cluster, fills in settings that depend on
it, and checks that the processes fit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from actors.environments.check import check_environment
from common.config.actors import SourcesConfig
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.config.sources import RewardSource
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.model.size import ModelSize
from deploy.cluster.addresses import named_address
from deploy.cluster.connection import cluster
from deploy.cluster.role_output import role_output_to
from deploy.plan.capacity import check_engine_build, check_kv_cache
from deploy.plan.needs import Phases, ScoringModel
from deploy.plan.object_store import sized
from deploy.plan.plan import AnyConfig
from deploy.plan.planner import Planner, without_stores
from deploy.policy_files import PolicyFiles
from deploy.run.directory import RunDirectory
from deploy.run.leftovers import clear_leftovers
from deploy.source_checks import check_sources, try_sources


@dataclass(frozen=True)
class Inputs:
    """Prompts and reward models of a run, all of them checked."""

    records: Sequence[Sequence[PromptRecord]]  # one list for each setting that names prompts
    reward_models: Sequence[ScoringModel]


def load_inputs(
    cfg: Config | PairSamplingConfig,
    policy: PolicyFiles,
    service: SourcesConfig,
    prompts: Mapping[str, str | None],
    *,
    judges: Sequence[RewardSource] = (),
) -> Inputs:
    """Loads the prompts, given as {setting: source}, and checks them, the reward sources, the environment and the
    sizes of caches. Tries every reward function once, on the first prompt. Raises UserError."""
    sources = [*service.sources, *judges]
    chat = cfg.prompts.format == "chat"
    reward_models = check_sources(sources, chat=chat)
    environment, tools = cfg.environment if isinstance(cfg, Config) else None, []
    if environment is not None:
        tools = check_environment(environment, policy.tokenizer, model=policy.path, chat=chat)
    check_engine_build(cfg.generators)
    check_kv_cache(cfg.generators, policy.size, max_tokens=cfg.max_sequence_tokens)

    policy.check_stop_tokens(cfg.sampling)
    room = policy.prompt_room(cfg.prompts.max_tokens, cfg.max_response_tokens, setting=cfg.max_response_setting)

    def load(setting: str, source: str | None) -> list[PromptRecord]:
        if source is None:
            return []
        return policy.load_prompts(
            source,
            cfg.prompts,
            room=room,
            seed=cfg.seed,
            setting=setting,
            response_setting=cfg.max_response_setting,
            tools=tools,
        )

    records = [load(setting, source) for setting, source in prompts.items()]
    texts = [{record.text for record in part} for part in records]
    if len(texts) > 1 and (shared := set.intersection(*texts)):
        raise UserError(
            f"{' and '.join(prompts)} must not share prompts, because an evaluation on training prompts says nothing; "
            f"they share {len(shared)}, such as {min(shared)!r}: remove them from one"
        )
    try_sources(service, sources, records[0][0], policy.tokenizer, episode=environment is not None)
    return Inputs(records, reward_models)


@contextmanager
def session(
    cfg: AnyConfig,
    command: str,
    owned: RunDirectory,
    phases: Callable[[AnyConfig], Phases],
    *,
    trains: ModelSize | None = None,
    resume: bool = False,
    force: bool = False,
    record: Callable[[], None] = lambda: None,
) -> Iterator[tuple[AnyConfig, Callable[[], None]]]:
    """During the block, this process is connected to the cluster. It must own the run directory.

    Yields the config and a function `begin`. If the command trains a model (`trains`) on GPUs, the config has the size
    of micro-batches. `begin` writes this config into the directory, and calls `record`, which records this start.
    With `force` it first renames the old run. Call it once nothing can refuse the run any more.

    `phases` returns, for a config, the processes that run at the same time in each phase of the run. Raises UserError,
    with the smallest change that fits, if the processes of a phase do not fit the cluster. Some may wait for nodes of
    an autoscaler.
    """
    ray, starts = cfg.ray, named_address(cfg.ray) is None
    if starts:  # the object stores of a running cluster already have their sizes
        ray = sized(ray, [need.store for processes in phases(cfg) for need in processes])

    log = owned.log
    with cluster(ray, owned.directory) as nodes, role_output_to(log.write), log.python_warnings():
        # A run of an older version did not record the size of its micro-batches. It keeps that version's default.
        planner = Planner(
            without_stores(nodes) if starts else nodes,
            phases,
            trains=None if resume else trains,
            engines=trains,
            starts_stores=starts,
        )
        cfg = planner.check(cfg, resume=resume)

        def begin() -> None:
            if resume:
                clear_leftovers(owned.directory)
                record()  # before the config: a new value that only the config has would look like an edit by hand
                owned.resume(cfg)
            else:
                owned.begin(cfg, command, force=force)
                record()

        yield cfg, begin


def step_grace_s(cfg: Config | RewardTrainingConfig) -> float:
    """Longest wait for the current step after a signal, seconds."""
    return cfg.learner.timeout_s if cfg.checkpoint.on_signal else 0.0


# Arguments of gc.set_threshold: net allocations per young collection, young collections per middle one, middle ones per
# full one. CPython's defaults are 700, 10 and 10.
COLLECT_AFTER = (10_000, 10, 100)


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Makes full garbage collections rare. They walk every outstanding rollout and find almost no cycles, because
    reference counting already frees what the loop creates. gc.freeze() exempts objects that exist already: they live as
    long as the run."""
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
