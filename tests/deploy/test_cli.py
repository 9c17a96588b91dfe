"""The command line: bad input ends in one message, exit code 2 and nothing written, before Ray starts."""

import json
import shutil
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import deploy.train
from common.config import describe
from deploy.cli import main
from deploy.placement import GIB, Node

WORDS = ["<unk>", "<end>", *(f"w{i}" for i in range(98))]


class RayWouldStart(Exception):
    """Raised where a run would start Ray: the input has passed every check."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random two-layer Llama with a context of 64 tokens, and one token a word."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=32,
            max_position_embeddings=64,
        )
    ).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current directory that reward functions are imported from, and no Ray."""

    def no_ray(cfg):
        raise RayWouldStart

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(deploy.train, "cluster", no_ray)
    return tmp_path


@pytest.fixture
def cfg(model, workplace):
    """A config that a run would start with: three prompts of one to three tokens, at most eight tokens of response."""
    write_prompts(workplace / "train.jsonl", "w1", "w2 w3", "w4 w5 w6")
    write_prompts(workplace / "heldout.jsonl", "w7")
    path = workplace / "tiny.toml"
    path.write_text(f"""
num_steps = 4
rollouts_per_step = 8
model.path = "{model}"
prompts = {{train = "train.jsonl", heldout = "heldout.jsonl", max_tokens = 16}}
sampling.max_new_tokens = 8

[[reward.sources]]
name = "correct"
function = "deploy.tasks.larger:correct"
""")
    return path


@pytest.fixture
def run(cfg):
    """A run directory as `ratchet train` leaves it."""
    directory = cfg.parent / "runs" / "earlier"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(cfg.read_text())
    (directory / "metrics.jsonl").write_text("{}\n")
    return directory


def write_prompts(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def ratchet(monkeypatch, capsys):
    """Runs the command line; gives back exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ratchet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refusal(ratchet, workplace):
    """The message of a command that must be refused without a trace."""

    def call(*arguments):
        before = contents(workplace)
        code, out, err = ratchet(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("ratchet: ")
        assert err.count("ratchet: ") == 1
        assert "Traceback" not in err
        assert contents(workplace) == before
        return err

    return call


# What is refused


def test_the_config_of_these_tests_is_accepted(cfg, monkeypatch, workplace):
    monkeypatch.setattr(sys, "argv", ["ratchet", "train", str(cfg)])
    with pytest.raises(RayWouldStart):
        main()
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ppo.clip_epsilon=0.1", "ppo.clip_epsilon: unknown key; did you mean clip_eps?"),
        ("ppo.minibatches=3", "rollouts_per_step (8) must divide into ppo.minibatches (3); nearest: 6, 9"),
        ("num_steps", "override 'num_steps' must read key=value"),
        ("model.path=/nowhere/at/all", "model.path (/nowhere/at/all) is neither a directory nor a hub name"),
        ("model.path=nowhere", "model.path (nowhere) is neither a directory nor a hub name"),
        ("model.path=.", "model.path (.) holds no config.json; name a Hugging Face model directory"),
        ("prompts.train=no.jsonl", "prompt file no.jsonl cannot be read"),
        ("prompts.train=no_module:f", "prompts (no_module:f): module no_module cannot be imported"),
        ("prompts.max_tokens=2", "train.jsonl, line 3: the prompt has 3 tokens"),
        ("sampling.max_new_tokens=62", "model's context leave room for (2)"),  # of the context's 64
        ("sampling.max_new_tokens=64", "sampling.max_new_tokens (64) leaves no room for a prompt"),
        ("prompts.heldout=train.jsonl", "3 prompt(s) stand in both prompts.train and prompts.heldout, such as 'w1'"),
        ("prompts.format=chat", "train.jsonl, line 1: the tokenizer's chat template refuses the prompt"),
        ("reward.sources.0.function=no_module:f", "reward source correct (no_module:f): module no_module cannot be"),
        ("reward.sources.0.function=json:no_function", "module json has no function no_function"),
        ("reward.sources.0.function=json.dumps", "reward source correct (json.dumps) must read module:function"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(refusal, cfg, setting, message):
    assert message in refusal("train", cfg, setting)


def test_a_broken_line_of_the_prompt_file_is_named_by_number(refusal, cfg, workplace):
    (workplace / "train.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2"\n{"prompt": "w3"}\n')
    assert "train.jsonl, line 2: not valid JSON" in refusal("train", cfg)


def test_a_reward_function_beside_the_user_is_found_and_its_error_told(refusal, cfg, workplace):
    (workplace / "my_broken_reward.py").write_text("import no_such_package")
    message = refusal("train", cfg, "reward.sources.0.function=my_broken_reward:score")
    assert "my_broken_reward cannot be imported (ModuleNotFoundError: No module named 'no_such_package')" in message


def test_a_model_without_a_tokenizer_is_refused(refusal, cfg, model, workplace):
    (workplace / "bare").mkdir()
    (workplace / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    assert "model.path" in refusal("train", cfg, "model.path=bare")


def test_a_kv_cache_that_holds_no_sequence_is_refused_before_ray_starts(refusal, cfg, model, workplace):
    shutil.copytree(model, workplace / "long")
    config = workplace / "long" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8192}))
    settings = ["model.path=long", "prompts.max_tokens=4096", "learner.micro_batch_tokens=8192"]
    # 4096 + 8 tokens of 2 (keys, values) * 2 layers * 2 heads * 32 * 2 bytes = 512 bytes are a little over 2 MiB.
    message = refusal("train", cfg, *settings, "reference.max_batch_tokens=8192", "generators.kv_cache_mib=2")
    assert "generators.kv_cache_mib (2) must hold at least one sequence of 4104 tokens, 3 MiB" in message


def test_a_config_file_that_is_missing_or_broken_is_refused(refusal, cfg, workplace):
    assert "config file no.toml does not exist" in refusal("train", "no.toml")
    cfg.write_text("num_steps = \n")
    assert "tiny.toml is not valid TOML" in refusal("train", cfg)


def test_neither_config_nor_resume_is_refused_with_what_to_name(refusal):
    assert "name a config file, such as deploy/configs/larger.toml" in refusal("train")
    assert "name a config file to resolve, or ask for --describe" in refusal("config")


def test_a_run_that_does_not_fit_the_cluster_is_refused_without_a_trace(refusal, cfg, run, monkeypatch):
    @contextmanager
    def small(cfg):
        yield [Node("127.0.0.1", 2, 0, GIB)]  # torch alone takes 600 MiB in each of four processes

    monkeypatch.setattr(deploy.train, "cluster", small)
    assert "no node has room for" in refusal("train", cfg)
    assert "no node has room for" in refusal("train", cfg, "--run", run, "--force")  # what was there is still there


# Run directories


def test_an_existing_run_directory_is_refused_with_the_ways_on(refusal, cfg, run):
    message = refusal("train", cfg, "--run", run)
    assert f"{run} exists" in message
    assert f"--resume {run}" in message
    assert "--force" in message


def test_the_default_run_directory_is_named_after_the_config(refusal, cfg, run):
    run.rename(run.with_name("tiny"))
    assert "runs/tiny exists" in refusal("train", cfg)


def test_force_and_an_empty_directory_pass_the_check(cfg, run, monkeypatch, workplace):
    (workplace / "empty").mkdir()
    for options in (["--run", str(run), "--force"], ["--run", "empty"]):
        monkeypatch.setattr(sys, "argv", ["ratchet", "train", str(cfg), *options])
        with pytest.raises(RayWouldStart):
            main()


def test_a_file_in_place_of_a_run_directory_is_refused(refusal, cfg, workplace):
    (workplace / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal("train", cfg, "--run", "notes.txt")


def test_force_does_not_replace_a_directory_that_is_no_run(refusal, cfg, workplace):
    (workplace / "home").mkdir()
    (workplace / "home" / "thesis.txt").write_text("mine")
    assert "home" in refusal("train", cfg, "--run", "home", "--force")


@pytest.mark.parametrize("directory", ["nowhere", "."])
def test_resume_of_a_directory_that_is_no_run_is_refused(refusal, directory):
    message = refusal("train", "--resume", directory)
    assert f"{directory} is no run directory (no config.toml)" in message
    assert "name one that ratchet train has made" in message


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "rollouts_per_step=16",
        "ppo.clip_eps=0.1",
        "learner.critic=separate",
        "learner.precision=fp32",
        "reward.normalise=none",
        "reward.clip=1",
        "reward.sources.0.weight=2",
    ],
)
def test_resume_with_a_setting_that_the_journal_depends_on_is_refused(refusal, run, setting):
    message = refusal("train", "--resume", run, "num_steps=9", setting)
    assert message.startswith(f"ratchet: {setting} cannot change when a run goes on")
    assert "changeable: num_steps, learner.micro_batch_tokens, " in message
    assert " generators, reference, reward.replicas, " in message  # whole sections are named without a dot


def test_resume_checks_the_settings_it_may_change(refusal, run):
    assert "generators.replicaz: unknown key; did you mean replicas?" in refusal(
        "train", "--resume", run, "generators.replicaz=2"
    )
    assert "generators.replicas = 0" in refusal("train", "--resume", run, "generators.replicas=0")


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["num_steps=9"],
        ["num_steps=9", "generators.replicas=2", "checkpoint.every=1"],
        ["learner.micro_batch_tokens=4096", "learner.gradient_checkpointing=true", "learner.threads=2"],
        ["learner.timeout_s=9", "reward.timeout_s=9", "reward.replicas=2", "reward.max_void_share=1"],
        ["reference.dtype=float32", "evaluation.every=1", "ray.dashboard=false"],
    ],
)
def test_resume_with_other_settings_goes_on(run, monkeypatch, settings):
    monkeypatch.setattr(sys, "argv", ["ratchet", "train", "--resume", str(run), *settings])
    with pytest.raises(RayWouldStart):
        main()


def test_resume_does_not_change_num_steps_under_a_schedule_that_depends_on_it(refusal, cfg, run):
    (run / "config.toml").write_text(cfg.read_text() + '\n[optimizer]\nschedule = "linear"\n')
    assert "num_steps=9 cannot change" in refusal("train", "--resume", run, "num_steps=9")


# What is told


def test_train_help_lists_every_setting_with_its_default(ratchet):
    code, out, _ = ratchet("train", "--help")
    assert code == 0
    assert [key for key, kind, default, _ in describe() if f"  {key} ({kind}; default {default})\n" not in out] == []


def test_config_describe_explains_every_setting(ratchet):
    code, out, _ = ratchet("config", "--describe")
    assert code == 0
    told = " ".join(out.split())  # long sentences are wrapped
    missing = [k for k, kind, default, text in describe() if f"{k} ({kind}; default {default}) {text}" not in told]
    assert missing == []


def test_config_prints_the_resolved_settings_as_toml(ratchet, cfg):
    code, out, _ = ratchet("config", cfg, "num_steps=7")
    tree = tomllib.loads(out)
    assert code == 0
    assert (tree["num_steps"], tree["rollouts_per_step"], tree["ppo"]["clip_eps"]) == (7, 8, 0.05)


def test_an_interrupted_run_says_how_to_go_on(ratchet, cfg, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy.train, "run_training", interrupted)
    code, _, err = ratchet("train", cfg)
    assert code == 130
    assert "--resume" in err


def test_an_error_that_is_no_fault_of_the_user_keeps_its_traceback(cfg, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(deploy.train, "run_training", broken)
    monkeypatch.setattr(sys, "argv", ["ratchet", "train", str(cfg)])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_the_installed_command_refuses_in_the_same_way(cfg, workplace):
    command = Path(sys.executable).with_name("ratchet")
    done = subprocess.run([command, "train", cfg, "sede=1"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ratchet: config {cfg} has 1 fault(s):\n  sede: unknown key; did you mean seed?\n"
    assert not (workplace / "runs").exists()
