"""The shipped configs: each is one of a command, names what exists, and those of the demo fit together."""

from pathlib import Path

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.config.sources import FunctionSourceConfig
from common.data.reasoning_gym_script import questions
from common.data.source_names import parsed_source
from common.user_code.functions import load_function

CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"
REASONING_GYM = "reasoning-gym.toml"
ROOTS = {
    "larger.toml": Config,
    "positive-pairs.toml": PairSamplingConfig,
    "positive-reward.toml": RewardTrainingConfig,
    "positive.toml": Config,
    REASONING_GYM: Config,
    "reviews.toml": Config,
    "single-response-async.toml": Config,
}


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
        assert name == REASONING_GYM or len(load_function(cfg.prompts.heldout, name)(0)) >= cfg.evaluation.prompts
    elif isinstance(cfg, PairSamplingConfig):
        sources, prompts = cfg.labeller.sources, [cfg.prompts.source]
    functions = [source.function for source in sources if isinstance(source, FunctionSourceConfig)]
    assert functions or name in ("positive-reward.toml", REASONING_GYM)
    for function in [*functions, *(() if name == REASONING_GYM else prompts)]:
        assert load_function(function, name).__name__ == function.partition(":")[2]


def test_the_task_of_reasoning_gym_has_questions_enough():
    pytest.importorskip("reasoning_gym")
    cfg = load(REASONING_GYM)
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
