"""The rule of a reasoning-gym task scores responses to its prompts, and nothing else."""

import asyncio
import sys

import pytest

from actors.scoring import reasoning_gym_source as module
from actors.scoring.kinds import kind_of
from actors.scoring.reasoning_gym_source import ReasoningGymSource, try_rule
from common.config.actors import SourcesConfig
from common.config.sources import ReasoningGymSourceConfig
from common.errors import UserError
from common.types import RewardInput
from common.user_code.errors import UserCodeError

pytest.importorskip("reasoning_gym")

SUM = {
    "question": "3 + 4 =",
    "answer": "7",
    "metadata": {"source_dataset": "chain_sum"},
    "reasoning_gym": {"task": "chain_sum", "parameters": {"max_terms": 2}, "runs_answers": False},
}
# From these premises follow Q and (P ∧ Q), but not R. A single variable counts as trivial.
LOGIC = {
    "question": "What follows?",
    "answer": None,
    "metadata": {"variables": ["P", "Q", "R"], "premises": ["P", "(P → Q)"]},
    "reasoning_gym": {"task": "propositional_logic", "parameters": {}, "runs_answers": False},
}
QUEENS = {
    **SUM,
    "metadata": {"valid_answers": []},
    "reasoning_gym": {"task": "n_queens", "parameters": {}, "runs_answers": True},
}
DENIED = "would run responses as Python code, because the rule of the task n_queens does; allow it with run_answers"


def source(**settings):
    return ReasoningGymSourceConfig(name="solved", reasoning_gym=True, **settings)


def service(cfg, **settings):
    return SourcesConfig(sources=(cfg,), **settings)


def answer(response, fields=SUM):
    return RewardInput("3 + 4 =", response, 3, "stop", fields)


def score(*responses, fields=SUM, isolation="thread", **settings):
    """(score, origin) of each response, or the reason why it has none."""

    async def ask(made):
        try:
            found = await asyncio.gather(*(made(answer(text, fields)) for text in responses), return_exceptions=True)
        finally:
            made.close()
        return [str(one) if isinstance(one, UserCodeError) else (one.score, one.origin) for one in found]

    cfg = source(**settings)
    made = ReasoningGymSource(cfg, service(cfg, isolation=isolation))
    return asyncio.run(ask(made))


def scores(*responses, **settings):
    return [found[0] for found in score(*responses, **settings)]


def test_the_score_is_the_tasks_own():
    assert scores("7", " 7\n", "+07.0", "8", "") == [1, 1, 1, 0, 0]
    assert scores("17") == [1 / 2]  # the task gives a part: the length of the right answer by that of the response


def test_the_rule_of_a_task_reads_the_metadata():
    assert scores("(P ∧ Q)", "Q", "R", "X", fields=LOGIC) == [1, 0.25, 0.05, 0]


def test_the_last_match_of_the_pattern_is_the_answer():
    tagged = {"answer_pattern": "(?s)<answer>(.*?)</answer>"}
    assert scores("<answer>8</answer> no: <answer>\n7 </answer>", "7", "<answer>7", **tagged) == [1, 0, 0]
    assert scores(" 7\nbecause 3 + 4 = 8", "so 7", answer_pattern=r"^\s*(-?\d+)") == [1, 0]


def test_the_origin_of_a_score_is_task_and_version(monkeypatch):
    monkeypatch.setattr(module, "version", lambda package: {"reasoning-gym": "1.2"}[package])
    assert score("7") == [(1.0, "reasoning-gym 1.2: chain_sum")]


def test_the_digest_of_the_source_is_that_of_the_version(monkeypatch):
    identity = kind_of(source()).identity
    found = [identity(source(weight=2.0)), identity(source())]
    monkeypatch.setattr(module, "version", lambda package: "9.9")
    found.append(identity(source()))
    assert found[0] == found[1] != found[2]
    assert source(answer_pattern="(a)").scoring == {"kind": "reasoning_gym", "answer_pattern": "(a)"}


def test_a_prompt_without_all_fields_has_no_score_and_stops_the_start():
    fields = {key: value for key, value in SUM.items() if key != "question"}
    [reason] = score("7", fields=fields)
    assert reason == (
        "needs all fields of a reasoning-gym prompt, but the record lacks question; leave out prompts.columns.prompt"
    )
    with pytest.raises(UserError, match=r"^reward source solved needs all fields of a reasoning-gym prompt"):
        try_rule(source(), service(source()), answer("7", fields))


def test_running_answers_as_code_needs_permission():
    asked = answer("__import__('os')", QUEENS)
    with pytest.raises(UserError, match=f"^reward source solved {DENIED}"):
        try_rule(source(), service(source(), isolation="process"), asked)
    assert try_rule(source(run_answers=True), service(source(), isolation="process"), asked) == ""


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_the_task_decides_whether_answers_run_whatever_the_record_says(tmp_path, isolation):
    fields = {**QUEENS, "reasoning_gym": {**QUEENS["reasoning_gym"], "runs_answers": False}}
    made = f"open({str(tmp_path / 'ran')!r}, 'w')"
    [reason] = score(made, fields=fields, isolation=isolation)
    assert reason.startswith(f"raised PermissionError: {DENIED}")
    assert not (tmp_path / "ran").exists()
    if isolation == "process":  # the same prompt and answer, with permission
        assert scores(made, fields=fields, isolation=isolation, run_answers=True) == [0]
        assert (tmp_path / "ran").exists()


def test_the_trial_calls_the_rule_in_another_process():
    cfg = source()
    assert try_rule(cfg, service(cfg), answer("made up")) == ""
    failing = {**SUM, "answer": 7}
    warning = try_rule(cfg, service(cfg, isolation="process"), answer("x7", failing))
    assert warning.startswith(
        "reward source solved (actors.scoring.reasoning_gym_score:score), tried on the first prompt"
    )
    assert "raised" in warning


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"^reward source solved needs the package reasoning-gym, which"):
        kind_of(source()).check(source(), False)
