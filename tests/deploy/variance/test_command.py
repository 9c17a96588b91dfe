"""`ratchet evaluate --variance` on the directory of a run: which state and which batches, files, screen, refusals."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from common.errors import UserError
from deploy.cli import main
from deploy.replay import newest_verified
from deploy.run.directory import sole_owner
from deploy.variance.command import choose, run_variance
from deploy.variance.table import account_text
from learner.loop.checkpoints import Checkpoints
from learner.loop.journal import Journal
from tests.deploy.report.test_variance import ACCOUNT, figure
from tests.durability.disasters import tree_digest
from tests.durability.small_run import FROM_A_CRITIC, NUM_STEPS, save_smallest_model, small_config, train_to_the_end

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SETTINGS = {**FROM_A_CRITIC, "rollouts_per_step": 6, "kl": {"coef": 0.02}}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A finished run of five steps with checkpoints of steps 4 and 5. The batch of step 2 is void."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    model = save_smallest_model(tmp_path_factory.mktemp("model"))
    with sole_owner(directory) as held:
        held.begin(small_config(model, **SETTINGS), "train", force=False)
    train_to_the_end(directory, model, roles={"poison": (2, 3)}, **SETTINGS)
    assert list(Journal(directory / "journal").voided) == [2]
    return directory


@pytest.fixture
def run(honest, tmp_path, request, monkeypatch):
    """A copy. Only the test of the files draws the plot, which takes a second."""
    if "newest_checkpoint" not in request.node.name:
        monkeypatch.setattr("deploy.variance.command.plot_account", lambda account, target: None)
    return Path(shutil.copytree(honest, tmp_path / "läufe/1 [b]"))


def test_the_newest_checkpoint_before_a_batch_is_measured_on_that_batch(run, capsys):
    before = tree_digest(run)
    found = run_variance(run)
    assert (found["step"], found["batches"], found["checkpoint"]) == (4, [4], "step-000004")
    assert json.loads((run / "variance.json").read_text()) == json.loads(json.dumps(found))
    with Image.open(run / "variance.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    shown = capsys.readouterr().out
    assert f"{run}: variance.json, variance.png" in shown.replace("\n", "")
    assert "policy and critic after 4 updates; batch of step 4: 6 responses to 6 prompts" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(run.parent) not in line)
    table = [line.split() for line in shown.splitlines() if line.startswith("critic, lam 0.95")]
    assert table[0][3:5] == ["*", f"{found['estimators']['critic, lam 0.95']['of_returns']['value']:.2f}"]
    for name in ("variance.json", "variance.png"):
        (run / name).unlink()
    assert tree_digest(run) == before


def test_without_a_usable_checkpoint_the_last_batch_is_measured(run, capsys):
    """Not the untrained policy. The checkpoint of the end stays: no batch follows it."""
    found = run_variance(run)
    assert "learned again" not in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints/step-000004")
    again = run_variance(run)
    message = f"{run} has no checkpoint to begin with, so 4 steps are learned again from the journal; --after 0 "
    assert message in capsys.readouterr().err
    assert again["checkpoint"] is None
    assert {**again, "checkpoint": "step-000004"} == found


def test_a_damaged_checkpoint_is_passed_over(run, capsys):
    found = run_variance(run)
    path = run / "checkpoints/step-000004/weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    again = run_variance(run)
    assert "step-000004 is skipped" in capsys.readouterr().err
    assert {**again, "checkpoint": "step-000004"} == found


def test_a_checkpoint_without_its_optimizer_is_not_learned_on_from(run):
    """Adam would begin again, and the weights after the next step would be others."""
    journal = Journal(run / "journal")
    checkpoints = Checkpoints(run / "checkpoints", every=1, keep=1, journal=journal)
    found = checkpoints.path(4)
    assert newest_verified(run, journal, 4, until=5) == found
    checkpoints.drop_optimizers()
    assert newest_verified(run, journal, 4, until=4) == found
    assert newest_verified(run, journal, 4, until=5) is None


def test_a_run_that_cannot_be_written_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr("deploy.variance.command.os.access", lambda path, mode: Path(path) != run)
    monkeypatch.setattr("deploy.variance.command.in_ranks", None)
    with pytest.raises(UserError, match=r" must be writable for variance.json and variance.png; "):
        run_variance(run)


def test_the_screen_shows_the_gradients_that_the_run_uses():
    """Without whitening: the error of `none` is 1.01 there, and 0.98 with it. A value that rounds to 0 is never -0."""
    unwhitened = deepcopy({**ACCOUNT, "whitens": False})
    unwhitened["estimators"]["none"]["unwhitened"]["direction"] = figure(-0.001, -0.5, 0.5)
    for account, used, shown in ((ACCOUNT, "whitened", ["0.98", "0.90 to 1.05"]), (unwhitened, "unwhitened", ["1.01"])):
        parts = list(account_text(account))
        [table, _] = [part for part in parts if isinstance(part, Table)]
        cells = [list(column.cells)[1] for column in table.columns]
        assert cells[2:][: len(shown)] == shown
        assert f"gradient of the {used} advantages" in "".join(part for part in parts if isinstance(part, str))
    assert cells[-1] == "0.00"


def test_several_batches_are_one_sample(run):
    found = run_variance(run, steps="1:4")
    assert (found["step"], found["batches"], found["checkpoint"]) == (1, [1, 3], None)  # that of step 2 is void
    assert found["responses"] == 12
    assert found["gradients"]["parts"] == 12


@pytest.mark.parametrize(
    ("after", "steps", "fault"),
    [
        (
            5,
            None,
            r"^--after \(5\): the journal has no batch that was written after 5 steps; its last one is of step 4$",
        ),
        (
            3,
            "1:4",
            r"^--steps \(1:4\) has batches that the learner of --after 3 has learned from, .* begin with step 3",
        ),
        (None, "3:6", r"^--steps \(3:6\) is not in the journal of .*, which has 5 steps: 0:5$"),
        (None, "3:3", r"^--steps \(3:3\) has no step: A must be below B, as in 3:4$"),
        (None, "4:3", r"^--steps \(4:3\) has no step: A must be below B, as in 3:5$"),
        (None, "2:3", r"^--steps \(2:3\): every batch there is void; choose others$"),
        (None, "3-4", r"^--steps \(3-4\) must read A:B"),
    ],
)
def test_batches_that_give_no_account_are_refused(honest, after, steps, fault):
    with pytest.raises(UserError, match=fault):
        choose(honest, Journal(honest / "journal"), after, steps)


@pytest.mark.parametrize(
    ("after", "steps", "expected"),
    [
        (None, None, (4, [4])),
        (0, None, (0, [0])),
        (2, None, (2, [3])),
        (None, "3:", (3, [3, 4])),
        (1, ":4", (1, [1, 3])),
        (0, "3:5", (0, [3, 4])),
        (None, ":2", (0, [0, 1])),
    ],
)
def test_state_and_batches_are_chosen(honest, after, steps, expected):
    assert choose(honest, Journal(honest / "journal"), after, steps) == expected
    assert NUM_STEPS == 5


def test_a_run_without_steps_is_refused(tmp_path, honest):
    (tmp_path / "journal").mkdir()
    with pytest.raises(UserError, match=r"/journal has no batch; --variance needs one"):
        choose(tmp_path, Journal(tmp_path / "journal"), None, None)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--variance", "runs/a", "--policy", "p"), "--variance reads the directory of a run"),
        (("config.toml", "--variance", "runs/a"), "--variance reads the directory of a run"),
        (("config.toml", "--steps", "1:2"), "--steps must be given with --variance RUN"),
    ],
)
def test_options_of_other_evaluations_are_refused(arguments, fault, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ratchet", "evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, fault in capsys.readouterr().err) == (2, True)


def test_a_directory_of_sampled_responses_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "journal").mkdir()
    Journal(tmp_path / "journal").note("begin", identity={}, config={}, versions={}, num_prompts=1, learns=False)
    with pytest.raises(UserError, match=r"only responses of the starting policy .* with --after 0$"):
        run_variance(tmp_path)
