"""The shipped configs: each is one of a command, names what exists, and those of the demo fit together."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from actors.generation.kv_cache import bytes_per_sequence, kv_cache_bytes
from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.config.sources import FunctionSourceConfig
from common.data.reasoning_gym_script import questions
from common.data.source_names import parsed_source
from common.memory import GIB
from common.user_code.functions import load_function
from common.user_code.tools import load_tools
from deploy.plan.machines import Described
from deploy.plan.suggest import suggest
from tests.deploy.plan.shapes import planner, size_of

CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"
REASONING_GYM = "reasoning-gym.toml"
ROOTS = {
    "calculator.toml": Config,
    "guessing.toml": Config,
    "larger.toml": Config,
    "positive-pairs.toml": PairSamplingConfig,
    "positive-reward.toml": RewardTrainingConfig,
    "positive.toml": Config,
    REASONING_GYM: Config,
    "reviews.toml": Config,
    "single-response-async.toml": Config,
}
# Configs for GPUs, the model of each, and the machines that it names. They have the same task.
ON_GPUS = {
    "gpu-24gb-1.5b-lora.toml": ("1.5B", Described(nodes=1, gpus=1, gpu_memory=24, cpus=8, memory=48)),
    "gpu-80gb-1.5b.toml": ("1.5B", Described(nodes=1, gpus=1, gpu_memory=80, cpus=16, memory=128)),
    "gpu-80gb-7b-lora.toml": ("7B", Described(nodes=1, gpus=1, gpu_memory=80, cpus=16, memory=192)),
    "node-8x80gb-7b.toml": ("7B", Described(nodes=1, gpus=8, gpu_memory=80, cpus=64, memory=512)),
    "nodes-2x8x80gb-7b.toml": ("7B", Described(nodes=2, gpus=8, gpu_memory=80, cpus=64, memory=512)),
}
ROOTS |= dict.fromkeys(ON_GPUS, Config)
TASKS = (REASONING_GYM, *ON_GPUS)  # prompts and rule are those of reasoning-gym


def load(name):
    return load_config(CONFIGS / name, [], ROOTS[name])


def test_every_shipped_config_has_a_row_here():
    assert {path.name for path in CONFIGS.glob("*.toml")} == set(ROOTS)


@pytest.mark.parametrize("name", ROOTS)
def test_a_shipped_config_parses_and_its_functions_exist(name):
    cfg = load(name)
    sources, prompts = [], []
    if isinstance(cfg, Config):
        sources, prompts = [*cfg.reward.sources, *cfg.evaluation.judges], [cfg.prompts.train, cfg.prompts.heldout]
        assert name in TASKS or len(load_function(cfg.prompts.heldout, name)(0)) >= cfg.evaluation.prompts
    elif isinstance(cfg, PairSamplingConfig):
        sources, prompts = cfg.labeller.sources, [cfg.prompts.source]
    functions = [source.function for source in sources if isinstance(source, FunctionSourceConfig)]
    assert functions or name in ("guessing.toml", "positive-reward.toml", *TASKS)
    if isinstance(cfg, Config) and cfg.environment:
        assert load_tools(cfg.environment.tools) or load_function(cfg.environment.function, name)().step
    for function in [*functions, *(() if name in TASKS else prompts)]:
        assert load_function(function, name).__name__ == function.partition(":")[2]


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_config_for_gpus_fits_its_machines_and_not_half_of_their_memory(name, tmp_path):
    model, machines = ON_GPUS[name]
    cfg, size = load(name), size_of(tmp_path, model)
    assert planner(size, machines.make(0)).fits(cfg)
    assert not planner(size, replace(machines, gpu_memory=machines.gpu_memory / 2).make(0)).fits(cfg)
    assert check_engine_shares(cfg, size, machines)


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_config_for_gpus_divides_them_as_a_suggestion_for_its_machines_does(name, tmp_path):
    """Ranks, engines and references, micro-batches and adapters: of all layouts these have the shortest predicted
    step. The shares of a GPU are round numbers in the config."""
    model, machines = ON_GPUS[name]
    cfg, size = load(name), size_of(tmp_path, model)
    tree = tomllib.loads((CONFIGS / name).read_text(encoding="utf-8"))
    found = suggest(tree, planner(size, machines.make(0)), size).plan.cfg

    def division(cfg):
        learner, reference = cfg.learner, 0 if cfg.learner.lora else cfg.reference.min
        return learner.ranks, learner.token_budget, learner.lora is None, cfg.generators.min, reference

    assert division(cfg) == division(found)
    assert cfg.max_staleness == found.max_staleness
    assert abs(cfg.generators.gpus - found.generators.gpus) <= 0.1


def check_engine_shares(cfg, size, machines):
    """True if what is left of an engine's share holds 64 rollouts at their longest."""
    _, sequence = bytes_per_sequence(cfg.generators, size, max_tokens=cfg.max_sequence_tokens)
    device_memory = int(machines.gpu_memory * GIB)
    cache = kv_cache_bytes(cfg.generators, size, max_tokens=cfg.max_sequence_tokens, device_memory=device_memory)
    return cache >= 64 * sequence


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_config_for_gpus_names_its_model_and_the_command_that_plans_it(name):
    text, (model, machines) = (CONFIGS / name).read_text(), ON_GPUS[name]
    assert load(name).model.path == f"Qwen/Qwen2.5-{model}-Instruct"
    command = re.search(r"^#   (ratchet plan .*)$", text, flags=re.MULTILINE).group(1).split()
    assert command[2] == f"deploy/configs/{name}"
    options = {key.removeprefix("--"): float(value) for key, value in zip(command[3::2], command[4::2], strict=True)}
    given = {key.replace("_", "-"): value for key, value in vars(machines).items()}
    assert {"nodes": 1, **options} == given


@pytest.mark.parametrize("name", [REASONING_GYM, next(iter(ON_GPUS))])
def test_the_task_of_reasoning_gym_has_questions_enough(name):
    pytest.importorskip("reasoning_gym")
    cfg = load(name)
    assert cfg.prompts.train == cfg.prompts.heldout
    task, gym = parsed_source(cfg.prompts.heldout, "prompts.heldout"), cfg.prompts.reasoning_gym
    rule, *heldout = questions(task.name, dict(gym.parameters), gym.heldout_prompts, True, cfg.seed)
    _, *train = questions(task.name, dict(gym.parameters), gym.train_prompts, False, cfg.seed)
    assert rule == {"runs_answers": False}
    assert len(heldout) > 128
    assert len(train) > 8 * cfg.rollouts_per_step


def test_the_stages_of_the_demo_fit_together():
    pairs, reward, ppo = (load(f"positive{stage}.toml") for stage in ("-pairs", "-reward", ""))
    # One policy, one way of writing: the scale of the reward model then is that of what PPO begins with.
    assert pairs.model == reward.model == ppo.model
    assert pairs.sampling == reward.sampling == ppo.sampling
    assert pairs.prompts.source == ppo.prompts.train != ppo.prompts.heldout
    # Alone, every stage finds what the one before it leaves in its default directory.
    assert reward.data.train == "runs/positive-pairs/pairs.jsonl"
    assert [source.model for source in ppo.reward.sources] == ["runs/positive-reward/model"]
    # Whole sequences, the end token included, are what the reward model learns from and reads.
    assert reward.data.format == pairs.prompts.format == ppo.prompts.format == "plain"
    assert pairs.max_sequence_tokens < reward.data.max_tokens
    assert ppo.max_sequence_tokens < ppo.reward.sources[0].max_tokens
    # The human of the pairs is the judge of the outcome, and is no source.
    assert [j.function for j in ppo.evaluation.judges] == [s.function for s in pairs.labeller.sources]
    assert ppo.evaluation.pass_source == ppo.evaluation.judges[0].name


@pytest.mark.parametrize("name", ["single-response-async.toml", "reviews.toml"])
def test_returns_as_advantages_compare_a_config_with_no_critic(name):
    critic = ["learner.critic_path=runs/some-critic", "learner.critic_warmup_steps=9", "ppo.value_coef=0"]
    cfg = load_config(CONFIGS / name, ["ppo.advantages=returns", "num_steps=8", *critic], Config)
    assert (cfg.critic_path, cfg.critic_warmup_steps) == (None, 0)


def test_the_asynchronous_config_has_the_method_of_sao():
    cfg = load("single-response-async.toml")
    assert cfg.prompts.rollouts_per_prompt == cfg.group_size == 1
    assert cfg.max_staleness > 0
    assert (cfg.ppo.policy_loss, cfg.ppo.lam, cfg.ppo.value_lam) == ("mask", "length", 1)
    assert cfg.ppo.value_epochs == cfg.ppo.ppo_epochs  # the critic learns twice as often as the policy
    assert (cfg.learner.critic, cfg.learner.critic_frozen) == ("separate", "attention")
    assert cfg.learner.critic_warmup_steps > 0
    assert cfg.optimizer.critic_learning_rate == pytest.approx(5 * cfg.optimizer.learning_rate)
