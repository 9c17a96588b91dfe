"""The command line: bad input ends in one message, exit code 2 and nothing written, before Ray starts."""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

import deploy.evaluation.command
import deploy.sample_pairs
import deploy.session
import deploy.train
import deploy.train_reward
from common.config.base import RECORDED
from common.config.description import describe
from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.config.sources import FunctionSourceConfig
from common.memory import GIB
from common.user_code.functions import load_function
from common.user_code.import_path import find_users_modules
from deploy.cli import main
from deploy.plan.placement import Node
from deploy.policy_files import PolicyFiles
from deploy.reward_inputs import prepared_pairs
from deploy.run.directory import sole_owner
from deploy.run.finished import finished_training
from deploy.run.provenance import VERSION
from tests.fakes import save_tiny_model

ROOTS = {"train": Config, "train-reward": RewardTrainingConfig, "sample-pairs": PairSamplingConfig}
COMMANDS = [*ROOTS, "evaluate"]
MODULES = {
    "train": deploy.train,
    "train-reward": deploy.train_reward,
    "sample-pairs": deploy.sample_pairs,
    "evaluate": deploy.evaluation.command,
}
EDITABLE = """
import sys
from importlib.machinery import PathFinder

class Editable:  # as of an editable installation: asked after every directory of the path
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path or [sys.argv[1]])

sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Editable)
from common.user_code.import_path import find_users_modules
find_users_modules()
from actors.generation import engine
from learner.ppo import losses
import my_rewards
print(engine.__file__, losses.__file__, my_rewards.__file__)
"""
NO_REWARD_MODEL = ") is not a reward model: it must be a sequence classifier with one label, but is LlamaForCausalLM"


class RayWouldStart(SystemExit):
    """Raised where a run would start Ray: the input has passed every check."""

    CODE = 99


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random two-layer Llama with a context of 128 tokens, and one token a word."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def import_here(service, sources, record, tokenizer, *, episode):
    for source in sources:
        if isinstance(source, FunctionSourceConfig):
            load_function(source.function, f"reward source {source.name}")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current directory that reward functions are imported from, and no Ray."""

    def no_ray(cfg, run):
        raise RayWouldStart(RayWouldStart.CODE)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(deploy.session, "cluster", no_ray)
    # Imports functions here, which is faster. The real check is tested in actors/scoring/test_function_check.py.
    monkeypatch.setattr(deploy.session, "try_sources", import_here)
    return tmp_path


@pytest.fixture
def cfg(model, workplace):
    """A config that a run would start with: three prompts of one to three tokens, at most eight tokens of response."""
    (workplace / "model").symlink_to(model)
    write_lines(workplace / "train.jsonl", *({"prompt": text} for text in ("a1", "a2 a3", "a4 a5 a6")))
    write_lines(workplace / "heldout.jsonl", {"prompt": "a7"})
    path = workplace / "tiny.toml"
    path.write_text("""
num_steps = 4
rollouts_per_step = 8
model.path = "model"
prompts = {train = "train.jsonl", heldout = "heldout.jsonl", max_tokens = 16}
sampling.max_new_tokens = 8

[[reward.sources]]
name = "correct"
function = "deploy.tasks.larger:correct"
""")
    return path


@pytest.fixture
def configs(cfg, workplace):
    """A config for each command. Of reward training: four pairs, that is two steps."""
    pairs = [{"prompt": f"ask a{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(4)]
    write_lines(workplace / "pairs.jsonl", *pairs)
    write_lines(workplace / "half.jsonl", pairs[0], {"prompt": "ask a1", "chosen": "a1"})
    write_lines(workplace / "promptless.jsonl", {"chosen": "a1", "rejected": "b1"})
    (workplace / "torn.jsonl").write_text(json.dumps(pairs[0]) + '\n{"prompt": "a2"\n')
    reward, sampling = workplace / "reward.toml", workplace / "sampling.toml"
    reward.write_text("""
pairs_per_step = 2
model.path = "model"
data = {train = "pairs.jsonl", max_tokens = 16}
sampling.max_new_tokens = 8
""")
    sampling.write_text("""
model.path = "model"
prompts = {source = "train.jsonl", max_tokens = 16}
sampling.max_new_tokens = 8
labeller.sources = [{name = "correct", function = "deploy.tasks.larger:correct"}]
""")
    return {"train": cfg, "train-reward": reward, "sample-pairs": sampling, "evaluate": cfg}


@pytest.fixture
def run(cfg):
    """A run directory as `ratchet train` leaves it."""
    directory = cfg.parent / "runs" / "earlier"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(cfg.read_text())
    (directory / "pool-events.jsonl").write_text("{}\n")
    (directory / "journal").mkdir()
    return directory


@pytest.fixture
def runs(configs, run):
    """Run directories of the commands that can go on. The pairs of reward training are where they were moved to."""
    directories = {"train": run, "train-reward": run.with_name("reward"), "sample-pairs": run.with_name("pairs")}
    for command, directory in directories.items():
        directory.mkdir(exist_ok=True)
        (directory / "config.toml").write_text(configs[command].read_text())
    reward = load_config(configs["train-reward"], [], RewardTrainingConfig)
    directory, base = directories["train-reward"], PolicyFiles.load("model")
    with prepared_pairs(reward, base, directory, resume=False) as pairs:
        shutil.move(pairs, directory / "pairs")
    Path("pairs.jsonl").unlink()
    return directories


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


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
        capsys.readouterr()  # what fixtures have written
        monkeypatch.setattr(sys, "argv", ["ratchet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def accepted(monkeypatch, workplace):
    """Runs a command that passes every check, up to where Ray would start: by then it has written nothing."""

    def call(*arguments):
        before = contents(workplace)
        monkeypatch.setattr(sys, "argv", ["ratchet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == RayWouldStart.CODE
        assert contents(workplace) == before

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


# Wrong input is refused


@pytest.mark.parametrize("command", ["train", "train-reward", "sample-pairs", "evaluate"])
def test_the_configs_of_these_tests_are_accepted(accepted, configs, command):
    accepted(command, configs[command])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ppo.clip_epsilon=0.1", "ppo.clip_epsilon: unknown key; did you mean clip_eps?"),
        ("ppo.minibatches=3", "rollouts_per_step (8) must be a multiple of ppo.minibatches (3); nearest: 6, 9"),
        ("num_steps", "override 'num_steps' must read key=value"),
        ("model.path=/nowhere/at/all", "model.path (/nowhere/at/all) is neither a directory nor a hub name"),
        ("model.path=nowhere", "model.path (nowhere) is neither a directory nor a hub name"),
        ("model.path=.", ") has no config.json; name a Hugging Face model directory"),
        ("prompts.train=no.jsonl", "prompts.train (no.jsonl): there is no such file"),
        ("prompts.train=no_module:f", "prompts.train (no_module:f): module no_module cannot be imported"),
        ("prompts.max_tokens=2", "train.jsonl, line 3: the prompt has 3 tokens"),
        ("sampling.max_new_tokens=126", "model's context allow 2"),  # of the context's 128
        ("sampling.max_new_tokens=128", "sampling.max_new_tokens (128) leaves no room for a prompt"),
        ("sampling.stop_token_ids=[3,64]", "sampling.stop_token_ids (64) must be tokens of the model, from 0 to 63"),
        ('sampling.stop=["</a>",""]', "sampling: stop must not have an empty text"),
        ("prompts.heldout=train.jsonl", "prompts.train and prompts.heldout must not share prompts"),
        ("prompts.heldout=train.jsonl", "they share 3, such as 'a1': remove them from one"),
        ("prompts.format=chat", "train.jsonl, line 1: the tokenizer's chat template refuses the prompt"),
        ("reward.sources.0.function=no_module:f", "reward source correct (no_module:f): module no_module cannot be"),
        ("reward.sources.0.function=json:no_function", "json/__init__.py) has no function no_function"),
        ("reward.sources.0.function=json.dumps", "reward source correct (json.dumps) must read module:function"),
        ('reward.sources=[{name="m", model="model"}]', NO_REWARD_MODEL),
        ('evaluation.judges=[{name="m", model="model"}]', NO_REWARD_MODEL),
    ],
)
def test_a_setting_that_cannot_work_is_refused(refusal, cfg, setting, message):
    assert message in refusal("train", cfg, setting)


def test_a_broken_line_of_the_prompt_file_is_named_by_number(refusal, cfg, workplace):
    (workplace / "train.jsonl").write_text('{"prompt": "a1"}\n{"prompt": "a2"\n{"prompt": "a3"}\n')
    assert "train.jsonl, line 2: not valid JSON" in refusal("train", cfg)


@pytest.mark.parametrize("command", ["train", "sample-pairs", "evaluate"])
def test_a_reward_function_in_the_current_directory_is_found(refusal, configs, workplace, command):
    (workplace / "my_broken_reward.py").write_text("import no_such_package")
    sources = "labeller.sources" if command == "sample-pairs" else "reward.sources"
    message = refusal(command, configs[command], f"{sources}.0.function=my_broken_reward:score")
    assert "my_broken_reward cannot be imported (ModuleNotFoundError: No module named 'no_such_package')" in message


def test_the_current_directory_is_searched_before_the_configs_directory(accepted, cfg, workplace, monkeypatch):
    home, here = workplace / "Réglages 設定", workplace / "here"
    home.mkdir()
    here.mkdir()
    cfg.write_text(cfg.read_text().replace("deploy.tasks.larger:correct", "rewards_by_config:score"))
    for path in (*workplace.glob("*.jsonl"), cfg, workplace / "model"):
        path.rename(home / path.name)
    (home / "rewards_by_config.py").write_text("def score(answer): return 1.0")
    monkeypatch.chdir(here)
    accepted("train", home / "tiny.toml")
    assert sys.modules.pop("rewards_by_config").__file__ == str(home / "rewards_by_config.py")
    (here / "rewards_by_config.py").write_text("def score(answer): return 2.0")
    accepted("train", home / "tiny.toml")
    assert sys.modules.pop("rewards_by_config").__file__ == str(here / "rewards_by_config.py")


@pytest.mark.parametrize("command", ["train", "train-reward", "sample-pairs"])
def test_a_run_continues_from_anywhere(accepted, configs, workplace, monkeypatch, command):
    home, run = workplace / "Проект é", workplace / "läufe/実行 1"
    home.mkdir()
    for path in (*workplace.glob("*.jsonl"), configs[command], workplace / "model"):
        path.rename(home / path.name)
    sources = {"train": "reward", "sample-pairs": "labeller"}.get(command)
    function = [f"{sources}.sources.0.function=their_rewards:score"] if sources else []
    # What it opens is found in the directory that the run is started from.
    (home / "their_rewards.py").write_text("TEXT = open('answers.txt').read()\ndef score(answer): return 1.0\n")
    (home / "answers.txt").touch()
    monkeypatch.chdir(home)
    path, root = Path(configs[command].name), ROOTS[command]
    find_users_modules(path.absolute().parent)
    with sole_owner(run) as held:
        held.begin(load_config(path, function, root), command, force=False)
    (run / "journal").mkdir()
    if command == "train-reward":
        reward, base = load_config(run / "config.toml", [], root), PolicyFiles.load("model")
        with prepared_pairs(reward, base, run, resume=False) as pairs:
            shutil.move(pairs, run / "pairs")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [*sys.path])
    accepted(command, "--resume", run.relative_to(workplace))
    assert Path.cwd() == home
    for other in ("evaluate", "train") if command == "train" else ():
        monkeypatch.chdir("/")
        sys.modules.pop("their_rewards")
        accepted(other, run / "config.toml", "--run", workplace / other)
        assert Path.cwd() == home
    sys.modules.pop("their_rewards", None)


def test_a_users_module_never_hides_a_package_of_ratchet(workplace):
    for name in ("actors", "common", "deploy", "learner"):
        (workplace / f"{name}.py").write_text("raise ImportError('a module named like one of our packages')")
    (workplace / "my_rewards.py").touch()
    root = Path(deploy.train.__file__).parents[1]
    done = subprocess.run([sys.executable, "-P", "-c", EDITABLE, root], capture_output=True, text=True, timeout=60)
    files = [root / "actors/generation/engine.py", root / "learner/ppo/losses.py", workplace / "my_rewards.py"]
    assert done.stdout.split() == [str(file) for file in files], done.stderr


def test_a_model_without_a_tokenizer_is_refused(refusal, cfg, model, workplace):
    (workplace / "bare").mkdir()
    (workplace / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    assert "model.path" in refusal("train", cfg, "model.path=bare")


@pytest.mark.parametrize("command", ["train", "sample-pairs", "evaluate"])
def test_a_kv_cache_that_holds_no_sequence_is_refused_before_ray_starts(refusal, configs, model, workplace, command):
    shutil.copytree(model, workplace / "long")
    config = workplace / "long" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8192}))
    settings = ["model.path=long", "prompts.max_tokens=4096", "generators.kv_cache_mib=1"]
    if command != "sample-pairs":
        settings += ["learner.micro_batch_tokens=8192", "reference.max_batch_tokens=8192"]
    # 4096 + 8 tokens of 2 (keys, values) * 2 layers * 1 head * 32 * 2 bytes = 256 bytes are a little over 1 MiB.
    message = refusal(command, configs[command], *settings)
    assert "generators.kv_cache_mib (1) must hold at least one sequence of 4104 tokens, 2 MiB" in message


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_environment_that_cannot_be_used_is_refused_before_ray_starts(refusal, configs, command):
    message = refusal(command, configs[command], "environment.function=nowhere:Game", "sampling.max_new_tokens=8")
    assert "environment.function (nowhere:Game): module nowhere cannot be imported" in message
    message = refusal(command, configs[command], "environment.function=tests.actors.environments.games:NoStep")
    assert "has no method step; write async def step(self, message) -> Step" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_broken_or_wrong_config_file_is_refused(refusal, configs, command):
    assert "config file no.toml does not exist" in refusal(command, "no.toml")
    other = "evaluate" if command == "sample-pairs" else "sample-pairs"
    message = refusal(command, configs[other])
    assert "required and missing" in message
    assert "unknown key" in message
    configs[command].write_text("num_steps = \n")
    assert f"{configs[command].name} is not valid TOML" in refusal(command, configs[command])


@pytest.mark.parametrize("command", ROOTS)
def test_without_config_and_resume_the_message_says_what_to_name(refusal, command):
    message = refusal(command)
    assert "name a config file or a shipped one (ratchet config --list), or a run directory with --resume" in message
    assert "name a config file to resolve, or ask for --list or --describe" in refusal("config")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_does_not_fit_the_cluster_is_refused_without_a_trace(refusal, configs, run, monkeypatch, command):
    @contextmanager
    def small(cfg, run):
        yield [Node("127.0.0.1", 2, 0, GIB)]  # torch alone takes 600 MiB in each of two to four processes

    monkeypatch.setattr(deploy.session, "cluster", small)
    assert "no node has room for" in refusal(command, configs[command])
    assert "no node has room for" in refusal(command, configs[command], "--run", run, "--force")  # it is still there


# Run directories


@pytest.mark.parametrize("command", COMMANDS)
def test_an_existing_run_directory_is_refused_with_the_options(refusal, configs, run, command):
    message = refusal(command, configs[command], "--run", run)
    assert f"{run} exists" in message
    assert f"--resume {run}" in message
    assert "--force" in message


@pytest.mark.parametrize(
    ("command", "config", "name"),
    [
        ("train", "tiny.toml", "tiny"),
        ("train-reward", "reward.toml", "reward"),
        ("sample-pairs", "sampling.toml", "sampling"),
        ("evaluate", "tiny.toml", "tiny-evaluation"),
        ("evaluate", "runs/of_ppo/config.toml", "of_ppo-evaluation"),
    ],
)
def test_the_default_run_directory_is_named_after_the_config(refusal, configs, run, command, config, name):
    shutil.copytree(run, run.with_name("of_ppo"))
    run.rename(run.with_name(name))
    assert f"runs/{name} exists" in refusal(command, config)


@pytest.mark.parametrize("command", COMMANDS)
def test_force_and_an_empty_directory_pass_the_check(accepted, configs, run, workplace, command):
    (workplace / "empty").mkdir()
    for options in (["--run", run, "--force"], ["--run", "empty"]):
        accepted(command, configs[command], *options)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_that_is_no_run_is_not_replaced(refusal, configs, workplace, command):
    (workplace / "notes.txt").write_text("mine")
    assert "notes.txt is a file" in refusal(command, configs[command], "--run", "notes.txt", "--force")
    (workplace / "home").mkdir()
    (workplace / "home" / "thesis.txt").write_text("mine")
    assert "files that do not belong to a run" in refusal(command, configs[command], "--run", "home", "--force")


# Continuing a run


@pytest.mark.parametrize("command", ROOTS)
@pytest.mark.parametrize("directory", ["nowhere", "."])
def test_resume_of_a_directory_that_is_no_run_is_refused(refusal, command, directory):
    message = refusal(command, "--resume", directory)
    assert f"{directory} is no run directory (no config.toml); name one that ratchet has made" in message


@pytest.mark.parametrize("command", ROOTS)
def test_resume_takes_its_config_and_directory_from_the_run(refusal, configs, runs, command):
    for more in ([configs[command]], ["--run", "new"]):
        message = refusal(command, "--resume", runs[command], *more)
        assert "--resume continues with the config of its run directory; give no config file and no --run" in message
    other = runs["train" if command == "train-reward" else "train-reward"]
    assert "required and missing" in refusal(command, "--resume", other)  # begun by another command


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (
            "train",
            "seed=1 rollouts_per_step=16 learner.critic=separate learner.precision=fp32 reward.normalise=none "
            "reward.sources.0.weight=2 sampling.temperature=0.5",
        ),
        (
            "train-reward",
            "seed=1 pairs_per_step=4 model.path=other data.train=more.jsonl data.max_tokens=12 loss.centre_coef=1 "
            "optimizer.learning_rate=1 learner.precision=fp32",
        ),
        (
            "sample-pairs",
            "seed=1 model.path=other prompts.source=more.jsonl prompts.pairs=9 sampling.temperature=0.5 "
            "labeller.min_gap=1 labeller.sources.0.weight=2",
        ),
    ],
)
def test_resume_refuses_settings_that_may_not_change(refusal, runs, command, settings):
    changeable = {
        "train": "num_steps, generators, reference, reward.cores, reward.labels, reward.min, reward.max, "
        "reward.timeout_s, reward.probe_timeout_s, reward.drain_s, reward.max_shortage_s, reward.in_flight, "
        "reward.isolation, reward.workers, reward.call_timeout_s, reward.max_void_share, environment.cores, "
        "environment.labels, environment.min, environment.max, environment.timeout_s, environment.probe_timeout_s, "
        "environment.drain_s, environment.max_shortage_s, environment.step_timeout_s, environment.concurrent, "
        "ppo.max_mismatch_kl, ppo.max_mismatch_steps, "
        "learner.cpus, learner.gpus, learner.threads, learner.cores, learner.labels, "
        "learner.ranks, learner.min_ranks, learner.room_wait_s, learner.micro_batch_tokens, "
        "learner.gradient_checkpointing, learner.compile, learner.deterministic, learner.timeout_s, "
        "learner.probe_timeout_s, learner.critic_path, learner.max_losses, evaluation, "
        "checkpoint, credit, critic_training, ray, logging, monitoring; ",
        "train-reward": "epochs, learner.cpus, learner.gpus, learner.threads, learner.cores, learner.labels, ",
        "sample-pairs": "generators, labeller.cores, labeller.labels, labeller.min, labeller.max, labeller.timeout_s, ",
    }[command]  # whole sections are named without a dot
    for setting in settings.split():
        message = refusal(command, "--resume", runs[command], "generators.threads=2", setting)
        assert message.startswith(f"ratchet: {setting} cannot change when a run continues")
        assert f"changeable: {changeable}" in message


def test_a_setting_that_decides_what_is_learned_is_changed_with_change(refusal, accepted, run):
    message = refusal("train", "--resume", run, "kl.coef=0.5", "optimizer.learning_rate=1")
    assert "kl.coef=0.5, optimizer.learning_rate=1 decides what is learned: give it as --change kl.coef=0.5" in message
    accepted("train", "--resume", run, "num_steps=9", "--change", "kl.coef=0.5", "--change=optimizer.learning_rate=1")
    assert "kl.coef = -1: " in refusal("train", "--resume", run, "--change", "kl.coef=-1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "RUN", "--change", "seed=3"], "--change seed=3: only these settings can change in this way: "),
        (["--resume", "RUN", "--change", "num_steps=9"], "others are given without --change, or are fixed"),
        (["tiny.toml", "--change", "kl.coef=1"], "--change kl.coef=1 is for a run that continues (--resume); give"),
        (["tiny.toml", "--accept", "model"], "--accept model is for a run that continues (--resume); leave it out"),
        (["--resume", "RUN", "--preset", "fast"], "--preset fast is for a new run; the settings of this one are in "),
    ],
)
def test_options_of_a_run_that_continues_are_checked(refusal, run, arguments, message):
    assert message in refusal("train", *(str(run) if part == "RUN" else part for part in arguments))


@pytest.mark.parametrize("command", ROOTS)
def test_resume_checks_the_settings_it_may_change(refusal, runs, command):
    message = refusal(command, "--resume", runs[command], "generators.minn=2")
    assert "generators.minn: unknown key; did you mean min?" in message
    assert "generators.min = 0" in refusal(command, "--resume", runs[command], "generators.min=0")


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("train", ""),
        ("train", "num_steps=9 generators.min=2 checkpoint.every=1"),
        ("train", "learner.micro_batch_tokens=4096 learner.gradient_checkpointing=true learner.threads=2"),
        ("train", "learner.ranks=2 learner.cpus=2 learner.gpus=1"),
        ("train", "learner.timeout_s=9 reward.timeout_s=9 reward.min=2 reward.max_void_share=1 ppo.max_mismatch_kl=0"),
        ("train", "reference.dtype=float32 evaluation.every=1 ray.dashboard=false monitoring.port=9100"),
        ("train", 'logging.sinks=["wandb"] logging.samples=0'),
        ("train-reward", ""),
        ("train-reward", "epochs=9 generators.min=2 scale.responses=3 sampling.temperature=0.5"),
        ("train-reward", "learner.micro_batch_tokens=4096 learner.timeout_s=9 checkpoint.every=1 ray.dashboard=false"),
        ("train-reward", "learner.ranks=2 learner.cpus=2 learner.gpus=1"),
        ("sample-pairs", ""),
        ("sample-pairs", "generators.min=2 labeller.min=2 labeller.timeout_s=9 ray.dashboard=false"),
    ],
)
def test_resume_accepts_settings_that_may_change(accepted, runs, command, settings):
    accepted(command, "--resume", runs[command], *settings.split())


@pytest.fixture
def trained(run):
    """A run that has done 4 steps of 4, as far as its files' names tell."""
    for step in range(4):
        (run / f"journal/step-{step:06d}.arrow").touch()
    for name in ("checkpoints/step-000004/COMPLETE", "policy/config.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
    (run / "summary.json").write_text('{"num_steps": 4}')
    return run


def test_a_finished_run_says_so_at_once(ratchet, trained, workplace):
    before = contents(workplace)
    code, out, err = ratchet("train", "--resume", trained)
    assert (code, err) == (0, "")
    assert out == (
        f"{trained} is finished: all 4 steps are done; raise num_steps to continue; ratchet export "
        f"{trained} writes the policy of its newest checkpoint\n"
    )
    config = trained / "config.toml"
    config.write_text(config.read_text() + '[optimizer]\nschedule = "cosine"\n')
    assert "its cosine schedule ends here" in ratchet("train", "--resume", trained)[1]
    config.write_bytes(before[config.relative_to(workplace)])
    assert contents(workplace) == before


def test_a_run_that_ended_before_its_policy_was_written_continues(trained):
    (trained / "summary.json").unlink()
    assert finished_training(load_config(trained / "config.toml", [], Config), trained) is None
    (trained / "summary.json").write_text("{}")
    (trained / "policy/config.json").unlink()
    assert finished_training(load_config(trained / "config.toml", [], Config), trained) is None


def test_a_finished_run_of_another_command_says_so_unless_work_is_left(ratchet, accepted, runs):
    (runs["train-reward"] / "summary.json").write_text("{}")
    (runs["sample-pairs"] / "summary.json").write_text('{"voids": 0}')
    for command in ("train-reward", "sample-pairs"):
        code, out, _ = ratchet(command, "--resume", runs[command])
        assert code == 0
        assert f"{runs[command]} is finished: " in out
    (runs["sample-pairs"] / "summary.json").write_text('{"voids": 1}')  # tried again
    accepted("sample-pairs", "--resume", runs["sample-pairs"])
    accepted("train-reward", "--resume", runs["train-reward"], "scale.responses=3")  # measured again


def test_resume_with_fewer_steps_than_are_done_is_refused(refusal, trained):
    message = refusal("train", "--resume", trained, "num_steps=1")
    assert f"num_steps (1) is fewer than the 4 steps that {trained} has done" in message
    assert f"ratchet export {trained} writes the policy" in message


def test_resume_without_the_journal_is_refused_before_ray_starts(refusal, trained):
    (trained / "journal/step-000003.arrow").unlink()
    assert "journal holds 3 steps, but" in refusal("train", "--resume", trained)
    shutil.rmtree(trained / "journal")
    message = refusal("train", "--resume", trained)
    assert "journal holds 0 steps, but" in message
    assert "is their storage mounted?" in message
    shutil.rmtree(trained / "checkpoints")
    (trained / "metrics.jsonl").write_text("{}\n")
    assert "journal holds no step, but the run has done some" in refusal("train", "--resume", trained)


@pytest.mark.parametrize("command", ROOTS)
def test_resume_of_a_run_that_is_going_on_is_refused_before_ray_starts(refusal, runs, command):
    (runs["train"] / "journal/step-000000.tmp").touch()  # the step that the other process is writing
    with sole_owner(runs[command]):
        assert f"another process works in {runs[command]}" in refusal(command, "--resume", runs[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_in_which_a_run_begins_is_refused_before_ray_starts(refusal, configs, workplace, command):
    with sole_owner(workplace / "new"):
        assert "another process works in new" in refusal(command, configs[command], "--run", "new")


@pytest.mark.parametrize(("command", "key"), [("train", "num_steps"), ("train-reward", "epochs")])
def test_resume_does_not_lengthen_a_planned_schedule(refusal, runs, command, key):
    config = runs[command] / "config.toml"
    config.write_text(config.read_text() + '\n[optimizer]\nschedule = "linear"\n')
    assert f"{key}=9 cannot change when a run continues: the linear" in refusal(
        command, "--resume", runs[command], f"{key}=9"
    )


# Help and messages


@pytest.mark.parametrize("command", [*COMMANDS, "submit", "scale", "demo", "config", ""])
def test_help_fits_a_screen(ratchet, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ratchet(*filter(None, [command]), "--help")
    assert code == 0
    assert len(out.splitlines()) <= (24 if command else 30)  # the list of commands is longer than others
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ROOTS)
def test_help_says_where_the_settings_are_explained(ratchet, command):
    _, out, _ = ratchet(command, "--help")
    words = out.partition("Every setting is explained by: ratchet ")[2].split()
    code, described, _ = ratchet(*words)
    assert code == 0
    assert described.count("; default ") == len(list(describe(ROOTS[command])))


def test_version_prints_ratchets_version_and_those_of_libraries(ratchet):
    code, out, _ = ratchet("--version")
    first, second = out.splitlines()
    assert code == 0
    assert first.split()[:2] == ["ratchet", VERSION]
    assert f"ray {ray.__version__}" in second.split(", ")


def test_a_current_directory_that_is_gone_or_not_utf8_is_refused(ratchet, tmp_path, monkeypatch):
    for name, message in (("gone", "does not exist any more"), ("\udcff", "is not valid UTF-8")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "gone":
            (tmp_path / name).rmdir()
        code, out, err = ratchet("train", "tiny.toml")
        assert (code, out) == (2, "")
        assert message in err


def test_a_remedy_quotes_the_name_of_the_run_directory(refusal, configs, run):
    run = run.rename(run.with_name("it's mine é"))
    assert f"--resume {shlex.quote(str(run))}, replace it" in refusal("train", configs["train"], "--run", run)


def test_an_argument_that_is_not_utf8_is_refused(refusal):
    for arguments in (["\udcff.toml"], ["tiny.toml", "--run", "a\udcff"], ["tiny.toml", "a\udcff=1"]):
        assert "is not valid UTF-8" in refusal("train", *arguments)


@pytest.mark.parametrize("command", ROOTS)
def test_config_describe_explains_exactly_the_settings_of_a_command(ratchet, command):
    code, out, _ = ratchet("config", "--describe", *(["--for", command] if command != "train" else []))
    assert code == 0
    assert ("--change" in out) == (command == "train")  # the only one of them with this option
    expected = [
        f"{key} ({kind}; default {default}{f'; {change}' if change else ''}) {meaning}"
        for key, kind, default, meaning, change in describe(ROOTS[command])
    ]
    if command != "train":
        expected = [text.replace(f"; {RECORDED})", ")") for text in expected]
    assert "".join(out.split()) == "".join("".join(expected).split())  # long sentences are wrapped


def test_config_prints_the_resolved_settings_as_toml(ratchet, configs):
    expected = {
        "train": ("num_steps=7", {"num_steps": 7, "rollouts_per_step": 8}),
        "train-reward": ("epochs=3", {"epochs": 3, "pairs_per_step": 2}),
        "sample-pairs": ("seed=4", {"seed": 4}),
    }
    for command, (setting, values) in expected.items():
        code, out, _ = ratchet("config", configs[command], setting, "--for", command)
        assert code == 0
        tree = tomllib.loads(out)
        assert {key: tree[key] for key in values} == values
        assert tree == ROOTS[command].model_validate(tree).model_dump(mode="json", exclude_none=True)


def test_model_directories_become_absolute_and_other_names_stay(ratchet, configs, workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    there = str((workplace / "model").resolve())

    def resolved(command, *settings):
        code, out, _ = ratchet("config", configs[command], *settings, "--for", command)
        assert code == 0
        return tomllib.loads(out)

    tree = resolved("train", 'evaluation.judges=[{name="m", model="./model"}, {name="n", model="org/name"}]')
    assert tree["model"]["path"] == there
    assert [judge["model"] for judge in tree["evaluation"]["judges"]] == [there, "org/name"]
    assert tree["prompts"]["train"] == str(workplace / "train.jsonl")
    tree = resolved("train-reward", "model.path=nowhere", "scale.policy=~/model")
    assert (tree["model"]["path"], tree["scale"]["policy"]) == ("nowhere", there)
    tree = resolved("sample-pairs", "model.path=embedded:smollm2-135m-instruct")
    assert tree["model"]["path"] == "embedded:smollm2-135m-instruct"


def test_config_refuses_a_wrong_file_and_a_command_without_configs(refusal, ratchet, configs):
    assert "data: required and missing" in refusal("config", configs["train"], "--for", "train-reward")
    code, out, err = ratchet("config", configs["train"], "--for", "demo")
    assert (code, out) == (2, "")
    assert "sample-pairs" in err


@pytest.mark.parametrize(
    ("command", "work"),
    [("train", "run_training"), ("train-reward", "run_reward_training"), ("sample-pairs", "run_pair_sampling")],
)
def test_an_interrupted_run_says_how_to_continue_once_it_has_begun(ratchet, configs, monkeypatch, command, work):
    begins = False

    def interrupted(cfg, directory, **kwargs):
        if begins:
            with sole_owner(directory) as held:
                held.begin(cfg, command, force=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULES[command], work, interrupted)
    assert ratchet(command, configs[command]) == (130, "", "ratchet: interrupted; nothing was begun\n")
    begins = True
    code, _, err = ratchet(command, configs[command])
    assert code == 130
    assert f"continue with ratchet {command} --resume runs/{configs[command].stem}" in err


def test_an_internal_error_is_one_line_and_its_traceback_is_saved(cfg, monkeypatch, ratchet):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(deploy.train, "run_training", broken)
    code, out, err = ratchet("train", cfg)
    assert (code, out) == (1, "")
    assert err.startswith("ratchet: RuntimeError: a bug; this is a fault of Ratchet or of a library; the traceback is")
    assert err.count("\n") == 1
    [kept] = (cfg.parent / "temporary").iterdir()
    assert str(kept) in err
    assert "in broken\n" in kept.read_text()


def test_the_installed_command_refuses_in_the_same_way(cfg, workplace):
    command = Path(sys.executable).with_name("ratchet")
    done = subprocess.run([command, "train", cfg, "sede=1"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "ratchet: the command line (sede=1) has 1 fault(s):\n  sede: unknown key; did you mean seed?\n"
    )
    assert not (workplace / "runs").exists()
