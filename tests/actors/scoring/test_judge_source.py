"""A judge behind an OpenAI-compatible service: its request, and how its score is read."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from aiohttp import web

from actors.scoring.http_service import HttpSourceError
from actors.scoring.judge_source import JudgeSource, fill, try_template
from common.config.actors import SourcesConfig
from common.config.sources import JudgeSourceConfig
from common.errors import UserError
from common.types import RawScore, RewardInput

ANSWER = RewardInput("{response}?", "yes {prompt}", 2, "stop", {"answer": "no", "points": [1, 2]})


def config(*urls: str, **settings) -> JudgeSourceConfig:
    given = {"template": "Q: {prompt}\nA: {response}", "score_range": (0, 10), "retries": 1, "backoff_s": 0.01}
    return JudgeSourceConfig(
        name="j", judge_urls=urls or ("http://h/v1",), judge_model="judge-1", **{**given, **settings}
    )


def ask(text, *, model: str | None = None, finish: str = "stop", **settings) -> tuple[RawScore | str, list, str]:
    """The score or error of ANSWER from a judge that writes this text, the requests it got, and its address."""
    seen: list = []

    async def handler(request):
        seen.append(await request.json())
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return web.json_response({"choices": [choice], **({"model": model} if model else {})})

    async def scenario():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        judge = JudgeSource(config(url, **settings))
        try:
            return await judge(ANSWER), seen, url
        except HttpSourceError as error:
            return str(error), seen, url
        finally:
            await judge.close()
            await runner.cleanup()

    return asyncio.run(scenario())


def test_a_judge_is_asked_for_one_chat_completion():
    found, seen, url = ask("It is fine.\nScore: 7.5", system="You grade {fields.answer}.")
    assert found == RawScore(7.5, f"judge-1 at {url}/chat/completions")
    assert seen == [
        {
            "model": "judge-1",
            "messages": [
                {"role": "system", "content": "You grade no."},
                {
                    "role": "user",
                    "content": "Q: {response}?\nA: yes {prompt}",
                },  # placeholders in the texts are not filled in
            ],
            "temperature": 0,
            "max_tokens": 512,
            "stream": False,
        }
    ]


def test_the_request_and_the_models_own_name_can_be_set():
    found, [request], url = ask("score 1", model="judge-1-0425", request={"top_p": 0.5})
    assert found == RawScore(1.0, f"judge-1-0425 at {url}/chat/completions")
    assert "temperature" not in request
    assert request["top_p"] == 0.5


@pytest.mark.parametrize(
    ("text", "settings", "score"),
    [
        ("Score: 3 at first, but in the end score: 4", {}, 4.0),  # the last one counts
        ("<answer>-2</answer>", {"score_pattern": r"<answer>(-?\d+)</answer>", "score_range": (-5, 5)}, -2.0),
        ('{"why": "good", "grade": 0.25}', {"score_field": "grade"}, 0.25),
        ('Here:\n```json\n{"grade": 9}\n```', {"score_field": "grade"}, 9.0),
        (f'{{"why": "{"long " * 1000}", "grade": 3}}', {"score_field": "grade"}, 3.0),
        (f'```\n{{"why": "{"long " * 1000}", "grade": 3}}\n```', {"score_field": "grade"}, 3.0),
        ("Score: 8", {}, 8.0),
        ("**Score**: 8/10", {}, 8.0),
        ("Score: 7.5.", {}, 7.5),
        ("Score: 8 - a good answer", {}, 8.0),
        ("Score: -2", {"score_range": (-5, 5)}, -2.0),
    ],
)
def test_the_score_is_read_by_pattern_or_from_a_field(text, settings, score):
    assert ask(text, **settings)[0].score == score


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("I cannot say.", {}, "score_pattern is not in the judge's text: I cannot say."),
        ("Score: 11", {}, "the judge's score 11 is outside score_range (0 to 10)"),
        ("Score: -1", {}, "the judge's score -1 is outside score_range (0 to 10)"),
        ("grade: A", {"score_pattern": "grade: (.)"}, "score_pattern found no number, but 'A'"),
        ("no json", {"score_field": "grade"}, "the judge's text is no JSON object: no json"),
        ('{"other": 1}', {"score_field": "grade"}, "the answer has no 'grade'; its keys are 'other'"),
        ('{"grade": "7"}', {"score_field": "grade"}, "'grade' must hold a number, not '7'"),
        ('{"grade": true}', {"score_field": "grade"}, "'grade' must hold a number, not True"),
        (None, {}, "the judge wrote no text, but None"),
    ],
)
def test_a_judgement_without_a_score_in_bounds_is_tried_again(text, settings, message):
    found, seen, _ = ask(text, **settings)
    assert message in found
    assert len(seen) == 2


@pytest.mark.parametrize(
    "text",
    [
        "Score: .5",
        "Score (0-10): 7",
        "Score (1 to 10): 7",
        "Score: \N{MINUS SIGN}2",
        "Score: 7-8",
        "Score: 17 - 18",
        "Score: 7.25-8",
        "Score: 7\N{EN DASH}8",
        "Score: 7,5",
        "Score: 1234567890",
    ],
)
def test_the_default_pattern_reads_no_part_of_another_number_or_range(text):
    assert "score_pattern is not in the judge's text" in ask(text, score_range=(-1e9, 1e9))[0]


@pytest.mark.parametrize(
    ("request_", "limit"), [({}, "max_tokens"), ({"max_completion_tokens": 9}, "max_completion_tokens")]
)
@pytest.mark.parametrize("text", ["Score: 1", None])
def test_a_text_that_was_cut_off_is_no_score(request_, limit, text):
    found, seen, _ = ask(text, finish="length", request=request_)
    assert f"the judge's text was cut off; raise request.{limit}" in found
    assert len(seen) == 2


def test_a_chat_prompt_is_filled_in_as_its_messages():
    user, call = {"role": "user", "content": "2 + 2?"}, {"function": {"name": "add"}}
    chat = [{"role": "system", "content": "Be brief."}, user, {"role": "assistant", "tool_calls": [call]}]
    rendered = replace(ANSWER, prompt="<|im_start|>user\n2 + 2?<|im_end|>")
    assert fill("Q: {prompt}", replace(rendered, messages=[user])) == "Q: 2 + 2?"
    assert fill("Q: {prompt}", replace(rendered, messages=chat)) == (
        'Q: system: Be brief.\n\nuser: 2 + 2?\n\nassistant: [{"function": {"name": "add"}}]'
    )
    assert fill("Q: {prompt}", rendered) == f"Q: {rendered.prompt}"


def test_fields_other_than_text_are_filled_in_as_json():
    assert fill('{fields.points} {"score": 1} {} {response}', ANSWER) == '[1, 2] {"score": 1} {} yes {prompt}'


def test_a_template_with_a_field_that_the_prompts_lack_is_refused():
    service, answer = SourcesConfig(sources=()), replace(ANSWER, fields={"answer": "x", "id": 1})
    assert try_template(config(template="{response} {fields.answer}"), service, answer) == ""
    for wrong in ({"template": "{response} {fields.reference}"}, {"system": "{fields.reference}"}):
        with pytest.raises(UserError, match=r"names \{fields.reference\}, but .* record has answer, id;"):
            try_template(config(**wrong), service, answer)
