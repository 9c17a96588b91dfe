"""`ratchet train-critic`: input that is refused before Ray starts, and how a training continues."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import deploy.session
from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.files import read_records, write_json
from common.types import Prompt, Rollout, RolloutRef, Score
from deploy.cli import main
from deploy.journal_parts import RECORD, Asked, chosen_steps, new_parts, read_parts, write_parts
from deploy.plan.placement import Node
from deploy.policy_files import PolicyFiles
from deploy.run.critic import check_critic
from deploy.run.directory import sole_owner
from deploy.run.finished import finished_critic_training
from deploy.run.identity import identity_of
from deploy.train_critic import run_critic_training
from learner.critic.evaluation import EXPLAINED
from learner.critic.rollouts import Rollouts
from learner.loop.journal import Journal
from learner.ppo.critic_files import read_critic
from tests.event_files import scalars
from tests.fakes import FakeRoles, save_tiny_model, tiny_config
from tests.learner.critic.journals import step_table, write_journal
from tests.learner.critic.test_training import OneProcess


class RayWouldStart(SystemExit):
    """Raised where a run would start Ray: the input has passed every check."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def begin_note(cfg: Config) -> dict[str, Any]:
    """As `ratchet train` begins a journal with this config."""
    identity = identity_of(cfg, PolicyFiles.load(cfg.model.path), [], ())
    return {"identity": identity, "config": cfg.model_dump(mode="json", exclude_none=True)}


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Run directories with journals: one fits the config, and each other one differs in one thing."""
    directory, cfg = tmp_path_factory.mktemp("runs"), tiny_config(model)
    other_model = save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    source = {"name": "a_words", "function": "tests.tasks:a_words"}
    tables = [step_table(step) for step in range(3)]
    fitting = begin_note(cfg)
    write_journal(directory / "fits", tables, begin=fitting)
    write_journal(directory / "also", [step_table(0, 1)], begin=fitting)
    write_journal(directory / "prompt", [step_table(0, prompts=1)], begin=fitting)
    write_journal(directory / "model", tables, begin=begin_note(tiny_config(other_model)))
    for name, sources in {
        "weight": [{**source, "weight": 0.5}],
        "function": [{**source, "function": "tests.tasks:fails_on_some"}],
        "names": [{**source, "name": "others"}, {**source, "name": "more"}],
    }.items():
        write_journal(directory / name, tables, begin=begin_note(tiny_config(model, reward={"sources": sources})))
    changed = {**fitting, "identity": {**fitting["identity"], "reward.sources.0": "0" * 64}}
    write_journal(directory / "files", tables, begin=changed)
    accepted = write_journal(directory / "accepted", tables[:1], begin=fitting)
    accepted.note("accept", identity={"model": "0" * 64})
    accepted.append(tables[1], policy_version=1, prompts={})
    game = {"sources": [{"name": "game", "environment": True}]}
    episodes = tiny_config(model, reward=game, environment={"function": "tests.environments:AWords", "max_tokens": 40})
    write_journal(directory / "game", tables, begin=begin_note(episodes))
    write_journal(directory / "headless", tables)
    (directory / "link").symlink_to("fits")
    return directory


@pytest.fixture
def command(model, runs, tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty directory. Returns exit code and stderr."""

    def no_ray(cfg, run):
        raise RayWouldStart(99)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(deploy.session, "cluster", no_ray)
    (tmp_path / "tiny.toml").write_text(tiny_config(model).to_toml())

    def call(*arguments: Any) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["ratchet", "train-critic", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not (tmp_path / "runs").exists()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "options",
    [
        "--from {}/fits",
        "--from {}/fits --from {}/also",
        "--from {}/fits --steps 1:",
        "--from {}/accepted --steps :1 critic_training.heldout_share=0.5",
        "learner.critic=separate --from {}/fits",
        "--from {}/game environment.function=tests.environments:AWords environment.max_tokens=40 "
        'reward.sources=[{{name="game",environment=true}}]',
    ],
)
def test_journals_that_fit_are_accepted(command, runs, options):
    assert command("tiny.toml", *options.format(runs, runs).split()) == (99, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name at least one run of ratchet train whose journal the critic learns from, with --from RUN"),
        ("--from {}/nowhere", "nowhere) has no journal with steps"),
        ("--from {}/fits --from {}/fits", "fits twice; name it once"),
        ("--from {}/model", "it began with another base model (other weights, config or tokenizer) than model.path"),
        ("--from {}/accepted", "it began with another base model"),
        ("--from {}/weight", "its responses were scored with the reward source a_words at weight 0.5, and this config"),
        (
            "--from {}/function",
            'with function "tests.tasks:fails_on_some" in the reward source a_words, and this config',
        ),
        ("--from {}/names", "with the reward sources others, more, and this config has a_words"),
        (
            "--from {}/game environment.function=tests.environments:Restarting environment.max_tokens=40 "
            'reward.sources=[{{name="game",environment=true}}]',
            'scored with function "tests.environments:AWords" in the reward source game, and this config has "tests.',
        ),
        ("--from {}/files", "its responses were scored with other files behind the reward source a_words"),
        ("--from {}/fits --from {}/weight", "weight) does not fit this config"),
        ("--from {}/headless", "does not say how its run began"),
        ("--from {}/prompt", "8 responses to a single prompt"),
        ("--from {}/fits --steps 7", "--steps (7) must read A:B, such as 10:40"),
        ("--from {}/fits --steps 2:9", "--steps 2:9 is not in the journal of"),
        ("--from {}/fits --from {}/link", "fits twice; name it once"),
        ("--sample 64 --steps banana", "--steps (banana) must read A:B"),
        ("--sample 64 --steps 1:", "--steps (1:) chooses among the steps of --from"),
        ("--sample 1", "--sample (1) asks a single prompt"),
        (
            "--sample 16 optimizer.warmup_steps=2 critic_training.passes=1 rollouts_per_step=8",
            "(2) must be below the 2",
        ),
        ("--from {}/fits ppo.advantages=returns", 'ppo.advantages ("returns") needs no critic'),
        ("--from {}/fits optimizer.warmup_steps=3 critic_training.passes=1 rollouts_per_step=8", "(3) must be below"),
        ("--from {}/fits learner.critic=separate learner.critic_frozen=conv", "(conv) matches no parameter"),
        ("--from {}/fits critic_training.heldout_share=1", "critic_training.heldout_share"),
    ],
)
def test_bad_input_is_refused_with_one_message(command, runs, options, message):
    code, err = command("tiny.toml", *options.format(runs, runs).split())
    assert code == 2
    assert err.startswith("ratchet: ")
    assert message in err
    assert "Traceback" not in err


def test_responses_of_other_settings_are_a_warning(command, runs):
    code, err = command("tiny.toml", "--from", runs / "fits", "sampling.temperature=0.5")
    assert (code, err.count("sampling.temperature was 1.0 and is 0.5 now")) == (99, 1)


def test_a_disk_without_room_for_the_states_is_refused(command, runs, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("deploy.critic_checks.shutil.disk_usage", lambda path: usage)
    code, err = command("tiny.toml", "--from", runs / "fits")
    assert code == 2
    assert "the states of the shared trunk may take 0.0 GiB" in err
    assert command("tiny.toml", "--from", runs / "fits", "learner.critic=separate")[0] == 99
    code, err = command("tiny.toml", "--sample", 64)  # real responses may be shorter
    assert (code, "may take 0.0 GiB" in err) == (99, True)


@pytest.mark.parametrize(
    ("text", "steps"), [(None, slice(None)), ("3:9", slice(3, 9)), (":9", slice(None, 9)), ("3:", slice(3, None))]
)
def test_steps_are_half_open(text, steps):
    assert chosen_steps(text) == steps


def test_steps_in_the_wrong_order_are_refused():
    with pytest.raises(UserError, match=r"^--steps \(9:3\) has no step: A must be below B, as in 3:10$"):
        chosen_steps("9:3")


def test_a_killed_sampling_knows_what_it_was_asked_for(runs, tmp_path):
    asked = Asked([runs / "fits"], "1:", 64)
    asked.write(tmp_path)
    assert Asked.read(tmp_path) == asked
    (tmp_path / RECORD).touch()  # the training has begun: its record counts
    assert Asked.read(tmp_path) == Asked()
    (tmp_path / RECORD).unlink()
    (tmp_path / "sample.json").write_text("{}")
    with pytest.raises(UserError, match=r"sample\.json cannot be read"):
        Asked.read(tmp_path)


def test_the_runs_own_journal_is_read_whole_after_those_of_from(runs):
    parts = Asked([runs / "fits"], "1:", 64).parts(runs / "also")
    assert [(Path(part.run).name, part.first) for part in parts] == [("fits", 1), ("also", 0)]
    assert [Path(part.run).name for part in Asked([], None, 64).parts(runs / "also")] == ["also"]


@pytest.mark.parametrize("run", ["fits", "link", "."])
@pytest.mark.parametrize("responses", [0, 64])
def test_a_journal_in_the_directory_that_is_replaced_is_refused(runs, run, responses):
    with pytest.raises(UserError, match=r"fits\) is in the run directory of this training .*name another"):
        Asked([runs / "also", runs / "fits"] if run != "." else [runs / "fits"], None, responses).parts(runs / run)


def test_a_sampling_checks_everything_before_anything_starts(command, runs):
    assert command("tiny.toml", "--sample", 64)[0] == 99
    assert command("tiny.toml", "--sample", 64, "--from", runs / "fits")[0] == 99
    code, err = command("tiny.toml", "--sample", 64, "--from", runs / "model")
    assert (code, "it began with another base model" in err) == (2, True)
    code, err = command("tiny.toml", "--sample", 64, "prompts.train=nothing.jsonl")
    assert (code, "nothing.jsonl" in err) == (2, True)


@pytest.fixture
def begun(model, runs, tmp_path):
    """A training that has begun, as its directory is left by a kill."""
    cfg, directory = tiny_config(model), tmp_path / "critic"
    with sole_owner(directory) as owned:
        owned.begin(cfg, "train-critic", force=False)
    parts = new_parts([runs / "fits"], slice(1, None))
    write_parts(directory, cfg, Rollouts(parts))
    return cfg, directory, parts


def test_a_training_that_continues_reads_the_same_steps(begun, command):
    cfg, directory, parts = begun
    assert read_parts(directory, cfg) == parts
    assert command("--resume", directory) == (99, "")
    code, err = command("--resume", directory, "--from", parts[0].run)
    assert (code, "leave --from, --steps and --sample out" in err) == (2, True)
    code, err = command("--resume", directory, "critic_training.heldout_share=0.5")
    assert (code, "critic_training.heldout_share (0.5) was 0.1" in err) == (2, True)
    assert command("--resume", directory, "critic_training.passes=50")[0] == 99
    code, err = command("--resume", directory, "kl.coef=0.1")
    assert (code, "kl.coef=0.1 cannot change when a run continues" in err, "--change" in err) == (2, True, False)
    (directory / RECORD).write_text(json.dumps({"heldout_share": 0.1, "passes": 20}))
    assert "journals.json cannot be read" in command("--resume", directory)[1]
    (directory / RECORD).unlink()
    assert "was stopped before it began; begin again with --force" in command("--resume", directory)[1]


def test_more_passes_do_not_fit_a_schedule_that_falls(begun):
    cfg, directory, _ = begun
    more = {
        "critic_training": cfg.critic_training.model_copy(update={"passes": 9}),
        "optimizer": cfg.optimizer.model_copy(update={"schedule": "linear"}),
    }
    with pytest.raises(UserError, match=r"passes \(9\) cannot change: the linear schedule was planned for 20"):
        read_parts(directory, cfg.model_copy(update=more))


def test_each_command_continues_its_own_runs_only(begun, command, monkeypatch, capsys):
    _, directory, _ = begun
    monkeypatch.setattr(sys, "argv", ["ratchet", "train", "--resume", str(directory)])
    with pytest.raises(SystemExit):
        main()
    assert "was made by ratchet train-critic; continue it with that command" in capsys.readouterr().err
    record = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps({**record, "command": "train"}))
    assert "was made by ratchet train; continue it with that command" in command("--resume", directory)[1]


def test_a_finished_training_says_so(begun, command):
    cfg, directory, _ = begun
    (directory / "summary.json").write_text("{}")
    assert command("--resume", directory)[0] == 0
    assert load_config(directory / "config.toml", [], Config) == cfg
    assert command("--resume", directory, "critic_training.patience=9")[0] == 99


@pytest.mark.parametrize(
    ("passes", "schedule", "message"),
    [
        (20, "constant", "raise critic_training.passes to continue"),
        (7, "linear", "raise critic_training.patience to continue"),
        (20, "linear", "its linear schedule ends here"),
    ],
)
def test_a_finished_training_says_which_setting_continues_it(model, tmp_path, capsys, passes, schedule, message):
    cfg = tiny_config(model, optimizer={"schedule": schedule})
    with sole_owner(tmp_path / "critic") as owned:
        owned.begin(cfg, "train-critic", force=False)
    (tmp_path / "critic/summary.json").write_text(json.dumps({"passes": passes}))
    assert finished_critic_training(cfg, tmp_path / "critic") == {"passes": passes}
    assert message in capsys.readouterr().out


def test_the_default_directory_is_named_after_the_config(runs, command, monkeypatch):
    directories: list[Path] = []
    monkeypatch.setattr(
        "deploy.train_critic.run_critic_training", lambda cfg, directory, **_: directories.append(directory)
    )
    command("tiny.toml", "--from", runs / "fits")
    Path("mine").mkdir()
    Path("tiny.toml").rename("mine/config.toml")
    command("mine/config.toml", "--from", runs / "fits")
    assert directories == [Path("runs/tiny-critic"), Path("runs/mine-critic")]


def test_a_config_of_a_run_finds_its_files_and_the_journals(runs, command, monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    Path("tiny.toml").rename(tmp_path / "run/config.toml")
    write_json(tmp_path / "run/run.json", {"ratchet_run": 1, "directory": str(tmp_path / "home")})
    monkeypatch.chdir(runs)
    given = []
    monkeypatch.setattr(
        "deploy.train_critic.run_critic_training", lambda cfg, run, *, sources, **_: given.extend([run, *sources])
    )
    command(tmp_path / "run/config.toml", "--from", "fits", "--run", "new")
    assert given == [runs / "new", runs / "fits"]
    assert Path.cwd() == tmp_path / "home"


class InThisProcess(OneProcess):
    """The group of ranks without Ray."""

    role = "CriticTrainer"

    def __init__(self, create: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(create(0))

    async def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


@pytest.fixture
def without_ray(monkeypatch):
    @contextmanager
    def nodes(cfg, run):
        yield [Node("here", cpus=8, gpus=0, memory=1 << 40)]

    def actor(role: Any, *about: Any) -> Any:
        return SimpleNamespace(remote=role)

    monkeypatch.setattr("deploy.session.cluster", nodes)
    monkeypatch.setattr("deploy.pass_training.actor", actor)
    monkeypatch.setattr("deploy.train_critic.CriticTrainerGroup", InThisProcess)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_command_leaves_a_critic_and_its_figures(model, runs, tmp_path, without_ray, capsys, monkeypatch, kind):
    cfg = tiny_config(
        model,
        rollouts_per_step=8,
        ppo={"minibatches": 1},
        learner={"critic": kind},
        critic_training={"passes": 2, "heldout_share": 0.3},
        logging={"sinks": ["tensorboard"]},
    )
    directory = tmp_path / "critic"
    summary = run_critic_training(cfg, directory, sources=[runs / "fits", runs / "also"])
    out = capsys.readouterr().out
    assert json.loads((directory / "summary.json").read_text()) == summary
    evaluations = read_records(directory / "evaluations.jsonl")
    best = max(evaluations, key=lambda record: record["value/r2"])
    assert summary["r2"] == best["value/r2"]
    assert (summary["explained_variance"], summary["best_pass"]) == (best[EXPLAINED], best["epoch"])
    assert (summary["passes"], summary["training_rollouts"] + summary["heldout_rollouts"]) == (2, 32)
    record = read_critic(directory / "critic")
    assert [Path(part["run"]).name for part in record.trained_on] == ["fits", "also"]
    check_critic(
        cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"critic_path": str(directory / "critic")})}),
        PolicyFiles.load(cfg.model.path),
    )
    assert f"{kind} critic · {summary['training_rollouts']} rollouts to learn from" in out
    [row] = [line for line in out.splitlines() if "quarter 4" in line]
    shown = [f"{best[f'value/{figure}/quarter_4']:.3f}" for figure in ("explained_variance", "returns_var")]
    assert f"R2 {best['value/r2']:.3f}" in out
    assert [cell for cell in row.split() if cell[-1].isdigit()][1:] == shown
    steps = [(step, value) for step, value in scalars(directory)["value/loss"]]
    assert [step for step, _ in steps] == [record["step"] for record in read_records(directory / "metrics.jsonl")]
    leftover = directory / ".critic-abcdefgh"
    leftover.mkdir()
    shutil.copytree(directory / "critic", directory / "best-critic")  # as a kill before the last rename leaves it
    more = cfg.model_copy(update={"critic_training": cfg.critic_training.model_copy(update={"passes": 3})})
    assert run_critic_training(cfg, directory, resume=True) == summary
    with monkeypatch.context() as patch:
        patch.setattr("deploy.train_critic.train_critic", die)
        with pytest.raises(Killed):
            run_critic_training(more, directory, resume=True)
    assert run_critic_training(more, directory, resume=True)["passes"] == 3  # it was not taken for finished
    assert not leftover.exists()
    assert {path.name for path in directory.iterdir()} == {
        *("checkpoints", "config.toml", "critic", "evaluations.jsonl", "journals.json", "metrics.jsonl"),
        *("run.json", "summary.json", "tensorboard"),
    }


class Killed(BaseException):
    """Stands for a kill of the process."""


def die(run: Any) -> None:
    raise Killed


class FakeEngines(FakeRoles):
    """Scores alternate. Dies when it is asked for response number `dies_at`."""

    def __init__(self, events: list[str], dies_at: int | None) -> None:
        super().__init__(events)
        self._left = dies_at

    async def write(self, prompt: Prompt) -> Rollout:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Killed
        return await super().write(prompt)

    async def score(self, ref: RolloutRef) -> Score:
        return Score(float(ref.sample_id.prompt % 2), {"a_words": float(ref.sample_id.prompt % 2)})


@pytest.fixture
def seeds() -> list[int]:
    """Those of the generators that were started."""
    return []


@pytest.fixture
def engines(monkeypatch, without_ray, seeds):
    """Stands in for the pools. Call it with the number of the response that kills the process. Returns the events."""

    def install(dies_at: int | None = None) -> list[str]:
        events: list[str] = []
        roles = FakeEngines(events, dies_at)

        class Starter:
            def __init__(self, cfg: Any, **callbacks: Any) -> None:
                events.append("engines start")

            async def writers(self, *about: Any, seed: int, **more: Any) -> FakeEngines:
                seeds.append(seed)
                return roles

            async def rewards(self, *about: Any, **more: Any) -> FakeEngines:
                return roles

            def stop(self) -> None:
                events.append("engines stop")

        class Group(InThisProcess):
            async def start(self) -> None:
                events.append("trainer starts")

        monkeypatch.setattr("deploy.sample_journal.Starter", Starter)
        monkeypatch.setattr("deploy.sample_journal.RewardPool", lambda pool, keep: pool)
        monkeypatch.setattr("deploy.train_critic.CriticTrainerGroup", Group)
        return events

    return install


def sampled(directory: Path) -> list[str]:
    return [sample_id for step in Journal(directory / "journal").since(0) for sample_id in step.sample_ids]


def test_the_starting_policy_is_sampled_before_the_trainer_starts(model, runs, tmp_path, engines, seeds):
    cfg = tiny_config(model, rollouts_per_step=8, critic_training={"passes": 1, "heldout_share": 0.3})
    events = engines()
    summary = run_critic_training(cfg, tmp_path / "whole", sources=[runs / "fits"], sample=20)
    assert events == ["engines start", *["generate v0"] * 20, "engines stop", "trainer starts"]
    parts = read_critic(tmp_path / "whole/critic").trained_on
    assert [(Path(part["run"]).name, part["rollouts"]) for part in parts] == [("fits", 24), ("whole", 20)]
    assert [(part["seed"], part["learns"]) for part in parts] == [(cfg.seed, True), (cfg.seed, False)]
    assert parts[1]["prompts"] == Journal(tmp_path / "whole/journal").identity["prompts.train"]

    engines(dies_at=17)  # 16 are asked for at first, and one more once 8 are in the journal
    with pytest.raises(Killed):
        run_critic_training(cfg, tmp_path / "cut", sources=[runs / "fits"], sample=20)
    kept = len(sampled(tmp_path / "cut"))
    assert kept in (8, 16)
    events = engines()
    resumed = run_critic_training(cfg, tmp_path / "cut", resume=True)
    assert events == ["engines start", *["generate v0"] * (20 - kept), "engines stop", "trainer starts"]
    assert sampled(tmp_path / "cut") == sampled(tmp_path / "whole")
    assert {**resumed, "seconds": 0} == {**summary, "seconds": 0}
    assert seeds == [seeds[0]] * 3
    assert seeds[0] != cfg.seed  # or the critic would learn from the run's own first responses
