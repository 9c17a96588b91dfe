"""The audit finds every kind of lie, by the name of its rule, and says how much it proved about an honest run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from learner.proof.audit import audit
from learner.proof.chain import Violation
from tests.durability.disasters import tree_digest
from tests.durability.small_run import EPISODES, NUM_STEPS, UNSCORED, save_smallest_model, train_to_the_end
from tests.learner.proof.forge import (
    add_note,
    chain_again,
    entries,
    forge_checkpoint,
    forge_credit,
    forge_note,
    forge_step,
    replace_column,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_smallest_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def honest(model, tmp_path_factory):
    """A run of five steps with a poison batch, voids and two checkpoints."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    train_to_the_end(directory, model, roles={"poison": (0, 3)})
    return directory


@pytest.fixture
def run(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "run"))


def sample_ids(run: Path) -> list[list[str]]:
    """Of every step, read in the plainest way."""
    frames = map(pd.read_feather, sorted((run / "journal").glob("step-*.arrow")))
    return [[f"{r.epoch}/{r.prompt_index}/{r.replica}" for r in frame.itertuples()] for frame in frames]


def test_an_honest_run_is_proved_with_counts(honest):
    before = tree_digest(honest)
    found = audit(honest)
    assert tree_digest(honest) == before
    by_rule = {line.rule: line.counts for line in found.proved}
    batches = sample_ids(honest)
    voids = sum(len(json.loads(_metadata(path))["voids"]) for path in entries(honest) if path.suffix == ".arrow")
    trained = 2 * (NUM_STEPS - 1)
    assert by_rule["chain"] == f"{NUM_STEPS} steps, 2 notes (1 begin, 1 void)"
    assert by_rule["samples"] == (
        f"{2 * NUM_STEPS + voids} = {trained} trained once + {voids} void with a reason + 2 in voided batches + "
        "0 outstanding"
    )
    assert len({sample_id for batch in batches for sample_id in batch}) == 2 * NUM_STEPS
    assert voids > 0
    assert not any(f"/{UNSCORED}/" in sample_id for batch in batches for sample_id in batch)
    assert by_rule["checkpoints"].startswith("2 (4, 5)")
    assert by_rule["metrics"].startswith(f"{NUM_STEPS} records")
    assert by_rule["evaluations"] == "3"
    tokens = sum(len(ids) for frame in learned(honest) for ids in frame["response_ids"])
    assert by_rule["credit"] == f"{NUM_STEPS - 1} files, {tokens} tokens"


def learned(run: Path) -> list[pd.DataFrame]:
    """The batches that have credit."""
    steps = [path.stem for path in sorted((run / "credit").iterdir())]
    return [pd.read_feather(run / f"journal/{step}.arrow") for step in steps]


def test_credit_may_be_missing(run):
    shutil.rmtree(run / "credit")
    assert {line.rule: line.counts for line in audit(run).proved}["credit"] == "0 files, 0 tokens"


def _metadata(path: Path) -> bytes:
    return pa.ipc.open_file(pa.BufferReader(path.read_bytes())).schema.metadata[b"ratchet"]


# The chain


def flip(path: Path, place: int = -30) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def unlink(run: Path, *names: str) -> None:
    for name in names:
        (run / "journal" / name).unlink()


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


CHAIN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda run: flip(run / "journal/step-000001.arrow"), "step-000001.arrow is damaged"),
    "a bit of a note": (lambda run: flip(run / "journal/note-000000-000.json"), "note-000000-000.json is damaged"),
    "the newest": (lambda run: unlink(run, "step-000004.arrow"), "step-000004.arrow is missing, but its .sha256"),
    "a middle one": (
        lambda run: unlink(run, "step-000002.arrow", "step-000002.sha256"),
        "step-000002.arrow is missing",
    ),
    "the begin note": (
        lambda run: unlink(run, "note-000000-000.json", "note-000000-000.sha256"),
        "000-000.json is miss",
    ),
    "a hash": (lambda run: unlink(run, "step-000003.sha256"), "step-000003.arrow or its .sha256 cannot be read"),
    "everything": (lambda run: shutil.rmtree(run / "journal"), "has no entry"),
    "an entry with its hash": (
        lambda run: [
            swap(run / f"journal/step-000001.{kind}", run / f"journal/step-000002.{kind}")
            for kind in ("arrow", "sha256")
        ],
        "step-000001.arrow",
    ),
}


@pytest.mark.parametrize("case", CHAIN)
def test_a_chain_that_is_not_whole_is_found(case, run):
    damage, message = CHAIN[case]
    damage(run)
    with pytest.raises(Violation, match=f"^chain: .*{message}"):
        audit(run)


def test_an_entry_that_was_written_again_is_found_at_its_successor(run):
    """Its own hash is right, so only the next entry can tell."""
    path = run / "journal/step-000001.arrow"
    others = {entry: entry.read_bytes() for entry in entries(run) if entry != path}
    forge_step(run, 1, lambda table, about: about.update(time=1.0) or table)
    for entry, data in others.items():
        entry.write_bytes(data)
        chain_of_one(entry)
    with pytest.raises(Violation, match=r"^chain: .* does not have the hash of the entry before it"):
        audit(run)


def chain_of_one(path: Path) -> None:
    import hashlib

    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def test_files_of_others_and_the_rest_of_a_cut_write_are_no_entries(run):
    journal = run / "journal"
    for name in ("step-000002-copy.arrow", "notes.txt", "step-7.arrow", "step-000005.tmp", "step-000005.sha256"):
        (journal / name).write_bytes(b"")
    assert audit(run).num_steps == NUM_STEPS


# What the entries say. All hashes are right here.


def first_row_again(run: Path) -> None:
    """A batch has a rollout of the batch before it."""
    earlier = sample_ids(run)[0][0].split("/")
    forge_step(run, 1, lambda table, about: with_id(table, 0, earlier))


def with_id(table, row: int, sample_id: list[str]):
    for column, value in zip(("epoch", "prompt_index", "replica"), sample_id):
        values = table[column].to_pylist()
        values[row] = int(value)
        table = replace_column(table, column, values)
    return table


def older(table, about):
    versions = table["policy_versions"].to_pylist()
    versions[0] = [about["step"] - 1] * len(versions[0])
    return replace_column(table, "policy_versions", versions)


def void_without_reason(table, about):
    about["voids"] = [[sample_id, "", *rest] for sample_id, _, *rest in about["voids"]]
    return table


def still_outstanding(table, about):
    about["prompts"]["outstanding"] = [[0, 1]]
    return table


def with_score(value: float):
    return lambda table, about: replace_column(table, "score", [value] * len(table))


def step_with_void(run: Path) -> int:
    return next(
        step for step in range(NUM_STEPS) if json.loads(_metadata(run / f"journal/step-{step:06d}.arrow"))["voids"]
    )


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "trained twice": (first_row_again, "samples: step 1: .* is lost|samples: step 1: .* was not outstanding"),
    "a lost row": (lambda run: forge_step(run, 0, lambda table, about: table.slice(1)), "samples: step 0: .* is lost"),
    "the same row twice": (
        lambda run: forge_step(run, 0, lambda table, about: with_id(table, 0, sample_ids(run)[0][1].split("/"))),
        "samples: step 0: .* is settled 2 times",
    ),
    "never issued": (
        lambda run: forge_step(run, 0, lambda table, about: with_id(table, 0, ["7", "0", "0"])),
        "samples: step 0",
    ),
    "a void that vanished": (
        lambda run: forge_step(run, step_with_void(run), lambda table, about: about.update(voids=[]) or table),
        "samples: step .* is lost",
    ),
    "a void without reason": (
        lambda run: forge_step(run, step_with_void(run), void_without_reason),
        "samples: .* is void without a reason",
    ),
    "settled and outstanding again": (
        lambda run: forge_step(run, 2, still_outstanding),
        "samples: step 2: .* was settled",
    ),
    "fewer issued than before": (
        lambda run: forge_step(run, 2, lambda table, about: about["prompts"].update(issued=1) or table),
        "samples: step 2: its prompt stream",
    ),
    "another seed": (
        lambda run: forge_note(run, "note-000000-000.json", lambda about: about["config"].update(seed=1)),
        "samples: step 0",
    ),
    "too old": (
        lambda run: forge_step(run, 2, older),
        "versions: step 2 has a token 1 versions old; max_staleness is 0",
    ),
    "a version of the future": (
        lambda run: forge_step(
            run, 1, lambda table, about: replace_column(table, "policy_versions", [[9] * len(v) for v in lists(table)])
        ),
        "versions: step 1 has a token of version 9",
    ),
    "another version": (
        lambda run: forge_step(run, 1, lambda table, about: about.update(policy_version=0) or table),
        "versions: step 1 says that the learner had version 0",
    ),
    "a short list": (
        lambda run: forge_step(
            run, 1, lambda table, about: replace_column(table, "policy_versions", [v[:-1] for v in lists(table)])
        ),
        "batches: step 1: policy_versions has another length",
    ),
    "no number": (lambda run: forge_step(run, 0, with_score(float("nan"))), "batches: step 0: score|metrics: step 0"),
    "another score": (lambda run: forge_step(run, 0, with_score(0.125)), "metrics: step 0: rollout/score/mean"),
    "rows of another step": (
        lambda run: forge_step(run, 1, lambda table, about: replace_column(table, "step", [0] * len(table))),
        "batches: step 1",
    ),
    "a void of other rollouts": (
        lambda run: forge_note(run, void_note(run), lambda about: about.update(sample_ids=["0/0/0"])),
        "notes: .* names other rollouts",
    ),
    "a void of a later step": (
        lambda run: forge_note(run, void_note(run), lambda about: about.update(step=4)),
        "notes: .* voids step 4",
    ),
    "a second void": (
        lambda run: add_note(run, NUM_STEPS, "void", **again(run)),
        "notes: .* a second time",
    ),
    "a change of a fixed setting": (
        lambda run: add_note(run, 3, "change", settings={"seed": 2}),
        "notes: .* changes seed, which is fixed",
    ),
    "no number of prompts": (
        lambda run: forge_note(run, "note-000000-000.json", lambda about: about.pop("num_prompts")),
        "contents: .*num_prompts",
    ),
    "a state without its numbers": (
        lambda run: forge_step(run, 1, lambda table, about: about.update(prompts=None) or table),
        "contents: .*TypeError",
    ),
    "a note of an unknown kind": (lambda run: add_note(run, 3, "wish"), "chain: .* is of kind 'wish'"),
    "a second beginning": (lambda run: add_note(run, 3, "begin", config={}), "chain: .* the only begin note"),
}


def lists(table) -> list[list[int]]:
    return table["policy_versions"].to_pylist()


def void_note(run: Path) -> str:
    [note] = [path.name for path in entries(run) if path.suffix == ".json" and not path.name.startswith("note-000000")]
    return note


def again(run: Path) -> dict:
    about = json.loads((run / "journal" / void_note(run)).read_text())
    return {key: about[key] for key in ("step", "reason", "sample_ids")}


@pytest.mark.parametrize("case", LIES)
def test_a_lie_whose_hashes_are_right_is_found(case, run):
    lie, message = LIES[case]
    lie(run)
    with pytest.raises(Violation, match=f"^({message})"):
        audit(run)


# Episodes


@pytest.fixture(scope="module")
def honest_episodes(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("episodes") / "run"
    train_to_the_end(directory, model, **EPISODES)
    return directory


def test_a_run_of_episodes_is_proved_with_the_tokens_that_were_sampled(honest_episodes):
    by_rule = {line.rule: line.counts for line in audit(honest_episodes).proved}
    sampled = said = several = contexts = sequences = 0
    for frame in learned(honest_episodes):
        for row in frame.itertuples():
            others = sum(turn["next_start"] - turn["end"] for turn in row.turns)
            sampled, said = sampled + len(row.response_ids) - others, said + others
            several += len(row.turns) > 1
            contexts += any(turn["new_context"] for turn in row.turns)
            sequences += any(turn["ends"] for turn in row.turns)
    assert by_rule["credit"] == f"{NUM_STEPS} files, {sampled} tokens"
    assert said > 3
    assert several > 3
    assert contexts > 3
    assert sequences > 0


def with_turns(change: Callable[[list[dict], int], object]) -> Callable:
    """Changes the turns of the row of a step that has the most; the change also gets the length of its response."""

    def forge(table, about):
        rows = table["turns"].to_pylist()
        chosen = max(range(len(rows)), key=lambda row: len(rows[row]))
        change(rows[chosen], len(table["response_ids"][chosen]))
        return replace_column(table, "turns", rows)

    return forge


def changed_last(row: list[dict], **fields) -> None:
    row[-1].update(fields)


def of_all_tokens(name: str) -> Callable:
    """A column that has a value for the environment's tokens too."""
    return lambda table, about: replace_column(table, name, [[1] * len(ids) for ids in table["response_ids"]])


TURNS: dict[str, tuple[Callable, str]] = {
    "turns that overlap": (
        with_turns(lambda row, length: row.append({**row[0], "end": 0, "next_start": length})),
        "step 1: the turns of row . do not follow one another",
    ),
    "a turn that ends before it begins": (
        with_turns(lambda row, length: changed_last(row, end=length, next_start=length - 1)),
        "step 1: the turns of row . do not follow one another",
    ),
    "a turn behind the response": (
        with_turns(lambda row, length: changed_last(row, next_start=length + 1)),
        "step 1: the turns of row . do not follow one another",
    ),
    "a turn before the response": (
        with_turns(lambda row, length: row[0].update(end=-1)),
        "step 1: the turns of row . do not follow one another",
    ),
    "a hole that was sampled": (
        with_turns(lambda row, length: row[0].update(end=row[0]["end"] - 1)),
        "step 1: rollout_logprobs has another length than the response",
    ),
    "turns that vanished": (
        lambda table, about: replace_column(table, "turns", [None] * len(table)),
        "step 1: rollout_logprobs has another length than the response",
    ),
    **{
        f"{name} of all tokens": (of_all_tokens(name), f"step 1: {name} has another length than the response")
        for name in ("rollout_logprobs", "policy_versions", "ref_logprobs")
    },
    "a reward that is no number": (
        with_turns(lambda row, length: row[0].update(reward=float("nan"))),
        "step 1: row . has a reward that is not finite",
    ),
    "a new context without a prompt": (
        with_turns(lambda row, length: changed_last(row, new_context=True)),
        "step 1: row . has a new context without a prompt",
    ),
    "an end without a new context": (
        with_turns(lambda row, length: changed_last(row, ends=True)),
        "step 1: row . has a sequence that ends where no other begins",
    ),
}


@pytest.mark.parametrize("case", TURNS)
def test_a_lie_about_turns_is_found(case, honest_episodes, tmp_path):
    run = Path(shutil.copytree(honest_episodes, tmp_path / "run"))
    change, message = TURNS[case]
    forge_step(run, 1, change)
    with pytest.raises(Violation, match=f"^batches: {message}"):
        audit(run)


def test_credit_of_the_environments_tokens_is_found(honest_episodes, tmp_path):
    run = Path(shutil.copytree(honest_episodes, tmp_path / "run"))
    whole = pd.read_feather(run / "journal/step-000001.arrow")["response_ids"]
    forge_credit(run, 1, lambda table, about: replace_column(table, "kl", [[0.0] * len(ids) for ids in whole]))
    with pytest.raises(Violation, match=r"^credit: .*step-000001.parquet: kl has another length"):
        audit(run)


# Checkpoints, metrics, evaluations


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_line(path: Path, line: int, change: Callable[[dict], object]) -> None:
    records = [json.loads(text) for text in path.read_text().splitlines()]
    change(records[line])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


OLD, NEW = "checkpoints/step-000004", "checkpoints/step-000005"
WEIGHTS = "weights-00000.safetensors"
DERIVED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda run: flip(run / NEW / WEIGHTS), f"checkpoints: .*{WEIGHTS} is damaged"),
    "a file": (lambda run: (run / NEW / "numbers.json").unlink(), "checkpoints: .*numbers.json is missing"),
    "a link for a file": (lambda run: link(run / NEW / WEIGHTS, run / OLD / WEIGHTS), "checkpoints: .* is missing"),
    "the marker": (lambda run: (run / NEW / "COMPLETE").write_text("{"), "checkpoints: .*COMPLETE cannot be read"),
    "an old checkpoint under a new name": (
        lambda run: (shutil.rmtree(run / NEW), (run / OLD).rename(run / NEW)),
        "checkpoints: .* was written as step 4",
    ),
    "the same with its step": (
        lambda run: (
            shutil.rmtree(run / NEW),
            (run / OLD).rename(run / NEW),
            edit(run / NEW / "COMPLETE", lambda marker: marker.update(step=5)),
        ),
        "checkpoints: .* does not follow step 4",
    ),
    "numbers of another step": (
        lambda run: forge_checkpoint(run, 5, "numbers.json", lambda data: data.replace(b'"step": 5', b'"step": 4')),
        "checkpoints: .* its numbers are those of step 4",
    ),
    "skipped batches": (
        lambda run: edit(run / NEW / "COMPLETE", lambda marker: marker.update(voids=[])),
        "checkpoints: .* has skipped the batches",
    ),
    "another model": (
        lambda run: edit(run / NEW / "COMPLETE", lambda marker: marker["identity"].update(model="0")),
        "checkpoints: .* another model",
    ),
    "a checkpoint ahead of the journal": (
        lambda run: unlink(run, "step-000004.arrow", "step-000004.sha256"),
        "checkpoints: .* holds 5 steps, but the journal only 4",
    ),
    "a value": (
        lambda run: edit_line(run / "metrics.jsonl", 1, lambda record: record.update({"rollout/voids": 7})),
        "metrics: step 1: rollout/voids is 7",
    ),
    "a record": (
        lambda run: edit_line(run / "metrics.jsonl", 1, lambda record: record.update(step=0)),
        "metrics: .* has step 0 twice",
    ),
    "credit of other rollouts": (
        lambda run: forge_credit(run, 2, lambda table, about: table.take([1, 0])),
        "credit: .*step-000002.parquet has other rollouts",
    ),
    "credit of fewer tokens": (
        lambda run: forge_credit(run, 2, lambda table, about: replace_column(table, "kl", [[0.0]] * len(table))),
        "credit: .*step-000002.parquet: kl has another length",
    ),
    "credit of fewer rollouts": (
        lambda run: forge_credit(run, 2, lambda table, about: table.slice(1)),
        "credit: .*step-000002.parquet has other rollouts",
    ),
    "credit without a value": (
        lambda run: forge_credit(
            run, 2, lambda table, about: replace_column(table, "kl", [None, *table["kl"].to_pylist()[1:]])
        ),
        "credit: .*step-000002.parquet: kl is missing in 1 of ",
    ),
    "credit with other log-probabilities": (
        lambda run: forge_credit(
            run, 2, lambda table, about: replace_column(table, "rollout_logprobs", zeros(table, "rollout_logprobs"))
        ),
        "credit: .*step-000002.parquet: rollout_logprobs are not those",
    ),
    "credit with other versions": (
        lambda run: forge_credit(
            run, 2, lambda table, about: replace_column(table, "policy_version", zeros(table, "kl"))
        ),
        "credit: .*step-000002.parquet: policy_version is not that",
    ),
    "credit of another column": (
        lambda run: forge_credit(run, 2, lambda table, about: table.drop_columns("entropy")),
        "credit: .*step-000002.parquet does not belong",
    ),
    "credit of another journal": (
        lambda run: forge_credit(run, 2, lambda table, about: about.update(journal="0" * 64)),
        "credit: .*step-000002.parquet does not belong",
    ),
    "credit of no step": (
        lambda run: shutil.copy(run / "credit/step-000002.parquet", run / "credit/step-000007.parquet"),
        "credit: .*step-000007.parquet is of no step",
    ),
    "credit that is no table": (
        lambda run: (run / "credit/step-000002.parquet").write_bytes(b"PAR1"),
        "credit: .*step-000002.parquet cannot be read",
    ),
    "a line": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n" + (run / "metrics.jsonl").read_bytes()),
        "metrics.jsonl: line 1 is not a record",
    ),
    "a missing record": (
        lambda run: (run / "metrics.jsonl").write_bytes(
            b"".join((run / "metrics.jsonl").read_bytes().splitlines(True)[1:])
        ),
        "metrics: metrics.jsonl lacks step 0",
    ),
    "an evaluation of another run": (
        lambda run: edit_line(run / "evaluations.jsonl", 1, lambda record: record.update(journal="0" * 64)),
        "evaluations: version 3 does not belong to",
    ),
    "an evaluation twice": (
        lambda run: edit_line(run / "evaluations.jsonl", 1, lambda record: record.update(policy_version=0)),
        "evaluations: version 0 is in evaluations.jsonl twice",
    ),
    "an answer": (
        lambda run: edit_line(run / "answers/version-000003.jsonl", 0, lambda record: record.update(score=9.0)),
        "evaluations: version 3 has prompts",
    ),
}


def zeros(table: pa.Table, column: str) -> list[list[int]]:
    return [[0] * len(row) for row in table[column]]


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("case", DERIVED)
def test_a_derived_file_that_does_not_follow_is_found(case, run):
    change, message = DERIVED[case]
    change(run)
    with pytest.raises(Violation, match=f"^{message}"):
        audit(run)


def test_an_honest_journal_that_is_chained_again_is_the_same(run):
    """So that the lies above are found for themselves, and not for how they were made."""
    before = tree_digest(run)
    chain_again(run)
    assert tree_digest(run) == before
