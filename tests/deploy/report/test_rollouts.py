"""The table of rollouts and the token numbers of the page, against the files of the run."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.report.page import json_text
from deploy.report.rollouts import Rollouts
from deploy.report.steps import StepFiles
from deploy.report.token_numbers import packed
from deploy.report.token_text import TokenText
from tests.deploy.report.made_run import write_run
from tests.fakes import WORDS


def tables_of(run, **limits):
    rollouts = Rollouts(StepFiles(run), TokenText.of_run(run, "none"))
    rollouts.read()
    return rollouts.page(**limits)


def journal_rows(run):
    return [
        r for p in sorted((run / "journal").glob("*.arrow")) for r in pa.ipc.open_file(str(p)).read_all().to_pylist()
    ]


def credit_rows(run):
    return [row for path in sorted((run / "credit").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def numbers(found, length):
    """The numbers that the page's unpack() gives."""
    if isinstance(found, int | float):
        return np.full(length, found)
    data = base64.b64decode(found)
    return np.frombuffer(data, {2: "<f2", 4: "<f4"}[len(data) // length]).astype(float)


def test_rows_have_the_numbers_of_journal_and_credit(run_directory):
    table, _ = tables_of(run_directory)
    learned = [i for i, void in enumerate(table["void"]["rows"]) if void < 0]
    journal, credit = journal_rows(run_directory), credit_rows(run_directory)
    assert len(learned) == len(journal) == 48
    for i, row, derived in zip(learned, journal, credit, strict=True):
        assert table["id"][i] == f"{row['epoch']}/{row['prompt_index']}/{row['replica']}" == derived["sample_id"]
        assert table["score"][i] == pytest.approx(row["score"], rel=1e-4)
        assert table["components"]["a_words"][i] == pytest.approx(dict(row["components"])["a_words"], rel=1e-4)
        assert table["tokens"][i] == len(row["response_ids"])
        assert table["finish"][i] == row["finish_reason"]
        assert table["kl"][i] == pytest.approx(sum(derived["kl"]), rel=1e-4, abs=1e-5)
        assert table["clipped"][i] == pytest.approx(sum(derived["clipped"]) / len(derived["clipped"]), rel=1e-4)
        assert table["staleness"][i] == 0


def test_every_token_has_the_numbers_of_its_files(run_directory):
    table, details = tables_of(run_directory)
    learned = [i for i, void in enumerate(table["void"]["rows"]) if void < 0]
    both = zip(learned, journal_rows(run_directory), credit_rows(run_directory), strict=True)
    for i, row, derived in both:
        detail, length = details["rows"][i], len(row["response_ids"])
        assert [details["pieces"][p].strip() for p in detail["tokens"]] == [WORDS[t] for t in row["response_ids"]]
        for name in ("values", "kl", "rewards", "td_errors", "advantages", "returns", "entropy", "ratio", "clipped"):
            assert numbers(detail[name], length) == pytest.approx(np.array(derived[name], float), rel=1e-3, abs=1e-6), (
                name
            )
        assert numbers(detail["ref_logprobs"], length) == pytest.approx(row["ref_logprobs"], rel=1e-3)
        assert detail["policy_versions"] == row["step"]
        assert details["prompts"][str(row["prompt_index"])] == row["prompt"]


@pytest.mark.parametrize("scale", [1e3, 1e5, 1e9])
def test_numbers_of_large_scores_are_those_of_the_credit_files(tmp_path, scale):
    run = write_run(tmp_path / "run", steps=3, tokens=(12, 30), scale=scale)
    table, details = tables_of(run)
    largest = 0.0
    for i, derived in enumerate(credit_rows(run)):
        for name in ("values", "rewards", "returns", "kl"):
            found = numbers(details["rows"][i][name], table["tokens"][i])
            assert found == pytest.approx(np.array(derived[name], float), rel=1e-3, abs=1e-6), name
            largest = max(largest, *np.abs(found))
    assert largest > scale


@pytest.mark.parametrize(
    ("values", "bytes_of_each"),
    [
        ([1.0, 65_504.0], 2),
        ([1.0, -65_505.0], 4),
        ([1.0, np.inf, np.nan], 2),
        ([np.inf, -np.inf], 2),
        ([2047, 2048], 2),
        ([3000, 3001], 4),  # versions of the policy
    ],
)
def test_numbers_take_the_fewest_bytes_that_hold_them(values, bytes_of_each):
    values = np.array(values, np.int32 if isinstance(values[1], int) else np.float32)
    found = packed(values, len(values))
    assert len(base64.b64decode(found)) == bytes_of_each * len(values)
    np.testing.assert_array_equal(numbers(found, len(values)), values)


def test_voids_have_reason_and_text_but_no_score(run_directory):
    table, details = tables_of(run_directory)
    voids = [i for i, reason in enumerate(table["void"]["rows"]) if reason >= 0]
    assert [table["step"][i] for i in voids] == [1, 1]
    assert [table["score"][i] for i in voids] == [None, None]
    reasons = [table["void"]["texts"][table["void"]["rows"][i]] for i in voids]
    assert reasons[1] == "timeout"
    assert details["rows"][voids[0]]["text"].startswith("</script>")
    assert details["rows"][voids[1]] == {"text": ""}


def test_rollouts_of_a_void_batch_are_void(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    note = {"kind": "void", "step": 1, "reason": "loss is not finite", "sample_ids": []}
    (run / "journal/note-000002-000.json").write_text(json.dumps(note))
    table, _ = tables_of(run)
    void = [table["step"][i] for i, reason in enumerate(table["void"]["rows"]) if reason >= 0]
    assert void == [1] * 8
    assert table["void"]["texts"] == ["loss is not finite"]


def test_without_credit_files_the_journal_gives_kl(tmp_path):
    run = write_run(tmp_path / "run", steps=2, credit=False)
    table, details = tables_of(run)
    for i, row in enumerate(journal_rows(run)):
        kl = sum(a - b for a, b in zip(row["rollout_logprobs"], row["ref_logprobs"], strict=True))
        assert table["kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-4)
        assert table["clipped"][i] is None
        assert set(details["rows"][i]) == {"tokens", "rollout_logprobs", "ref_logprobs", "policy_versions"}


def test_a_small_budget_bounds_the_details(tmp_path):
    run = write_run(tmp_path / "run", steps=30, tokens=(20, 40))
    table, details = tables_of(run, budget=60_000)
    everything, _ = tables_of(run)[1], None
    assert len(json.dumps(details)) < 75_000 < len(json.dumps(everything))
    run_has, in_table, detailed = table["kept"]["all"]
    assert run_has == in_table == 240 == len(table["id"])
    assert detailed == len(details["rows"]) < 240
    assert table["kept"]["extreme"][1] == table["kept"]["extreme"][0]


def test_tokens_are_numbers_if_the_run_kept_no_tokenizer(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    (run / "tokenizer.json").unlink()
    _, details = tables_of(run)
    ids = journal_rows(run)[0]["response_ids"]
    assert [details["pieces"][p] for p in details["rows"][0]["tokens"]] == [f"[{i}]" for i in ids]


def sampled_places(row):
    others = {place for turn in row["turns"] or () for place in range(turn["end"], turn["next_start"])}
    return [place for place in range(len(row["response_ids"])) if place not in others]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", turns=4, tokens=(12, 30))


def test_tokens_of_an_environment_have_a_text_and_no_numbers(episodes):
    table, details = tables_of(episodes)
    journal, credit = journal_rows(episodes), credit_rows(episodes)
    assert len(details["rows"]) == len(table["id"]) == 48
    several, contexts = 0, set()
    for i, (row, derived) in enumerate(zip(journal, credit, strict=True)):
        detail, places = details["rows"][i], sampled_places(row)
        assert [details["pieces"][p].strip() for p in detail["tokens"]] == [WORDS[t] for t in row["response_ids"]]
        assert table["tokens"][i] == len(places)
        assert table["turns"][i] == (len(row["turns"]) if row["turns"] else None)
        for name in ("values", "kl", "rewards", "advantages", "returns", "entropy", "ratio", "clipped"):
            assert numbers(detail[name], len(places)) == pytest.approx(
                np.array(derived[name], float), rel=1e-3, abs=1e-6
            ), name
        assert numbers(detail["rollout_logprobs"], len(places)) == pytest.approx(row["rollout_logprobs"], rel=1e-3)
        expected = [
            [turn["end"], turn["next_start"], turn["reward"], turn["info"].replace("{}", "")]
            + ([1 + turn["ends"]] if turn["new_context"] else [])
            for turn in row["turns"] or ()
        ]
        assert detail.get("turns", []) == expected
        assert table["kl"][i] == pytest.approx(sum(derived["kl"]), rel=1e-4, abs=1e-5)
        several += len(places) < len(row["response_ids"]) and len(expected) > 1
        contexts.update(turn[4] for turn in expected if len(turn) > 4)
    assert several > 10
    assert contexts == {1, 2}


def test_a_page_without_an_environment_has_nothing_about_turns(tmp_path):
    table, details = tables_of(write_run(tmp_path / "run", steps=2))
    assert "turns" not in table
    assert not any("turns" in detail or "prompt" in detail for detail in details["rows"].values())


def change_steps(run, change):
    """Journal files whose rows `change` changed. The credit files no longer belong to them."""
    for path in sorted((run / "journal").glob("*.arrow")):
        with pa.ipc.open_file(str(path)) as file:
            table = file.read_all()
        rows = table.to_pylist()
        for row in rows:
            change(row)
        changed = pa.Table.from_pylist(rows, schema=table.schema)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(changed)


def test_a_turn_that_nobody_answered_counts(tmp_path):
    run = write_run(tmp_path / "run", steps=1, turns=3, tokens=(12, 30))
    change_steps(run, lambda row: row["turns"] and row["turns"].pop())
    table, _ = tables_of(run)
    answered = [len(row["turns"] or ()) for row in journal_rows(run)]
    assert table["turns"] == [count + 1 if count else None for count in answered]


def test_what_the_environment_said_after_the_last_turn_has_a_text_and_no_tokens(tmp_path):
    last = [{"role": "tool", "content": "4"}, {"role": "user", "content": "Right!\nThe end." + "." * 3000}]
    run = write_run(tmp_path / "run", steps=2, turns=3, tokens=(12, 30), last=last)
    _, details = tables_of(run)
    expected = ("tool: 4\nRight!\nThe end." + "." * 3000)[:2000]
    found = [details["rows"][i].get("unseen") for i in range(len(journal_rows(run)))]
    assert found == [expected if row["turns"] else None for row in journal_rows(run)]
    assert set(found) == {expected, None}


def test_an_answer_that_the_model_has_seen_is_not_shown_again(tmp_path):
    run = write_run(tmp_path / "run", steps=1, turns=3, tokens=(12, 30), last=[{"role": "user", "content": "Go on."}])

    def seen(row):
        if row["turns"]:  # the last tokens are the environment's, or another turn of the policy
            row["turns"][-1] |= {"end": len(row["response_ids"]) - 2, "next_start": len(row["response_ids"])}
            if len(row["turns"]) == 1:
                row["turns"][-1]["next_start"] -= 1

    change_steps(run, seen)
    assert not any("unseen" in detail for detail in tables_of(run)[1]["rows"].values())


def test_a_prompt_that_an_environment_replaced_is_that_of_its_own_rollout(tmp_path):
    run = write_run(tmp_path / "run", steps=4, prompts=4, turns=3, tokens=(12, 30))

    def replaced(row):
        if row["turns"]:
            row["prompt"] = f"seed {row['epoch']}"

    change_steps(run, replaced)
    table, details = tables_of(run)
    asked = set()
    for i, row in enumerate(journal_rows(run)):
        number = table["id"][i].split("/")[1]
        assert details["rows"][i].get("prompt", details["prompts"][number]) == row["prompt"]
        asked.add("prompt" in details["rows"][i])
    assert asked == {True, False}


@pytest.mark.parametrize("cause", ["info", "prompt", "tokens", "unseen"])
def test_a_small_budget_bounds_what_environments_say(tmp_path, cause):
    run = write_run(tmp_path / "run", steps=30, turns=4, tokens=(20, 40), info=json.dumps({"a" * 900: '"' * 90}))

    def changed(row):
        row["turns"] = row["turns"] or [{**empty, "end": 5, "next_start": 5}]
        for turn in row["turns"]:
            turn["info"] = turn["info"] if cause == "info" else "{}"
        if cause == "prompt":
            row["prompt"] = f"{row['epoch']} {row['step']} " + "x" * 2_000
        elif cause == "tokens":
            last = len(row["response_ids"])
            row["response_ids"] += [7] * 500
            row["turns"][-1] |= {"end": last, "next_start": last + 500}
        elif cause == "unseen":
            said = json.dumps([{"role": "user", "content": "x" * 1_500}])
            row["turns"][-1] |= {"end": len(row["response_ids"]), "observation": said}

    empty = {"reward": 0.0, "observation": "[]", "info": "{}", "seconds": 0.0, "cached_tokens": 0}
    change_steps(run, changed)
    _, details = tables_of(run, budget=60_000)
    assert len(json.dumps(details["rows"])) < 70_000
    assert len(details["rows"]) > 5


@pytest.mark.parametrize("text", ["x" * 2_000, "<" * 400, "\u00e9\x1b" * 200])
@pytest.mark.parametrize("cause", ["prompts", "voids"])
def test_a_small_budget_bounds_prompts_and_the_texts_of_voids(tmp_path, cause, text):
    voids = [(f"0/{i}/0", "timeout", f"{i} {text}") for i in range(100)] if cause == "voids" else ()
    prompt = text if cause == "prompts" else "ask"
    run = write_run(tmp_path / "run", steps=20, prompts=160, tokens=(2, 9), voids=voids, prompt=prompt)
    table, details = tables_of(run, budget=60_000)
    assert len(json_text(details)) < 66_000
    assert len(json_text(tables_of(run, budget=10**9)[1])) > 120_000
    kept = [table["id"][i].split("/")[1] for i in details["rows"] if "tokens" in details["rows"][i]]
    assert len(kept) > 5
    assert set(details["prompts"]) == set(kept)
