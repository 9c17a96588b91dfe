"""The commands for reward models and the demo: refusals before Ray starts, and the settings of the demo's stages."""
# ruff: noqa: F401, F811 - a fixture is used by its name

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import deploy.demo
import deploy.session
import deploy.train_reward
from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import RewardTrainingConfig
from common.data.prompt_records import load_records
from common.errors import UserError
from common.model.reward_head import ScoreScale, load_reward_model, save_reward_model, write_scale
from deploy.plan.placement import Node
from deploy.policy_files import PolicyFiles
from deploy.reward_inputs import load_pairs, prepared_pairs
from deploy.run.directory import sole_owner
from deploy.run.identity import identity_of
from deploy.run.start import new_start
from deploy.train_reward import run_reward_training
from learner.loop.prompts import PromptStream
from tests.deploy.test_cli import (
    NO_REWARD_MODEL,
    accepted,
    cfg,
    configs,
    contents,
    model,
    ratchet,
    refusal,
    run,
    runs,
    workplace,
    write_lines,
)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train-reward", ["data={}"], "data.train: required and missing"),
        ("train-reward", ["data.train=no.jsonl"], "data.train (no.jsonl): there is no such file"),
        ("train-reward", ["data.train=torn.jsonl"], "torn.jsonl, line 2: not valid JSON"),
        ("train-reward", ["data.train=half.jsonl"], "half.jsonl, line 2: the column `rejected` does not exist"),
        ("train-reward", ["data.heldout=half.jsonl"], "half.jsonl, line 2: the column `rejected` does not exist"),
        ("train-reward", ["data.heldout=pairs.jsonl"], "and 4 pairs have their prompt in data.train too; give others"),
        ("train-reward", ["data.heldout_pairs=4"], "leaves no pair to train on: it has 4 pairs, 0 of them cut to"),
        (
            "train-reward",
            ["data.heldout_pairs=4"],
            "0 too long, of which 4 are held out with all pairs of their prompts",
        ),
        ("train-reward", ["data.train=tests.tasks:no"], ") has no function no"),
        ("train-reward", ["data.train=promptless.jsonl"], "give the records a `prompt`, or set scale.responses = 0"),
        ("train-reward", ["data.max_tokens=129"], "data.max_tokens (129) exceeds the model's context of 128"),
        ("train-reward", ["optimizer.warmup_steps=2"], "(2) must be below the 2 steps that 4 pairs make"),
        ("train-reward", ["optimizer.warmup_steps=4", "epochs=2"], "(4) must be below the 4 steps that 4 pairs make"),
        ("train-reward", ["model.path=nowhere"], "(nowhere) is neither a directory nor a hub name"),
        ("train-reward", ["scale.policy=nowhere"], "(nowhere) is neither a directory nor a hub name"),
        ("train-reward", ["sampling.stop_token_ids=[64]"], "stop_token_ids (64) must be tokens of the model"),
        ("train-reward", ["sampling.max_new_tokens=128"], "(128) leaves no room for a prompt"),
        ("sample-pairs", ["prompts={}"], "prompts.source: required and missing"),
        ("sample-pairs", ["prompts.source=torn.jsonl"], "torn.jsonl, line 2: not valid JSON"),
        ("sample-pairs", ["prompts.max_tokens=2"], "train.jsonl, line 3: the prompt has 3 tokens"),
        ("sample-pairs", ["labeller.sources=[]"], "labeller.sources is empty"),
        ("sample-pairs", ["labeller.sources.0.function=json:no"], ") has no function no"),
        ("sample-pairs", ['labeller.sources=[{name="m", model="model"}]'], NO_REWARD_MODEL),
        ("sample-pairs", ["model.path=nowhere"], "(nowhere) is neither a directory nor a hub name"),
        ("sample-pairs", ["sampling.max_new_tokens=128"], "(128) leaves no room for a prompt"),
        ("evaluate", ["evaluation.prompts=0"], "set both prompts.heldout and evaluation.prompts"),
        ("sample-pairs", ["sampling.stop_token_ids=[64]"], "stop_token_ids (64) must be tokens of the model"),
        ("evaluate", ["sampling.stop_token_ids=[64]"], "stop_token_ids (64) must be tokens of the model"),
        ("evaluate", ["prompts.heldout=torn.jsonl"], "torn.jsonl, line 2: not valid JSON"),
        ("evaluate", ["evaluation.text=no.txt"], "evaluation.text (no.txt): there is no such file"),
        ("evaluate", ["--policy", "nowhere"], "(nowhere) is neither a directory nor a hub name"),
        ("evaluate", ['reward.sources=[{name="m", model="model"}]'], NO_REWARD_MODEL),
        ("evaluate", ['evaluation.judges=[{name="m", model="model"}]'], NO_REWARD_MODEL),
    ],
)
def test_wrong_input_of_the_other_commands_is_refused(refusal, configs, command, arguments, message):
    assert message in refusal(command, configs[command], *arguments, "--run", "new")


def test_evaluate_continues_only_what_it_began(refusal, runs):
    assert "was made by ratchet train; continue it with that command" in refusal("evaluate", "--resume", runs["train"])
    assert "name the config file of a PPO run, such as RUN/config.toml, or an evaluation" in refusal("evaluate")


def test_pairs_need_no_prompts_if_no_scale_is_measured(accepted, configs):
    settings = ["data.train=promptless.jsonl", "scale.responses=0"]
    accepted("train-reward", configs["train-reward"], *settings, "--run", "new")


@pytest.mark.parametrize("function", ["train_prompts", "heldout_prompts"])
def test_prompts_of_sample_pairs_may_be_a_function(accepted, configs, function):
    accepted("sample-pairs", configs["sample-pairs"], f"prompts.source=tests.tasks:{function}")


def test_a_reward_run_stopped_before_its_pairs_were_ready_is_refused(refusal, runs):
    shutil.rmtree(runs["train-reward"] / "pairs")
    assert "stopped before its pairs were written" in refusal("train-reward", "--resume", runs["train-reward"])


def test_a_window_shorter_than_a_pair_is_refused_before_anything_is_written(refusal, accepted, configs, model):
    shutil.copytree(model, "windowed")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    Path("windowed/config.json").write_text(json.dumps(config))
    settings = configs["train-reward"], "model.path=windowed"
    assert "cannot read two responses in one row" in refusal("train-reward", *settings, "data.max_tokens=9")
    accepted("train-reward", *settings, "data.max_tokens=8")


def test_a_model_that_the_ranks_refuse_leaves_the_old_run_in_place(configs, workplace, monkeypatch):
    class Refusing:
        def __init__(self, create, cfg, *, startup_timeout_s, report, tell):
            self.stopped = False

        async def start(self):
            raise UserError("no such model, please")

        def stop(self):
            self.stopped = True

    @contextmanager
    def cluster(cfg, run):
        yield [Node("n", 8, 0, 1 << 40)]

    monkeypatch.setattr(deploy.session, "cluster", cluster)
    monkeypatch.setattr(deploy.train_reward, "RewardTrainerGroup", Refusing)
    cfg = load_config(configs["train-reward"], [], RewardTrainingConfig)
    with sole_owner(Path("runs/old")) as owned:
        owned.begin(cfg, "train-reward", force=False)
    before = contents(Path("runs"))
    with pytest.raises(UserError, match="no such model, please"):
        run_reward_training(cfg, Path("runs/old"), force=True)
    assert contents(Path("runs")) == before
    with pytest.raises(UserError, match="no such model, please"):
        run_reward_training(cfg, Path("runs/new"))
    assert not Path("runs/new").exists()


def test_pairs_are_prepared_in_a_temporary_directory_with_counts(configs, workplace):
    held_out = [{"prompt": f"ask a{i}", "chosen": "a1", "rejected": "b1"} for i in (3, 4, 5)]  # a3 is trained on
    write_lines(workplace / "more.jsonl", *held_out, {"prompt": "ask a6", "chosen": "a1", "rejected": ""})
    before = contents(workplace)
    cfg = load_config(configs["train-reward"], ["data.heldout=more.jsonl"], RewardTrainingConfig)
    with prepared_pairs(cfg, PolicyFiles.load("model"), Path("runs/new"), resume=False) as pairs:
        counts = json.loads((pairs / "counts.json").read_text())
        assert [len(side) for side in load_pairs(cfg, pairs)] == [4, 2]
    none = {"repeated": 0, "empty": 0, "identical": 0, "cut": 0, "overlong": 0}
    assert counts == {"train": {**none, "pairs": 4}, "heldout": {**none, "pairs": 3, "empty": 1, "prompt_in_train": 1}}
    assert contents(workplace) == before


@pytest.fixture
def reward_model(cfg, model):
    """A reward model in the current directory."""
    network = load_reward_model(model, dtype=torch.float32, device=torch.device("cpu"))
    save_reward_model(network, model, Path("rm"), ScoreScale())
    return Path("rm")


@pytest.mark.parametrize("setting", ["scale.policy=rm", "model.path=rm"])
def test_a_reward_model_is_refused_as_the_policy_that_answers(refusal, accepted, configs, reward_model, setting):
    message = refusal("train-reward", configs["train-reward"], setting, "--run", "new")
    assert f"scale.policy ({reward_model.resolve()}) is itself a reward model and cannot answer" in message
    accepted("train-reward", configs["train-reward"], setting, "scale.responses=0", "--run", "new")


@pytest.mark.parametrize("command", ["train", "sample-pairs", "evaluate"])
def test_a_reward_model_of_plain_text_is_refused_under_chat_prompts(refusal, accepted, configs, reward_model, command):
    section = "labeller" if command == "sample-pairs" else "reward"
    source, chat = f'{section}.sources=[{{name="rm", model="rm"}}]', "prompts.format=chat"
    write_scale(reward_model, ScoreScale(chat=False))
    message = refusal(command, configs[command], source, chat)
    directory = reward_model.resolve()
    assert f"reward source rm ({directory}) was trained on plain text, but prompts.format is chat" in message
    accepted(command, configs[command], source)
    for scale in (ScoreScale(chat=True), ScoreScale(chat=None)):  # then only the tokenizer has no template
        write_scale(reward_model, scale)
        assert "chat template refuses the prompt" in refusal(command, configs[command], source, chat)


@pytest.fixture
def scored_run(run, reward_model):
    """A PPO run with a reward model, whose journal has begun."""
    cfg = load_config(run / "config.toml", ['reward.sources=[{name="rm", model="rm"}]'], Config)
    (run / "config.toml").write_text(cfg.to_toml(), encoding="utf-8")
    policy = PolicyFiles.load("model")
    train, heldout = (
        load_records(f"{name}.jsonl", cfg.prompts, policy.tokenizer, seed=0, max_tokens=16)
        for name in ("train", "heldout")
    )
    prompts = PromptStream(train, seed=cfg.seed, rollouts_per_prompt=cfg.prompts.rollouts_per_prompt)
    new_start(run, cfg, identity_of(cfg, policy, train, heldout), prompts).record()
    return run


def test_a_run_continues_only_with_the_reward_model_it_began_with(accepted, refusal, scored_run):
    accepted("train", "--resume", scored_run)
    write_scale(Path("rm"), ScoreScale(mean=1.0))
    assert "the run began with other contents: reward.sources.0 (rm) has" in refusal("train", "--resume", scored_run)
    accepted("train", "--resume", scored_run, "--accept", "reward.sources.0")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ppo.clip_epsilon=1", "ppo.clip_epsilon=1: no stage of the demo has such a setting"),
        ("nonsense", "nonsense: no stage of the demo has such a setting"),
        ("seed", "override 'seed' must read key=value"),
        ("labeller.min_gap=-1", "(labeller.min_gap=-1) has 1 fault(s):\n  labeller.min_gap = -1: "),
        ("epochs=0", "(epochs=0) has 1 fault(s):\n  epochs = 0: "),
        ("optimizer.warmup_steps=17", "optimizer.warmup_steps (17) must not exceed num_steps (16)"),
        ("model.path=nowhere", "(nowhere) is neither a directory nor a hub name"),
    ],
)
def test_a_setting_that_the_demo_cannot_work_with_is_refused(ratchet, workplace, setting, message):
    code, _, err = ratchet("demo", "rlhf", setting)
    assert (code, err.count("ratchet: ")) == (2, 1)
    assert message in err
    assert contents(workplace) == {Path("temporary"): None}  # the directory for temporary files, and nothing in it


@pytest.mark.parametrize("part", ["pairs", "reward", "ppo"])
def test_the_demo_replaces_its_runs_only_with_force(refusal, accepted, run, workplace, part):
    (workplace / "shown").mkdir()
    run.rename(workplace / "shown" / part)
    message = refusal("demo", "rlhf", "--run", "shown")
    assert f"shown/{part} exists; replace it with --force" in message
    assert "--resume" not in message
    accepted("demo", "rlhf", "model.path=model", "--run", "shown", "--force")


def test_each_stage_of_the_demo_gets_its_own_settings(monkeypatch, ratchet):
    stages = []

    def stage(cfg, directory, *, force):
        stages.append((cfg, directory))
        if len(stages) == 3:
            raise KeyboardInterrupt

    for name in ("run_pair_sampling", "run_reward_training", "run_training"):
        monkeypatch.setattr(deploy.demo, name, stage)
    settings = ["seed=5", "sampling.max_new_tokens=7", "prompts.pairs=6", "epochs=9", "num_steps=8"]
    ratchet("demo", "rlhf", *settings, "--run", 'a "b"')
    (pairs, *places), (reward, *more), (ppo, *most) = stages
    assert [*places, *more, *most] == [Path('a "b"').absolute() / part for part in ("pairs", "reward", "ppo")]
    assert [(cfg.seed, cfg.sampling.max_new_tokens) for cfg in (pairs, reward, ppo)] == [(5, 7)] * 3
    assert (pairs.prompts.pairs, reward.epochs, ppo.num_steps) == (6, 9, 8)
    assert reward.data.train == str(Path('a "b"/pairs/pairs.jsonl').absolute())
    assert [source.model for source in ppo.reward.sources] == [str(Path('a "b"/reward/model').absolute())]


def test_a_demo_that_is_not_there_is_refused(ratchet):
    code, out, err = ratchet("demo", "chess")
    assert (code, out) == (2, "")
    assert "rlhf" in err
