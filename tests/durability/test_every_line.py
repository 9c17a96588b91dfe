"""A run is killed, or its disk is full, before every line of the code that its durability rests on.

Each of these places leaves a directory. Continued from there, the run must end with the bytes of a run that nothing
disturbed, with nothing left behind, and `ratchet audit` must find nothing.

`make test` kills at the first time that a run reaches each line, and fills the disk at every fifth line of two
scenarios. `make exhaustive` does it all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import common.files
import common.model.files
import deploy.run.summary
import learner.loop.chain
import learner.loop.changes
import learner.loop.checkpoints
import learner.loop.credit
import learner.loop.evaluations
import learner.loop.journal
import learner.loop.notes
import learner.loop.recovery
import learner.loop.set_aside
import learner.ranks.checkpoint
from common.config.ppo import Config
from learner.loop import train_loop
from learner.ppo.learner import Learner
from learner.proof.audit import audit
from learner.proof.replay import Replay
from tests.durability.disasters import all_places, beginning, contents, full_disks, killed
from tests.durability.places import Place, functions_of
from tests.durability.small_run import FROM_A_CRITIC, NUM_STEPS, save_smallest_model, small_config, train_to_the_end

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:coroutine .* was never awaited")
ALL = partial(pytest.param, marks=pytest.mark.exhaustive)

# Code that writes to a run directory, or decides what is written and when.
WRITERS = [
    *functions_of(
        common.files,
        learner.loop.chain,
        learner.loop.checkpoints,
        learner.loop.credit,
        learner.loop.evaluations,
        learner.loop.journal,
        learner.loop.recovery,
        learner.loop.set_aside,
        learner.ranks.checkpoint,
    ),
    train_loop.train,
    train_loop.train_step,
    train_loop.learn,
    train_loop._write_down,
    common.model.files.save_policy,
    deploy.run.summary.write_answers,
    Learner.save_policy,
]
# Recovery also reads these.
READERS = functions_of(learner.loop.notes, learner.loop.changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_smallest_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def clock_stands_still(monkeypatch):
    """So that two runs write the same journal, with its times and hashes."""
    monkeypatch.setattr(time, "time", lambda: 1.8e9)


# Where a run begins


def nothing(directory: Path, model: Path) -> None:
    """A new run."""


def cut(directory: Path, model: Path) -> None:
    """A run that was killed after it had written its fourth batch: steps 2 and 3 are learned again from the journal."""
    train_to_the_end(directory, model, num_steps=4)
    for lost in ("checkpoints/step-000004", "policy"):
        shutil.rmtree(directory / lost)
    records = (directory / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_bytes(b"".join(records[:3]) + records[3][:40])
    evaluations = (directory / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "evaluations.jsonl").write_bytes(b"".join(evaluations[:2]))  # without the one of its end
    (directory / "answers/version-000004.jsonl").unlink()


def damaged(directory: Path, model: Path) -> None:
    """The same, and its checkpoint has a wrong bit: it is set aside, and the whole journal is learned again."""
    cut(directory, model)
    weights = directory / "checkpoints/step-000002/weights-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)


def cut_while_writing(directory: Path, model: Path) -> None:
    """The same, but its fourth batch has its hash and not yet its name: the run was killed before, too."""
    cut(directory, model)
    (directory / "journal/step-000003.arrow").rename(directory / "journal/step-000003.tmp")


Start = Callable[[Path, Path], None]
SCENARIOS: dict[str, tuple[Start, dict[str, Any]]] = {
    "new": (nothing, {}),
    "continued": (cut, {}),
    "cut-while-writing": (cut_while_writing, {}),
    "damaged-checkpoint": (damaged, {}),
    "half-learned-batch": (nothing, {"roles": {"torn": (1, 1)}}),
    "first-batch-poison": (nothing, {"roles": {"poison": (0, 3)}, "checkpoint": {"every": 1, "keep": 2}}),
    "lost-rank": (nothing, {"roles": {"lose_at": 3}, **FROM_A_CRITIC}),
    "small-checkpoints": (
        nothing,
        {"checkpoint": {"every": 2, "keep": 1, "best": True, "keep_optimizer_at_end": False}},
    ),
}


def start_of(name: str, model: Path, scratch: Path) -> Path | None:
    """The directory in which a scenario begins, made once."""
    make, _ = SCENARIOS[name]
    if make is nothing:
        return None
    directory = beginning(None, scratch / "start")
    make(directory, model)
    return directory


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "roles"}


def undisturbed(files: dict[str, bytes]) -> dict[str, object]:
    """The files of a run; metrics and evaluations as records, without seconds. Set-aside files may be there twice."""
    found: dict[str, object] = {name: data for name, data in files.items() if not name.startswith("set-aside/")}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = [line for line in files.get(name, b"").splitlines() if line.endswith(b"}")]
        records = [json.loads(line) for line in lines]
        found[name] = [{key: value for key, value in r.items() if not key.endswith("_s")} for r in records]
    return found


def check_end(directory: Path, expected: dict[str, object], *, lacks_credit: bool = False) -> None:
    """The run has ended as if nothing had happened. With `lacks_credit` files of RUN/credit may be missing."""
    found = undisturbed(contents(directory))
    if lacks_credit:
        expected = {name: data for name, data in expected.items() if name in found or not name.startswith("credit/")}
    assert sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)) == []
    audit(directory)


def check_replay(directory: Path, cfg: Config, scratch: Path) -> None:
    """Checkpoints, metrics and policy of a run are those that its journal leads to."""
    found = audit(directory)
    Replay(
        cfg,
        directory,
        NUM_STEPS,
        beginning(None, scratch / "replay"),
        checkpoints=found.checkpoints.complete,
        policy=directory / "policy",
        metrics=found.metrics,
    )()


def faults_of(
    disaster: Callable,
    functions: list,
    places: list[Place],
    start: Path | None,
    work: Callable,
    check: Callable,
    scratch: Path,
) -> tuple[list[str], int]:
    """What went wrong after a disaster at each of the places, and how many different directories these left."""
    faults, states = [], 0
    for place, directory in disaster(functions, places, start, work, scratch):
        if directory is None:
            continue
        states += 1
        try:
            work(directory)
            check(directory)
        except (Exception, AssertionError) as error:
            faults.append(f"{place}: {type(error).__name__}: {str(error)[:400]}")
        shutil.rmtree(directory)
    return faults, states


def check_scenario(
    scenario: str,
    disaster: Callable,
    functions: list,
    model: Path,
    scratch: Path,
    choose: Callable[[list[Place]], list[Place]],
) -> tuple[int, int]:
    """Has the disaster happen at the chosen places of a scenario. Returns the number of places, and of different
    directories that they left."""
    work = partial(train_to_the_end, model=model, **SCENARIOS[scenario][1])
    start = start_of(scenario, model, scratch)
    work(quiet := beginning(start, scratch / "undisturbed"))
    expected = undisturbed(contents(quiet))
    check_end(quiet, expected)
    check_replay(quiet, small_config(model, **_settings(SCENARIOS[scenario][1])), scratch)
    places = choose(all_places(functions, start, work, scratch))
    # A full disk costs no more than the files of RUN/credit that it refuses.
    check = partial(check_end, expected=expected, lacks_credit=disaster is full_disks)
    faults, states = faults_of(disaster, functions, places, start, work, check, scratch)
    assert faults == []
    return len(places), states


def every(places: list[Place]) -> list[Place]:
    return places


def first_hits(places: list[Place]) -> list[Place]:
    return [place for place in places if place.hit == 1]


def every_fifth_line(places: list[Place]) -> list[Place]:
    return first_hits(places)[::5]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("places", [first_hits, ALL(every)])
def test_a_killed_run_that_is_continued_ends_as_if_nothing_had_happened(scenario, places, model, tmp_path, count):
    count(*check_scenario(scenario, killed, WRITERS + READERS, model, tmp_path, places))


@pytest.mark.parametrize(
    ("scenario", "places"),
    [*((name, every_fifth_line) for name in ("new", "continued")), *(ALL(name, first_hits) for name in SCENARIOS)],
)
def test_a_run_continued_after_a_full_disk_ends_as_if_it_had_been_large(scenario, places, model, tmp_path, count):
    count(*check_scenario(scenario, full_disks, WRITERS, model, tmp_path, places))


def test_a_killed_asynchronous_run_equals_its_own_replay(model, tmp_path, count):
    """Which weights sample a token then depends on the clock, so no undisturbed run has the same batches."""
    ppo = {
        "ppo_epochs": 1,
        "minibatches": 2,
        "policy_loss": "mask",
        "lam": "length",
        "lam_alpha": 1.0,
        "value_lam": 1.0,
    }
    about = {"max_staleness": 1, "evaluation": {"prompts": 0}, "ppo": ppo}
    cfg, work = small_config(model, **about), partial(train_to_the_end, model=model, **about)

    check = partial(check_replay, cfg=cfg, scratch=tmp_path)
    first = first_hits(all_places(WRITERS, None, work, tmp_path))
    faults, states = faults_of(killed, WRITERS, first, None, work, check, tmp_path)
    count(len(first), states)
    assert faults == []


@pytest.fixture(scope="module")
def counted():
    """Places and different states so far."""
    return []


@pytest.fixture
def count(counted, request):
    began = time.perf_counter()

    def add(places: int, states: int) -> None:
        counted.append((places, states))
        print(f"\n{request.node.name}: {places} places, {states} states, {time.perf_counter() - began:.0f} s")

    return add


def test_about_a_thousand_places_were_tried(counted):
    if len(counted) < len(SCENARIOS) + 3:
        pytest.skip("only some of the tests above ran")
    print(f"\n{sum(places for places, _ in counted)} places, {sum(states for _, states in counted)} states")
    assert sum(places for places, _ in counted) > 1000
