"""A step of a planned run: the seconds of its phases, and the bytes that it moves. Runs in the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.generation.kv_cache import kv_cache_bytes
from common.config.ppo import Config
from common.errors import UserError
from common.model.size import ModelSize
from deploy.plan.machines import THIS_MACHINE
from deploy.plan.models import reward_model_sizes
from deploy.plan.overlap import one_gpu
from deploy.plan.placement import Node
from deploy.plan.plan import Plan
from deploy.plan.rates import find_rates, own_rates
from deploy.plan.seconds import StepSeconds, step_seconds
from deploy.plan.traffic import Flow, homes, traffic
from deploy.plan.work import Lengths


@dataclass(frozen=True)
class Typical:
    """The options of `ratchet plan` for a step."""

    rates: Sequence[str] = ()  # names of kinds or files
    prompt_tokens: float | None = None  # of a rollout; None: the longest that the config allows
    response_tokens: float | None = None

    def check(self, cfg: Config) -> None:
        """Raises UserError for rates that are not known, and for more tokens than a rollout may have."""
        find_rates(self.rates)
        for option, given, setting, most in (
            ("--prompt-tokens", self.prompt_tokens, "prompts.max_tokens", cfg.prompts.max_tokens),
            ("--response-tokens", self.response_tokens, cfg.max_response_setting, cfg.max_response_tokens),
        ):
            if given is not None and not given <= most:  # not a number, too
                raise UserError(
                    f"{option} ({given:g}) must be at most {setting} ({most}); lower it, or raise the setting"
                )

    def lengths(self, cfg: Config) -> Lengths:
        """The tokens of a typical rollout."""
        longest = Lengths.longest(cfg)
        return Lengths(self.prompt_tokens or longest.prompt, self.response_tokens or longest.response)


def plan_step(plan: Plan[Config], model: ModelSize, typical: Typical) -> tuple[StepSeconds, list[Flow]]:
    """The step of a run that fits. The plan of this machine takes the rates of its own devices, unless others are
    named."""
    cfg, nodes = plan.cfg, plan.nodes
    [placement] = plan.placements
    own = own_rates() if [node.name for node in nodes] == [THIS_MACHINE] else {}
    seconds = step_seconds(
        cfg,
        model,
        reward_model_sizes(cfg.reward.sources),
        {**own, **find_rates(typical.rates)},
        lengths=typical.lengths(cfg),
        cache_bytes=cache_bytes(cfg, model, nodes),
        cores=sum(node.cpus for node in nodes) + sum(need.cpus for need in plan.waiting),
        gpus=one_gpu(placement),
    )
    return seconds, traffic(cfg, model, homes(placement), lengths=typical.lengths(cfg))


def cache_bytes(cfg: Config, model: ModelSize, nodes: Sequence[Node]) -> int | None:
    """The KV cache of an engine, over all its devices. None if the memory of the GPUs is not known."""
    engines, memory = cfg.generators, max(node.gpu_memory for node in nodes)
    if engines.kv_cache_mib is None and not memory:
        return None
    longest = cfg.max_sequence_tokens
    return engines.tensor_parallel * kv_cache_bytes(engines, model, max_tokens=longest, device_memory=memory)
