"""Prompts of reasoning-gym tasks: different questions, held out by their hash, the same in every process."""

import hashlib
import json
import signal
import sys

import pytest

from common.config.actors import ReasoningGymConfig
from common.data import reasoning_gym_prompts
from common.data import reasoning_gym_script as script
from common.data.records import read_source
from common.errors import UserError

factory = pytest.importorskip("reasoning_gym.factory")

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ASK = "State the final answer to the following arithmetic problem: {} =".format
# Every question with two one-digit numbers, and its answer.
ALL = {
    ASK(f"{a} {sign} {b}"): str(a + b if sign == "+" else a - b) for a in range(10) for b in range(10) for sign in "+-"
}


def made(task="chain_sum", parameters=ONE_DIGIT, *, count=1000, heldout=False, seed=0):
    """How answers are scored, and the questions."""
    rule, *found = script.questions(task, dict(parameters), count, heldout, seed)
    return rule, found


def asked(**settings):
    return [found["question"] for found in made(**settings)[1]]


def refusal(task="chain_sum", parameters=(), **settings):
    with pytest.raises(UserError) as caught:
        made(task, dict(parameters), **settings)
    return str(caught.value)


def test_a_small_task_gives_each_of_its_questions_once_with_its_answer():
    rule, training = made()
    found = training + made(heldout=True)[1]
    assert rule == {"runs_answers": False}
    assert len(found) == len(ALL) == 200
    assert {entry["question"]: entry["answer"] for entry in found} == ALL
    assert found[0]["metadata"]["difficulty"]["num_terms"] == [2, 2]  # a tuple, kept as JSON


def test_one_question_in_five_is_held_out_with_every_seed_and_number():
    def last_of_five(question):
        return int(hashlib.sha256(question.encode()).hexdigest()[:16], 16) % 5 == 0

    expected = {question for question in ALL if last_of_five(question)}
    assert 20 < len(expected) < 60
    for seed in (0, 1):
        assert set(asked(heldout=True, seed=seed)) == expected
        assert set(asked(seed=seed)) == ALL.keys() - expected
        assert set(asked(count=7, seed=seed)) <= ALL.keys() - expected


def test_neighbouring_seeds_give_other_questions():
    first, second, again = (asked(parameters={}, count=200, seed=seed) for seed in (0, 1, 0))
    assert first == again
    assert len(first) == len(set(first)) == 200
    # 200 of the package's own questions, with seeds 0 and 1, have 199 in common.
    assert len(set(first) & set(second)) < 20


def test_each_prompt_has_the_entry_and_the_rule_in_its_fields():
    cfg = ReasoningGymConfig(train_prompts=3, parameters=ONE_DIGIT, template="Q: {question}\nA:")
    read = list(read_source("reasoning-gym:chain_sum", "prompts.train", seed=4, reasoning_gym=cfg))
    assert [where for where, _ in read] == [f"reasoning-gym:chain_sum, question {i}" for i in (1, 2, 3)]
    for (_, record), entry in zip(read, made(count=3, seed=4)[1], strict=True):
        rule = {"task": "chain_sum", "parameters": ONE_DIGIT, "runs_answers": False}
        assert record == {"prompt": f"Q: {entry['question']}\nA:", **entry, "reasoning_gym": rule}
        assert json.loads(json.dumps(record)) == record


def test_the_order_of_pythons_sets_does_not_change_the_questions(monkeypatch):
    """This task's questions depend on it."""
    cfg, read = ReasoningGymConfig(heldout_prompts=2), []
    for hashes in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hashes)
        read.append(list(read_source("reasoning-gym:ransom_note", "prompts.heldout", seed=0, reasoning_gym=cfg)))
    assert read[0] == read[1]


@pytest.mark.parametrize("task", ["countdown", "n_queens", "simple_integration"])
def test_a_task_whose_rule_runs_answers_as_code_is_marked(task):
    assert made(task, {}, count=1)[0] == {"runs_answers": True}


@pytest.mark.parametrize(
    ("task", "parameters", "reason"),
    [
        ("chain_sums", {}, "there is no such task; did you mean chain_sum, decimal_chain_sum?"),
        ("zzz", {}, "there is no such task; its tasks are ab, acre, advanced_geometry, "),
        ("chain_sum", {"max_term": 3}, "the task has no parameter max_term (prompts.reasoning_gym.parameters); did"),
        ("chain_sum", {"zzz": 3}, "its parameters are min_terms, max_terms, min_digits, max_digits, allow_negation"),
        ("chain_sum", {"max_terms": 1}, "the task fails (AssertionError: max_terms must be >= min_terms); correct its"),
        ("graph_color", {}, "its questions cannot be kept as JSON (graph_color: `metadata` has a key that is not text"),
        ("rearc", {}, "its questions cannot be kept as JSON: the right answer then scores 0.05 instead of 1; choose"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_used_is_refused(task, parameters, reason):
    assert reason in refusal(task, parameters)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('print(\'{"error": "there is no such task"}\')', ": there is no such task"),
        ("raise OSError('no space')", ": the process that makes the questions failed: OSError: no space"),
    ],
)
def test_a_fault_in_the_other_process_names_setting_and_source(monkeypatch, tmp_path, code, reason):
    (tmp_path / "script.py").write_text(code)
    monkeypatch.setattr(reasoning_gym_prompts, "SCRIPT", tmp_path / "script.py")
    with pytest.raises(UserError) as caught:
        list(read_source("reasoning-gym:gcd", "prompts.train", seed=0, reasoning_gym=ReasoningGymConfig()))
    assert str(caught.value) == f"prompts.train (reasoning-gym:gcd){reason}"


def test_a_question_that_takes_too_long_is_refused(monkeypatch):
    class Endless(factory.DATASETS["chain_sum"][0]):
        def __getitem__(self, index):
            while True:
                pass

    monkeypatch.setitem(factory.DATASETS, "endless", (Endless, factory.DATASETS["chain_sum"][1]))
    monkeypatch.setattr(script, "LIMIT_S", 0.05)
    before = signal.signal(signal.SIGALRM, script._too_slow)
    try:
        assert "(TimeoutError: one question took longer than 0.05 s); correct its parameters" in refusal("endless")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    needs = "needs the package reasoning-gym, which is not installed; call pip install reasoning-gym"
    with pytest.raises(UserError) as caught:
        list(read_source("reasoning-gym:gcd", "prompts.train", seed=0, reasoning_gym=ReasoningGymConfig()))
    assert str(caught.value) == f"prompts.train (reasoning-gym:gcd) {needs}"


def test_preference_pairs_are_no_task():
    with pytest.raises(UserError, match=r"data\.train \(reasoning-gym:gcd\): reasoning-gym has prompts only; name"):
        list(read_source("reasoning-gym:gcd", "data.train", seed=0))
