"""The screen of a PPO run: its numbers, in 80 columns."""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import dataclass, replace

import pytest

from actors.environments.environments import Environments
from actors.generation.generator import Generator
from actors.scoring.reference import ReferencePolicy
from actors.scoring.reward import Reward
from common.data.questions import question
from common.health.health import Event
from common.types import Score, Turn, Void
from deploy.screen.progress import Progress, one_line
from deploy.screen.text import duration, share, short
from learner.loop.evaluation import Evaluation
from tests.fakes import as_episode, make_experience, make_prompt, tiny_config

RECORD = {
    "step": 6,
    "rollout/score/mean": 0.25,
    "rollout/score/std": 0.433,
    "rollout/score/zero_std": 0.0,
    "rollout/response_tokens/mean": 30.0,
    "kl/per_response": 1.25,
    "mismatch/kl": 3.4e-5,
    "ppo/entropy": 2.5,
    "ppo/clip_frac": 0.125,
    "value/explained_variance": 0.9,  # of the value targets: not shown
    "value/explained_variance/realised": -0.5,
    "value/explained_variance/first": 0.25,
    "time/generate_s": 3.0,
    "time/score_s": 1.0,
    "time/journal_s": 0.01,
    "time/learn_s": 6.0,
    "time/old_logprobs_s": 2.0,  # part of learn_s
    "time/optimise_s": 4.0,  # the same
    "time/publish_s": 0.49,
    "time/checkpoint_s": 1.5,
}


class Letters:
    """Decodes the id 0 to `a`, and so on."""

    def decode(self, ids: list[int], **options: bool) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


@pytest.fixture
def progress(tmp_path, monkeypatch) -> Progress:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Progress(tiny_config("model", num_steps=200, rollouts_per_step=16), tmp_path, Letters())


def lines_of(capsys, progress, *records, voids=(), example=None, events=()) -> list[str]:
    for record in records:
        progress.step(record, example or make_experience(0, [0, 1, 2], score=0.5), list(voids), list(events))
    return capsys.readouterr().out.splitlines()


def row_of(lines: list[str]) -> dict[str, str]:
    """The first step's cells by their headings."""
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["step", "score"])
    return dict(zip(lines[at].split(), lines[at + 1].split(), strict=True))


def test_a_step_without_a_critic_shows_a_dash_for_it(capsys, progress):
    record = {key: value for key, value in RECORD.items() if not key.startswith("value/")}
    row = row_of(lines_of(capsys, progress, record))
    assert row["critic"] == row["first"] == "-"


def test_a_step_shows_these_numbers(capsys, progress):
    lines = lines_of(capsys, progress, RECORD)
    assert row_of(lines) == {
        "step": "7/200",
        "score": "0.25",
        "std": "0.43",
        "KL": "1.25",
        "mismatch": "3.4e-05",
        "entropy": "2.50",
        "tokens": "30.00",
        "clip": "12%",
        "critic": "-0.50",
        "first": "0.25",
        "tok/s": "40.03",  # 16 rollouts of 30 tokens in 3 + 1 + 6 + 0.49 + 1.5 s
        "left": "39m",  # 193 steps of 11.99 s are 2314 s
    }
    assert "      12.0 s: generate 3.0, reward 1.0, learn 6.0, publish 0.5, save 1.5" in lines


def test_every_line_of_a_step_fits_80_columns(capsys, progress):
    large = {key: value if key == "step" or key.startswith("time/") else 123456789.0 for key, value in RECORD.items()}
    broken = {key: value if key == "step" else math.nan for key, value in RECORD.items()}
    example = make_experience(0, list(range(20)) * 9, score=-123456.5)
    example = replace(example, rollout=replace(example.rollout, prompt=replace(make_prompt(), text="why? " * 50)))
    large |= {"ppo/clip_frac": 1.0, "rollout/score/zero_std": 0.0}
    large |= {f"value/explained_variance/{part}": -1e9 for part in ("realised", "first")}
    lines = lines_of(capsys, progress, {**RECORD, "step": 198}, large, broken, example=example)
    assert max(map(len, lines)) <= 80
    assert len({line.split()[0] for line in lines} & {"199/200", "7/200"}) == 2


def test_a_row_of_a_long_run_leaves_out_the_number_of_steps(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = Progress(tiny_config("model", num_steps=50_000, rollouts_per_step=16), tmp_path, Letters())
    lines = lines_of(capsys, long, {**RECORD, "step": 49_998})
    assert row_of(lines)["step"] == "49999"
    assert max(map(len, lines)) <= 80


def test_no_two_columns_have_one_heading(capsys, progress):
    lines = lines_of(capsys, progress, RECORD)
    [heading] = [line.split() for line in lines if line.split()[:2] == ["step", "score"]]
    assert len(set(heading)) == len(heading)
    legend = " ".join(lines[: lines.index(next(line for line in lines if "left:" in line)) + 1])
    assert all(f"{word}" in legend for word in heading if word != "step")


def test_time_left_is_the_median_of_recent_steps_times_those_to_come(capsys, progress):
    slow = {**RECORD, "time/learn_s": 6000.0}
    lines = lines_of(capsys, progress, RECORD, {**slow, "step": 7}, {**RECORD, "step": 8})
    rows = [line.split() for line in lines if line.split()[0].endswith("/200")]
    # about 193 steps of 12 s; 192 of (12 + 6006) / 2 s; 191 of 12 s
    assert [row[-1] for row in rows] == ["39m", "7d", "38m"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (99, "99s"), (100, "2m"), (5940, "99m"), (6000, "1h40"), (3 * 3600 + 300, "3h05"), (12 * 86400, "12d")],
)
def test_a_duration_takes_at_most_five_characters(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.256, "0.26"), (-1234.56, "-1235"), (1234.56, "1234.6"), (9e8, "9e+08"), (-9e8, "-9e+08"), (math.nan, "nan")],
)
def test_a_number_takes_at_most_six_characters(value, shown):
    assert short(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(1.0, "1.00"), (-9.99, "-9.99"), (-9.995, "<-9"), (-0.004, "0.00"), (math.nan, "nan")]
)
def test_a_share_takes_at_most_five_characters(value, shown):
    assert share(value) == shown


def test_a_health_rule_is_shown_in_one_line_when_it_is_news(capsys, progress):
    event = Event("kl_negative", "KL is [red]-3", "raise it", steps=10)
    old = Event("voids_rising", "many", "look", steps=2, news=False)
    lines = lines_of(capsys, progress, RECORD, events=[event, old])
    assert "      kl_negative: KL is [red]-3; raise it (docs/health.md#kl_negative) (10 steps)" in lines
    assert not any("voids_rising" in line for line in lines)


def test_voids_are_counted_by_their_reasons(capsys, progress):
    voids = [Void(make_prompt(i).sample_id, "too [red]late") for i in range(3)]
    assert "      3 rollout(s) voided: too [red]late" in lines_of(capsys, progress, RECORD, voids=voids)


def test_the_example_shows_the_last_question_of_the_user(capsys, progress):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Where does a\nmoose live?"},
    ]
    prompt = replace(make_prompt(), text="<|im_start|>user\nWhere does a\nmoose live?<|im_end|>", messages=chat)
    assert question(prompt) == "Where does a\nmoose live?"
    assert question(make_prompt(3)) == "prompt 3"
    row = make_experience(0, [0, 1, 2])
    row = replace(row, rollout=replace(row.rollout, prompt=prompt), score=Score(0.5, {}))
    assert "      Where does a moose live? -> 'abc' = 0.5" in lines_of(capsys, progress, RECORD, example=row)


def observed(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}] if text else [])


def test_the_example_shows_each_turn_in_a_line_of_its_own(capsys, progress):
    row = as_episode(
        make_experience(3, [0, 1, 8, 9, 2, 10, 3]),
        Turn(2, 4, 0.0, observed("Higher.\nAgain?")),
        Turn(5, 6, 0.0, observed("[red]Lower.")),
        Turn(7, 7, 1.0, observed("Right!")),
    )
    row = replace(row, score=Score(0.5, {}))
    assert lines_of(capsys, progress, RECORD, example=row)[-3:] == [
        "      prompt 3 -> 'ab'",
        "      Higher. Again? -> 'c'",
        "      [red]Lower. -> 'd' = 0.5",
    ]


@pytest.mark.parametrize(("turns", "left_out"), [(5, "1 more turn"), (9, "5 more turns")])
def test_the_example_of_many_turns_shows_the_first_ones_and_the_last(capsys, progress, turns, left_out):
    """The last one was cut off before the environment answered it."""
    answers = [Turn(2 * i + 1, 2 * i + 2, 0.0, observed(f"no {i}")) for i in range(turns - 1)]
    row = as_episode(make_experience(3, [*range(2 * turns - 1)]), *answers)
    row = replace(row, score=Score(0.5, {}))
    assert lines_of(capsys, progress, RECORD, example=row)[-5:] == [
        "      prompt 3 -> 'a'",
        "      no 0 -> 'c'",
        "      no 1 -> 'e'",
        f"      ... {left_out}",
        f"      no {turns - 2} -> '{chr(ord('a') + 2 * turns - 2)}' = 0.5",
    ]


@pytest.mark.parametrize(
    ("asked", "answer", "shown"),
    [
        ("short", "yes", "      short -> 'yes' = 1"),
        ("x" * 50, "yes", "      " + "..." + "x" * 12 + " -> 'yes' = 1"),
        ("short", "y" * 50, "      short -> '" + "y" * 11 + "... = 1"),
        ("x" * 50, "y" * 50, "      ..." + "x" * 7 + " -> '" + "y" * 6 + "... = 1"),
    ],
)
def test_an_example_keeps_the_end_of_the_question_and_the_answers_start(asked, answer, shown):
    assert one_line(asked, answer, " = 1", width=34) == shown
    assert len(shown) <= 34


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, "~/.ray/auth_token"),
        ({"RAY_AUTH_TOKEN_PATH": "/tokens/mine"}, "/tokens/mine"),
        ({"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_TOKEN_PATH": "/tokens/mine"}, "the variable RAY_AUTH_TOKEN"),
    ],
)
def test_when_ready_the_screen_names_dashboard_token_and_endpoint(capsys, progress, monkeypatch, variables, place):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    progress.ready([], dashboard="127.0.0.1:8265", figures="127.0.0.1:4000")
    progress.ready([], dashboard=None, figures="127.0.0.1:4000")
    said = [line for line in capsys.readouterr().out.splitlines() if "http" in line]
    assert said == [
        f"Ray's dashboard: http://127.0.0.1:8265 (token in {place})",
        "figures of this run: http://127.0.0.1:4000/metrics",
        "figures of this run: http://127.0.0.1:4000/metrics",
    ]
    assert max(map(len, said)) <= 80


@dataclass
class ReadyPool:
    role: str
    ready: list[str]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "1 Environments, 1 Generator, 1 ReferencePolicy, 1 Reward, Learner"),
        (2, "2 Environments, 2 Generators, 2 ReferencePolicies, 2 Rewards, Learner"),
    ],
)
def test_when_ready_the_screen_counts_the_processes_of_every_role(capsys, progress, number, expected):
    roles = [Generator, Reward, ReferencePolicy, Environments]
    pools = [ReadyPool(role.__name__, ["a replica"] * number) for role in roles]
    progress.ready(pools, dashboard=None, figures="127.0.0.1:4000")
    assert re.fullmatch(r"ready after \d+ s: (.*)", capsys.readouterr().out.splitlines()[0])[1] == expected


def evaluation(version: int, score: float, pass_at_1: float | None) -> Evaluation:
    interval = None if pass_at_1 is None else (0.25, 0.75)
    return Evaluation(version, 8, 0, "", pass_at_1, interval, score, {"rm": score}, 0.0, 1.0, 1.0, 1.0)


def test_an_evaluation_shows_its_score_where_pass_at_1_means_nothing(capsys, progress):
    before, after = evaluation(0, 0.125, None), evaluation(7, 0.25, None)
    progress.evaluation(before)
    assert capsys.readouterr().out.splitlines()[0] == "held-out score at version 0: 0.125 (8 prompts)"
    progress.end([before, after], wins=0.625, seconds=9)
    shown = capsys.readouterr().out
    assert "pass@1" not in shown
    [wins] = [line for line in shown.splitlines() if "higher score than before" in line]
    assert "62.5%" in wins
    progress.evaluation(evaluation(3, 0.125, 0.5))
    assert capsys.readouterr().out.splitlines()[0] == "held-out pass@1 at version 3: 50.0% (25.0% to 75.0%, 8 prompts)"
    progress.end([evaluation(0, 0.1, 0.5), evaluation(7, 0.1, 0.625)], seconds=9)
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "pass@1" in line]
    assert [cell for cell in row if "%" in cell] == ["50.0%", "62.5%"]


def test_a_long_silence_is_broken_by_what_the_run_is_doing(capsys, progress):
    async def watch() -> str:
        watching = asyncio.create_task(progress.while_silent(lambda: "step 7: the learner learns", after_s=0.01))
        shown = ""
        while "learns" not in shown:
            await asyncio.sleep(0.01)
            shown += capsys.readouterr().out
        watching.cancel()
        return shown

    shown = asyncio.run(asyncio.wait_for(watch(), 60))
    assert re.match(r"      \d\d:\d\d:\d\d step 7: the learner learns\n", shown)


def test_a_run_that_shows_its_steps_is_not_interrupted(capsys, progress):
    async def watch() -> None:
        watching = asyncio.create_task(progress.while_silent(lambda: "never shown", after_s=3600))
        for _ in range(5):
            await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(watch())
    assert capsys.readouterr().out == ""
