"""The results harness: what it runs and in which order, and the numbers of its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config.loading import load_config
from tests.results.curves import curve
from tests.results.experiments import EXPERIMENTS
from tests.results.finished import Finished
from tests.results.measured import CRITIC_SECONDS, MEASURED, command, keep, kept, measure
from tests.results.runner import CONFIGS, REPOSITORY, ROOTS, Runner
from tests.results.tables import cell, interval, section, table, written
from tests.results.works import Arm, Column, Experiment, Work


def works(work: Work) -> list[Work]:
    return [other for need in work.needs for other in works(need)] + [work]


ALL = {work.name: work for e in EXPERIMENTS.values() for arm in e.arms for work in works(arm.work)}


@pytest.mark.parametrize("name", ALL)
def test_the_settings_of_a_work_are_those_of_its_config(name, tmp_path):
    work = ALL[name]
    _, config, *settings = Runner(tmp_path).command(work, seed=7)
    settings = settings[: len(settings) - len(work.options)]
    cfg = load_config(REPOSITORY / config, settings, ROOTS[work.command])
    assert cfg.seed == 7
    assert config.startswith(CONFIGS)


def test_arms_with_one_name_are_one_work():
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            assert all(ALL[work.name] == work for work in works(arm.work))


def test_the_baselines_differ_only_in_the_baseline(tmp_path):
    cfgs = []
    for arm in EXPERIMENTS["baselines"].arms[:5]:
        _, config, *settings = Runner(tmp_path).command(arm.work, seed=0)
        cfg = load_config(REPOSITORY / config, settings, ROOTS["train"])
        assert cfg.prompts.rollouts_per_prompt == 4
        same = {"ppo": cfg.ppo.model_copy(update={"advantages": "gae", "value_lam": None})}
        same["learner"] = cfg.learner.model_copy(update={"critic_path": None, "critic": "shared"})
        same["optimizer"] = cfg.optimizer.model_copy(update={"critic_learning_rate": 1e-5})
        cfgs.append(cfg.model_copy(update=same))
    assert all(cfg == cfgs[0] for cfg in cfgs)


class FakeRatchet:
    """Records the commands. Those named in `fails` end with an error, once each, after the run has begun."""

    def __init__(self, *fails: str) -> None:
        self.commands: list[str] = []
        self._fails = list(fails)

    def __call__(self, arguments, log: Path) -> int:
        directory = Path(arguments[arguments.index("--resume" if "--resume" in arguments else "--run") + 1])
        name = f"{directory.parent.name}/{directory.name}"
        self.commands.append(f"{arguments[0]} {'continue ' if '--resume' in arguments else ''}{name}")
        directory.mkdir(exist_ok=True)
        (directory / "config.toml").touch()
        if name in self._fails:
            self._fails.remove(name)
            return 1
        (directory / "summary.json").write_text("{}")
        return 0


FIRST = Work("first", "larger.toml", command="train-critic", options=("--sample", "8"))
SHARED = Work("shared", "positive-pairs.toml", command="sample-pairs", seeded=False)
ONE = Arm("one", Work("one", "larger.toml", ("learner.critic_path={first}/critic",), needs=(FIRST, SHARED)), FIRST, 8)
TWO = Arm("two", Work("two", "larger.toml"))


def test_needs_run_first_seed_by_seed_and_finished_works_are_skipped(tmp_path):
    ratchet = FakeRatchet()
    Runner(tmp_path, run=ratchet).run_all([ONE, TWO], [0, 1])
    assert ratchet.commands == [
        "train-critic first/seed-0", "sample-pairs shared/all-seeds", "train one/seed-0", "train two/seed-0",
        "train-critic first/seed-1", "train one/seed-1", "train two/seed-1",
    ]  # fmt: skip
    Runner(tmp_path, run=ratchet).run_all([ONE, TWO], [0, 1])
    assert len(ratchet.commands) == 7


def test_a_work_that_failed_is_continued_and_stops_only_those_that_need_it(tmp_path):
    ratchet = FakeRatchet("first/seed-0")
    runner = Runner(tmp_path, run=ratchet)
    runner.run_all([ONE, TWO], [0])
    assert ratchet.commands == ["train-critic first/seed-0", "train two/seed-0"]
    assert runner.failed == ["first/seed-0"]
    Runner(tmp_path, run=ratchet).run_all([ONE, TWO], [0])
    assert ratchet.commands[2:] == [
        "train-critic continue first/seed-0", "sample-pairs shared/all-seeds", "train one/seed-0",
    ]  # fmt: skip


def test_a_directory_that_another_command_made_is_refused(tmp_path):
    Runner(tmp_path, run=FakeRatchet()).run_all([TWO], [0])
    with pytest.raises(ValueError, match=r"made with other arguments .*remove it"):
        Runner(tmp_path, ["rollouts_per_step=8"], run=FakeRatchet()).run_all([TWO], [0])


def test_a_command_names_its_needs_and_settings_of_other_commands_are_left_out(tmp_path):
    runner = Runner(tmp_path, ["learner.gpus=0.4"])
    assert runner.command(ONE.work, 3) == [
        "train", "deploy/configs/larger.toml", f"learner.critic_path={tmp_path}/first/seed-3/critic",
        "learner.gpus=0.4", "seed=3",
    ]  # fmt: skip
    assert runner.command(SHARED, 0) == ["sample-pairs", "deploy/configs/positive-pairs.toml", "seed=0"]
    assert runner.command(FIRST, 0)[-2:] == ["--sample", "8"]
    again = Work("again", "larger.toml", command="train-critic", options=("--from", "{first}"), needs=(FIRST,))
    assert runner.command(again, 3)[-2:] == ["--from", f"{tmp_path}/first/seed-3"]


def evaluation(version: int, pass_rate: float, *, kl: float = 0.0, gold: float = 0.0) -> dict:
    about = {"kl_per_response": kl, "components": {"gold": gold}}
    return {"policy_version": version, "score": 0.0, "pass_at_1": pass_rate, **about}


def made_up_run(directory: Path, *evaluations: dict, credit: tuple[dict[str, list], ...] = ()) -> Finished:
    """Each step takes 1 s to generate, 2 s to learn, and 8 s for a checkpoint, which does not count."""
    (directory / "credit").mkdir(parents=True)
    (directory / "config.toml").write_text("rollouts_per_step = 64\n[ppo]\ngamma = 0.5\n")
    steps = [{"step": s, "time/generate_s": 1.0, "time/learn_s": 2.0, "time/checkpoint_s": 8.0} for s in range(4)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    for step, columns in enumerate(credit):
        pq.write_table(pa.table(columns), directory / f"credit/step-{step:06d}.parquet")
    (directory / "summary.json").write_text("{}")
    return Finished(directory)


def test_the_first_evaluation_at_the_goal_counts(tmp_path):
    rates = [(0, 0.2), (1, 0.7), (2, 0.9), (3, 0.8), (4, 0.95)]
    run = made_up_run(tmp_path / "run", *(evaluation(v, rate) for v, rate in rates))
    assert (run.responses_to(0.9), run.seconds_to(0.9)) == (2 * 64, 2 * 3.0)
    assert (run.responses_to(0.99), run.seconds_to(0.99)) == (None, None)
    assert run.lost_pass_rate() == 0
    assert run.best_pass_rate() == 0.95
    assert (run.largest("step"), run.mean("step", slice(1, 3)), run.largest("time/unknown_s")) == (3, 1.5, None)


def test_the_judges_score_is_read_between_two_evaluations(tmp_path):
    points = [(0, 0.0, 0.1), (2, 1.0, 0.3), (4, 3.0, 0.5), (6, 2.0, 0.9), (8, 5.0, 0.6)]
    run = made_up_run(tmp_path / "run", *(evaluation(v, 0, kl=kl, gold=gold) for v, kl, gold in points))
    assert run.judged_at_kl("gold", 2.0) == pytest.approx(0.4)  # half-way from 1 to 3 nats
    assert run.judged_at_kl("gold", 3.0) == pytest.approx(0.5)
    assert run.judged_at_kl("gold", 4.0) == pytest.approx(0.9 + (4 - 2) / (5 - 2) * (0.6 - 0.9))
    assert run.judged_at_kl("gold", 6.0) is None
    assert (run.best_judged("gold"), run.last_judged("gold"), run.last_kl()) == (0.9, 0.6, 5.0)
    assert (run.best_judged("silver"), run.last_judged("silver")) == (None, None)


def test_the_variance_that_a_baseline_leaves_is_of_returns_minus_it(tmp_path):
    # Returns (gamma 0.5) of the rewards 0 4 | 1: 2 4 1, less the values 1 1 0: 1 3 1. Their variances: 14/9 and 8/9.
    critic = {
        "rewards": [[0.0, 4.0], [1.0]],
        "ends": [[False, True], [True]],
        "values": [[1.0, 1.0], [0.0]],
        "advantages": [[7.0, -9.0], [5.0]],
    }
    ignorant = critic | {"values": [[0.0, 0.0], [0.0]]}  # its small advantages with lambda below 1 do not count
    run = made_up_run(tmp_path / "critic", credit=(ignorant, critic))
    assert run.first_variance_left() == pytest.approx(14 / 9)
    assert run.share_left() == pytest.approx((14 + 8) / (14 + 14))
    # Without a critic the advantages count: -3 3 | 0 leaves 6.
    without = critic | {"values": [None, None], "advantages": [[-3.0, 3.0], [0.0]]}
    run = made_up_run(tmp_path / "group", credit=(without,))
    assert run.first_variance_left() == pytest.approx(6)
    assert run.share_left() == pytest.approx(6 * 9 / 14)


def test_the_interval_of_three_seeds_is_students(tmp_path):
    # 1 2 3: mean 2, standard deviation 1; t(2) = 4.303; 4.303 / root 3 = 2.484.
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(-0.484, abs=1e-3), pytest.approx(4.484, abs=1e-3))
    assert interval([5.0]) is None
    column = Column("x", lambda run: None, "{:.1f}", "never")
    assert cell([1, 2, 3], column) == "2.0 (-0.5 to 4.5)"
    assert cell([5], column) == "5.0"
    assert cell([2, None, 3], column) == "2 of 3: 2.0, 3.0"
    assert cell([None, None], column) == "never"


def test_a_table_has_a_row_for_each_arm_with_finished_runs(tmp_path):
    for seed, rate in ((0, 0.5), (1, 0.7)):
        made_up_run(tmp_path / f"two/seed-{seed}", evaluation(4, rate))
    experiment = Experiment("about", (ONE, TWO), (Column("pass@1", Finished.last_pass_rate, "{:.1f}"),))
    # 0.5 0.7: mean 0.6, standard deviation 0.1414; t(1) = 12.706; 12.706 * 0.1414 / root 2 = 1.27.
    found = measure(experiment, experiment.arms, tmp_path, [0, 1, 2])
    assert table(experiment, experiment.arms, found).splitlines() == [
        "|  | seeds | pass@1 |",
        "|---|---|---|",
        "| two | 2 | 0.6 (-0.7 to 1.9) |",
    ]


def test_the_row_of_a_pretrained_critic_says_what_it_took(tmp_path):
    for seed, seconds in ((0, 30.0), (1, 40.0)):
        made_up_run(tmp_path / f"one/seed-{seed}", evaluation(4, 0.5))
        (tmp_path / f"first/seed-{seed}").mkdir(parents=True)
        (tmp_path / f"first/seed-{seed}/summary.json").write_text(json.dumps({"seconds": seconds}))
    experiment = Experiment("about", (ONE,), (Column("pass@1", Finished.last_pass_rate, "{:.1f}"),))
    first, *_, last = table(experiment, [ONE], measure(experiment, [ONE], tmp_path, [0, 1])).splitlines()
    assert (first, last) == ("|  | one (+ 8 responses and 35 s before the run) |", "| pass@1 | 0.5 (0.5 to 0.5) |")


def test_seeds_are_added_to_the_kept_figures(tmp_path):
    experiment = Experiment("about", (ONE, TWO), (Column("pass@1", Finished.last_pass_rate, "{:.1f}"),))
    path = tmp_path / "kept/made-up.json"
    first = {"one": {0: {"pass@1": 0.5, CRITIC_SECONDS: 30.0}}, "two": {0: {"pass@1": None}}}
    assert keep(path, experiment.arms, first) == first
    made_up_run(tmp_path / "two/seed-2", evaluation(4, 0.7))
    merged = keep(path, experiment.arms, measure(experiment, experiment.arms, tmp_path, [0, 1, 2]))
    assert merged == {**first, "two": {0: {"pass@1": None}, 2: {"pass@1": 0.7}}}
    assert kept(path, experiment.arms) == merged
    # Figures of another command do not count, and leave the file with the next `write`.
    changed = (ONE, Arm("two", Work("two", "larger.toml", ("num_steps=3",))))
    assert kept(path, changed) == {"one": first["one"]}
    assert keep(path, changed, {}) == {"one": first["one"], "two": {}}


@pytest.mark.parametrize("path", sorted(MEASURED.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_has_the_table_of_the_kept_figures(path):
    experiment = EXPERIMENTS[path.stem]
    entries = json.loads(path.read_text(encoding="utf-8"))
    assert {name: entry["command"] for name, entry in entries.items()} == {
        arm.work.name: command(arm.work) for arm in experiment.arms if arm.work.name in entries
    }
    page = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    assert section(experiment, path.stem, experiment.arms, kept(path, experiment.arms)) in page


def test_a_curve_has_the_mean_and_the_interval_of_its_seeds(tmp_path):
    one = made_up_run(tmp_path / "0", evaluation(0, 0.1), evaluation(2, 0.5), evaluation(4, 0.9))
    two = made_up_run(tmp_path / "1", evaluation(0, 0.3), evaluation(2, 0.7))
    # 12.706 * 0.1414 / root 2 = 1.27, as above. The second run has no evaluation of version 4.
    (start, mean, (low, high)), (later, *_) = curve([one, two])
    assert (start, later) == (0, 2 * 64)
    assert (mean, low, high) == (pytest.approx(0.2), pytest.approx(0.2 - 1.27062), pytest.approx(0.2 + 1.27062))
    assert curve([one])[2] == (4 * 64, 0.9, (0.9, 0.9))


def test_only_the_named_part_of_the_page_is_written():
    page = "a\n<!-- results: x -->\nold\n<!-- end of x -->\nb\n<!-- results: y -->\n<!-- end of y -->\n"
    assert written(page, "x", "new \\1") == page.replace("old\n", "\nnew \\1\n")
    with pytest.raises(ValueError, match="no place for z"):
        written(page, "z", "new")


def test_the_page_has_a_place_for_every_experiment():
    page = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        assert "a new table" in written(page, name, "a new table")
