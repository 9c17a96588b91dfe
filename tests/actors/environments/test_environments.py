"""The environment replica: tokens and rewards of episodes, failures of the user's code, many episodes at once."""

import asyncio
import contextlib
import json
import pickle
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from actors.environments import environments as module
from actors.environments.agents import AgentEnvironment
from actors.environments.environments import Environments, episode_seed
from actors.environments.tool_formats import ToolFormats
from actors.environments.tools import ParsedTurn, ToolCall, ToolEnvironment
from common.config.actors import PromptFormat
from common.config.environment import EnvironmentConfig
from common.data.prompt_records import prompt_record
from common.data.prompt_tokens import bare_ids
from common.environment import VOID_KINDS, Endpoint, EpisodePrompt
from common.errors import UserError
from common.types import IN_EPISODE, Prompt, Rollout, RolloutRef, SampleId, Void
from common.user_code.tools import Tool
from tests.actors.environments import games
from tests.actors.environments.templates import MISTRAL, with_template
from tests.fakes import OWN_TAGS, metered

TOKENIZER = with_template(None)
END = TOKENIZER.eos_token_id
CHAT, PLAIN = PromptFormat(format="chat"), PromptFormat()
QUICK = {"step_timeout_s": 0.4, "timeout_s": 60}


def host(game, *, prompts=CHAT, model=TOKENIZER, **settings):
    cfg = EnvironmentConfig(function=f"tests.actors.environments.games:{game}", **settings)
    found = Environments("Environments(0)", cfg, model=model, prompts=prompts, seed=5, end_process=ended)
    games.closed = Counter()
    return found


ends = []


def ended():
    ends.append(time.monotonic())


def make_prompt(number=0, *, prompts=CHAT, **fields):
    record = prompt_record("here", {"prompt": "Begin.", **fields}, prompts, TOKENIZER)
    return Prompt(SampleId(0, number, 0), record.text, record.token_ids, record.fields, record.messages)


def begun(prompt):
    empty = np.empty(0, dtype=np.int32)
    return Rollout(prompt, empty, empty.astype(np.float32), empty, "", "Generator(0)")


def written(rollout, text, *, end=True):
    """The rollout with a turn of the model, as a generator adds it."""
    ids = [*bare_ids(TOKENIZER, [text])[0], *([END] if end else [])]
    return replace(
        rollout,
        response_ids=np.concatenate([rollout.response_ids, np.asarray(ids, np.int32)]),
        rollout_logprobs=np.concatenate([rollout.rollout_logprobs, np.full(len(ids), -0.5, np.float32)]),
        policy_versions=np.concatenate([rollout.policy_versions, np.full(len(ids), 3, np.int32)]),
        finish_reason="stop" if end else "length",
        cached_tokens=7,
    )


async def play(environments, prompt, *texts):
    """Plays an episode; returns the results of its steps."""
    started, restored = await environments.begin(prompt)
    assert not restored
    assert isinstance(started, Prompt), started
    rollout, results = begun(started), []
    for text in texts:
        rollout, ref, state = await environments.step(written(rollout, text))
        results.append((rollout, ref, state))
        if isinstance(ref, Void) or ref.finished:
            break
    return results


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


def decoded(ids):
    return TOKENIZER.decode(ids.tolist())


def test_an_episode_has_the_tokens_of_both_and_a_mask_for_the_models():
    environments = host("Counting")
    results = run(play(environments, make_prompt(), "one", "two", "three", "four"))
    assert [rollout.finish_reason for rollout, _, _ in results] == [IN_EPISODE, IN_EPISODE, "terminated"]
    rollout, ref, state = results[-1]
    said = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    turns = [("one<|im_end|>", said.format("1:one")), ("two<|im_end|>", said.format("2:two")), ("three<|im_end|>", "")]
    assert decoded(rollout.response_ids) == "".join(text for turn in turns for text in turn)
    assert decoded(rollout.sampled_ids) == "".join(model for model, _ in turns)
    assert rollout.response_mask.sum() == len(rollout.rollout_logprobs) == len(rollout.policy_versions)
    assert [decoded(rollout.response_ids[turn.end : turn.next_start]) for turn in rollout.turns] == [
        t for _, t in turns
    ]
    assert rollout.turns[-1].end == rollout.turns[-1].next_start == len(rollout.response_ids)
    assert [turn.reward for turn in rollout.turns] == [1, 2, 3]
    assert [json.loads(turn.observation) for turn in rollout.turns] == [
        [{"role": "user", "content": text}] for text in ("1:one", "2:two", "3:three")
    ]
    assert [json.loads(turn.info) for turn in rollout.turns] == [{"turn": 1}, {"turn": 2}, {"turn": 3}]
    assert [turn.cached_tokens for turn in rollout.turns] == [7, 7, 7]
    assert rollout.cached_tokens == 0
    assert all(0 <= turn.seconds < 5 for turn in rollout.turns)
    assert ref == RolloutRef.of(rollout)
    assert [ref.finished for _, ref, _ in results] == [False, False, True]
    assert state is None
    assert games.closed == {"Counting": 1}
    assert rollout.response_ids.dtype == np.int32


def test_a_turn_that_was_cut_off_gets_its_end_token_from_the_environment():
    async def steps():
        environments = host("Counting")
        await environments.begin(make_prompt())
        return await environments.step(written(begun(make_prompt()), "cut", end=False))

    rollout, ref, _ = run(steps())
    assert not ref.finished
    assert decoded(rollout.response_ids[rollout.turns[0].end :]).startswith("<|im_end|>\n<|im_start|>user\n1:cut")
    assert decoded(rollout.sampled_ids) == "cut"


def test_messages_of_other_roles_are_rendered_by_the_template():
    [(rollout, _, _)] = run(play(host("Doing"), make_prompt(do="messages"), "x"))
    assert decoded(rollout.response_ids) == (
        "x<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_plain_observation_continues_the_text():
    environments = host("Counting", prompts=PLAIN)
    [(rollout, _, _)] = run(play(environments, make_prompt(prompts=PLAIN), "go"))
    assert decoded(rollout.response_ids) == "go<|im_end|>1:go"
    [(_, void, _)] = run(play(host("Doing", prompts=PLAIN), make_prompt(prompts=PLAIN, do="messages"), "x"))
    assert 'set prompts.format = "chat"' in void.reason


def test_a_plain_class_runs_in_one_thread_and_may_return_a_plain_tuple():
    first, second = run(play(host("Plain"), make_prompt(), "x", "y"))
    assert (first[0].finish_reason, second[0].finish_reason) == (IN_EPISODE, "truncated")
    assert [turn.reward for turn in second[0].turns] == [1, 2]
    assert games.closed == {"Plain": 1}


# How an episode ends


@pytest.mark.parametrize(
    ("game", "settings", "fields", "reasons"),
    [
        ("Counting", {"max_turns": 2}, {}, [IN_EPISODE, "max_turns"]),
        ("Counting", {"max_turns": 3}, {}, [IN_EPISODE, IN_EPISODE, "terminated"]),
        ("Doing", {}, {"do": "truncated"}, ["truncated"]),
        ("Doing", {"max_tokens": 100}, {"do": "long"}, ["max_tokens"]),
        ("Doing", {"max_turns": 1}, {"do": "nothing"}, ["max_turns"]),
    ],
)
def test_an_episode_ends_with_its_reason_and_is_closed(game, settings, fields, reasons):
    results = run(play(host(game, **settings), make_prompt(**fields), "x", "y", "z"))
    assert [rollout.finish_reason for rollout, _, _ in results] == reasons
    rollout, ref, _ = results[-1]
    assert ref.finished
    assert len(rollout.turns) == len(reasons)
    assert rollout.turns[-1].next_start == len(rollout.response_ids)
    assert games.closed == {game: 1}


def test_an_episode_goes_on_while_one_more_token_fits():
    [(whole, _, _)] = run(play(host("Counting"), make_prompt(), "x"))
    room = len(whole.response_ids) + 1
    for most, reason in ((room, IN_EPISODE), (room - 1, "max_tokens")):
        [(rollout, _, _)] = run(play(host("Counting", max_tokens=most), make_prompt(), "x"))
        assert rollout.finish_reason == reason
    assert decoded(rollout.response_ids) == "x<|im_end|>"
    assert json.loads(rollout.turns[0].observation) == [{"role": "user", "content": "1:x"}]


def test_an_episode_that_is_not_played_to_its_end_is_closed():
    async def steps():
        environments = host("Counting")
        await environments.begin(make_prompt())
        await environments.end(make_prompt().sample_id)
        await environments.end(make_prompt().sample_id)
        await environments.begin(make_prompt())
        await environments.begin(make_prompt())  # again: the first instance is closed
        return await environments.step(written(begun(make_prompt(1)), "x"))

    _, void, _ = run(steps())
    assert games.closed == {"Counting": 2}
    assert "this process has no such episode" in void.reason
    assert void.kind == "died"


def test_before_its_process_ends_every_open_episode_is_closed():
    async def episodes():
        environments = host("ClosingLate")
        for number, seconds in enumerate((0.3, 0, 0)):
            await environments.begin(make_prompt(number, seconds=seconds))
        closing = asyncio.create_task(environments.end(make_prompt(0).sample_id))
        await asyncio.sleep(0.05)
        assert games.closed == {}  # the first one is being closed
        await environments.close_all()
        assert games.closed == {"ClosingLate": 3}
        await closing

    run(episodes())


# The prompt


def test_an_environment_that_changes_its_prompt_changes_no_record():
    """The reward and the journal get the fields of the record."""
    prompt = make_prompt(deck=[1, 2], turns=1)
    [(rollout, ref, _)] = run(play(host("Shuffling"), prompt, "x"))
    assert ref.finished
    assert rollout.prompt.fields == {"deck": [1, 2], "turns": 1}
    assert [message["content"] for message in rollout.prompt.messages] == ["Begin."]


def test_reset_gets_the_prompt_and_a_seed_of_its_own():
    async def steps():
        environments = host("Counting")
        seen = []
        for number in (0, 1):
            await environments.begin(make_prompt(number, colour="red"))
            seen.append(environments._episodes[SampleId(0, number, 0)]._object.prompt)
        return seen

    first, second = run(steps())
    prompt = make_prompt()
    assert first == EpisodePrompt(prompt.text, prompt.messages, {"colour": "red"}, episode_seed(5, SampleId(0, 0, 0)))
    assert second.seed == episode_seed(5, SampleId(0, 1, 0)) != first.seed != episode_seed(6, SampleId(0, 0, 0))


@pytest.mark.parametrize(
    ("said", "prompts", "text"),
    [
        ("Ready?", CHAT, "<|im_start|>user\nReady?<|im_end|>\n<|im_start|>assistant\n"),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}],
            CHAT,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("Ready?", PLAIN, "Ready?"),
        (None, PLAIN, "Begin."),
    ],
)
def test_reset_may_replace_the_prompt(said, prompts, text):
    given = make_prompt(prompts=prompts, reset=said)
    prompt, restored = run(host("Asking", prompts=prompts).begin(given))
    assert prompt.text.endswith(text)
    assert decoded(prompt.token_ids) == prompt.text
    assert (prompt.sample_id, prompt.fields, restored) == (given.sample_id, given.fields, False)


@pytest.mark.parametrize(
    ("said", "prompts", "reason"),
    [
        (3, CHAT, "reset returned the observation 3 (int); return text, a list of messages or None"),
        (["Go."], CHAT, "a message is a dict with role and content"),
        ([{"role": "user", "content": " "}], CHAT, "reset returned an empty prompt"),
        ([{"role": "clown", "content": "Go."}], CHAT, "has the role 'clown'"),
        ([{"role": "user", "content": "Go."}], PLAIN, 'set prompts.format = "chat", or return text'),
        ("word " * 600, CHAT, "reset returned a prompt of 6"),
    ],
)
def test_a_prompt_of_reset_that_cannot_be_used_voids_the_episode(said, prompts, reason):
    void, _ = run(host("Asking", prompts=prompts).begin(make_prompt(prompts=prompts, reset=said)))
    assert isinstance(void, Void)
    assert void.reason.startswith("environment tests.actors.environments.games:Asking: ")
    assert reason in void.reason
    assert games.closed == {"Asking": 1}


def test_an_error_in_reading_what_reset_returned_voids_the_episode():
    void, _ = run(host("AskingUnreadably").begin(make_prompt()))
    assert isinstance(void, Void)
    assert "reset returned something that cannot be read: OSError: gone" in void.reason
    assert games.closed == {"AskingUnreadably": 1}


# States


def test_another_process_continues_an_episode_from_its_state():
    async def steps():
        first, second = host("Saving"), host("Saving")
        prompt, _ = await first.begin(make_prompt(turns=3))
        rollout, _, state = await first.step(written(begun(prompt), "one"))
        again, restored = await second.begin(make_prompt(turns=3), state)
        assert restored
        assert again.text == prompt.text
        rollout, _, state = await second.step(written(rollout, "two"))
        return await second.step(written(rollout, "three"))

    rollout, _, state = run(steps())
    assert rollout.finish_reason == "terminated"
    assert [turn.reward for turn in rollout.turns] == [1, 2, 3]
    assert state is None


def test_a_restored_episode_keeps_the_prompt_of_its_rollout():
    async def steps():
        environments = host("Saving")
        rollout = begun(make_prompt(colour="replaced"))
        await environments.begin(rollout.prompt)
        _, _, state = await environments.step(written(rollout, "one"))
        return await environments.begin(make_prompt(colour="of the data"), state)

    prompt, restored = run(steps())
    assert restored
    assert prompt.fields == {"colour": "replaced"}


def test_a_class_without_a_state_begins_again():
    async def steps():
        saved = pickle.dumps(("anything", 1))
        return await host("Counting").begin(make_prompt(), saved)

    prompt, restored = run(steps())
    assert (prompt.text, restored) == (make_prompt().text, False)


def test_a_state_that_cannot_be_pickled_voids_the_episode():
    for game, error in (("Unpicklable", "TypeError: "), ("UnpicklableWithoutText", "NoTextError")):
        [(rollout, void, state)] = run(play(host(game), make_prompt(), "x"))
        assert (rollout, state) == (None, None)
        assert f"state returned something that cannot be pickled: {error}" in void.reason
    void, restored = run(host("Saving").begin(make_prompt(), b"no pickle"))
    assert "the pickled result of state cannot be read" in void.reason
    assert not restored


# Failures

FAULTS = {
    "raises": "step raised ZeroDivisionError: division by zero (games.py, line ",
    "exits": "step raised SystemExit: 3 (games.py, line ",
    "slow": "step took longer than environment.step_timeout_s (0.4 s)",
    "cancels": "step ",
    "text": "step returned 'a text' (str); return Step(observation, reward, terminated, truncated, info)",
    "none": "step returned None; return Step(",
    "short tuple": "step returned a tuple of 2; return Step(",
    "reward text": "step returned the reward '1' (str), where a number is needed",
    "reward nan": "step returned the reward nan; it must be finite and fit float32",
    "reward huge": "step returned the reward 1e+300; it must be finite and fit float32",
    "observation number": "step returned the observation 3 (int); return text, a list of messages or None",
    "observation of numbers": "step returned the message 3; a message is a dict with role and content",
    "message without content": "role and content must be text",
    "message with half a pair": "half of a surrogate pair",
    "flag": "step returned terminated = 'yes' (str); it must be True or False",
    "flags": "step returned terminated = a ndarray; it must be True or False",
    "reward signal": "step returned the reward nan; it must be finite and fit float32",
    "message fails": "step returned something that cannot be read: OSError: gone",
    "info fails": "step returned something that cannot be read: OSError: gone",
    "error without text": "step returned something that cannot be read: NoTextError",
    "info list": "step returned the info a list; it must be a dict",
    "info object": "step returned an info that is not JSON: `a` is a object",
    "info nan": "step returned an info that is not JSON: Out of range float values",
}

KINDS = {"raises": "raised", "exits": "raised", "cancels": "raised", "slow": "timed_out"}


@pytest.mark.parametrize("do", FAULTS)
def test_a_failure_voids_its_episode_with_the_reason_and_closes_it(do):
    memory, kind = metered(), KINDS.get(do, "wrong_answer")
    limits = QUICK if do == "slow" else {}
    [(rollout, void, state)] = run(play(host("Doing", **limits), make_prompt(do=do), "x"))
    assert (rollout, state) == (None, None)
    assert isinstance(void, Void)
    assert void.sample_id == SampleId(0, 0, 0)
    assert void.reason.startswith("environment tests.actors.environments.games:Doing: step ")
    assert FAULTS[do] in void.reason
    assert (void.response, void.error.response) == ("x<|im_end|>", "x<|im_end|>")
    assert void.error.prompt == make_prompt().text
    assert games.closed == {"Doing": 1}
    assert void.kind == kind
    for other in VOID_KINDS:
        assert memory.read("ratchet_environment_voids_total", reason=other, **OWN_TAGS) == [other == kind]
    assert memory.read("ratchet_environment_steps_total", **OWN_TAGS) == [0]


def test_messages_that_the_template_refuses_void_the_episode():
    memory = metered()
    refusing = host("Doing", model=with_template(MISTRAL, end="</s>", bos="<s>"))
    [(_, void, _)] = run(play(refusing, make_prompt(do="system message"), "x"))
    assert "the chat template refuses what step returned: TemplateError: roles must alternate" in void.reason
    assert void.kind == "template"
    assert memory.read("ratchet_environment_voids_total", reason="template", **OWN_TAGS) == [1]


def test_the_traceback_of_a_failure_begins_with_the_users_code():
    [(_, void, _)] = run(play(host("Doing"), make_prompt(do="raises"), "x"))
    lines = void.error.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "games.py" in lines[1]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert void.error.fault.startswith("environment tests.actors.environments.games:Doing: step raised ZeroDivision")
    assert "division" not in void.error.fault  # equal for all failures at this line


def test_an_exit_in_a_task_of_the_user_does_not_end_the_event_loop():
    async def steps():
        environments = host("Doing")
        first = await play(environments, make_prompt(0, do="exits in a task"), "x")
        return [*first, *await play(environments, make_prompt(1, do="truncated"), "x")]

    first, second = run(steps())
    assert json.loads(first[0].turns[0].observation)[0]["content"] == "still here"
    assert second[0].finish_reason == "truncated"


def test_a_failure_of_close_changes_nothing(capsys):
    async def steps():
        environments = host("Doing", step_timeout_s=10, timeout_s=20)
        return [
            (await play(environments, make_prompt(number, do="truncated", close=how), "x"))[0]
            for number, how in enumerate(("fails", "slow", "fails"))
        ]

    results = run(steps())
    assert [rollout.finish_reason for rollout, _, _ in results] == ["truncated"] * 3
    assert games.closed == {"Doing": 3}
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2  # the same failure once, although its text differs
    assert "close raised RuntimeError: no close" in warnings[0]
    assert "close took longer than its limit (1 s)" in warnings[1]


def test_an_object_whose_constructor_takes_too_long_is_closed_when_it_is_made():
    async def steps():
        environments = host("SlowStart", **QUICK)
        void, _ = await environments.begin(make_prompt())
        assert games.closed == {}
        while not games.closed:
            await asyncio.sleep(0.01)
        return void

    assert "its constructor took longer than environment.step_timeout_s (0.4 s)" in run(steps()).reason
    assert games.closed == {"SlowStart": 1}


# Calls that do not end


def test_a_call_that_blocks_the_event_loop_is_voided_and_its_process_ends(monkeypatch):
    """Episodes that wait for the loop meanwhile are not void: they begin again in another process."""
    monkeypatch.setattr(module, "END_AFTER_S", 3.0)  # voids of the others would be there by then
    ends.clear()

    async def steps():
        environments = host("Doing", step_timeout_s=0.5, timeout_s=10)
        for number, do in enumerate(("slow", "blocks long", "truncated")):
            await environments.begin(make_prompt(number, do=do))

        def step(number):
            return asyncio.create_task(environments.step(written(begun(make_prompt(number)), "x")))

        waiting = step(0)
        await asyncio.sleep(0.1)
        culprit = step(1)
        await asyncio.sleep(0.1)
        behind = step(2)
        _, void, _ = await culprit
        assert [waiting.done(), behind.done()] == [False, False]
        while not ends:
            await asyncio.sleep(0.01)
        assert [waiting.done(), behind.done()] == [False, False]
        for task in (waiting, behind):
            task.cancel()
        return void

    void = run(steps())
    assert "step took longer than environment.step_timeout_s (0.5 s)" in void.reason
    assert games.closed == {"Doing": 1}
    assert len(ends) == 1


def test_a_short_block_of_the_event_loop_ends_nothing():
    ends.clear()
    results = run(play(host("Doing", step_timeout_s=10), make_prompt(do="blocks"), "x"))
    assert "step returned None" in results[0][1].reason  # after its 2 s
    assert ends == []


def test_plain_calls_that_never_return_end_the_process_once_there_are_many(monkeypatch):
    monkeypatch.setattr(module, "END_AFTER_S", 0.0)
    monkeypatch.setattr(module, "MAX_STUCK", 3)
    ends.clear()

    async def steps():
        environments = host("Plain", **QUICK)
        for number in range(3):
            assert ends == []
            [(_, void, _)] = await play(environments, make_prompt(number), "a9")
            assert "step took longer than environment.step_timeout_s (0.4 s)" in void.reason
        while not ends:
            await asyncio.sleep(0.01)

    run(steps())
    assert len(ends) == 1


def hanging_tools(free):
    """The episodes of a tool that hangs until `free` is set."""

    def hang() -> None:
        """Waits."""
        free.wait(60)

    tool = Tool("hang", hang, {}, False, lambda: ((), {}))
    return partial(ToolEnvironment, [tool], lambda text: ParsedTurn([ToolCall("hang", "{}")]))


def hanging_agents(free):
    """The same of a plain agent."""

    def agent(prompt, endpoint):
        free.wait(60)

    class Server:
        def open(self, ask):
            return Endpoint("http://127.0.0.1", "key", "policy")

        def shut(self, endpoint):
            pass

    formats, cfg = ToolFormats(TOKENIZER, None), EnvironmentConfig(agent="tests:agent")
    return partial(AgentEnvironment, agent, Server(), formats, cfg)


@pytest.fixture
def hanging(request, monkeypatch):
    """A replica with MAX_STUCK = 2, a function that plays an episode which hangs, and the event that frees them all."""
    monkeypatch.setattr(module, "END_AFTER_S", 0.0)
    monkeypatch.setattr(module, "MAX_STUCK", 2)
    ends.clear()
    free = threading.Event()
    cfg = EnvironmentConfig(function="tests:none", **QUICK)
    make = request.param(free)
    environments = Environments("E(0)", cfg, model=TOKENIZER, prompts=CHAT, end_process=ended, make=make)

    async def void(number):
        prompt, _ = await environments.begin(make_prompt(number))
        if isinstance(prompt, Prompt):
            _, prompt, _ = await environments.step(written(begun(prompt), "x"))
        assert "took longer than environment.step_timeout_s (0.4 s)" in prompt.reason

    yield environments, void, free
    free.set()


PLAIN_CODE = pytest.mark.parametrize("hanging", [hanging_tools, hanging_agents], indirect=True)


@PLAIN_CODE
def test_plain_tools_and_agents_that_never_return_end_the_process_too(hanging, capsys):
    _, void, _ = hanging

    async def steps():
        await void(0)
        assert ends == []
        await void(1)
        while not ends:
            await asyncio.sleep(0.01)

    run(steps())
    assert len(ends) == 1
    assert "E(0) ends its process, because calls in it have not returned in time" in capsys.readouterr().err


@PLAIN_CODE
def test_plain_tools_and_agents_that_return_late_do_not_end_the_process(hanging):
    environments, void, free = hanging

    async def steps():
        await asyncio.gather(void(0), void(1))
        assert environments._checks_stuck
        free.set()
        while environments._checks_stuck:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the process would have ended by then

    run(steps())
    assert ends == []


def test_two_hundred_episodes_at_once_are_not_held_up_by_a_slow_one():
    class Mixed(games.Counting):
        async def step(self, message):
            if self.prompt.fields["slow"]:
                await asyncio.sleep(30)
            return await super().step(message)

    async def steps():
        cfg = EnvironmentConfig(function="m:Mixed", concurrent=200)
        environments = Environments("Environments(0)", cfg, model=TOKENIZER, prompts=CHAT, make=Mixed)
        games.closed = Counter()
        tasks = [
            asyncio.create_task(play(environments, make_prompt(n, slow=n == 0, turns=1 + n % 3), "x", "y", "z"))
            for n in range(200)
        ]
        _, left = await asyncio.wait(tasks[1:], timeout=25)
        assert not left
        assert not tasks[0].done()
        tasks[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[0]
        await environments.end(SampleId(0, 0, 0))
        return [task.result() for task in tasks[1:]]

    for number, results in enumerate(run(steps()), 1):
        turns = 1 + number % 3
        rollout = results[-1][0]
        assert rollout.prompt.sample_id == SampleId(0, number, 0)
        assert [turn.reward for turn in rollout.turns] == [1.0, 2.0, 3.0][:turns]
        assert rollout.finish_reason == "terminated"
    assert games.closed == {"Mixed": 200}


# What the host accepts


def test_the_text_has_special_tokens_only_for_a_class_that_needs_them():
    class Reading(games.Counting):
        needs_special_tokens = True

    special = TOKENIZER.decode([TOKENIZER.convert_tokens_to_ids("[INST]")])
    for kind, text in ((Reading, f"1:a{special}b"), (games.Counting, "1:ab")):
        cfg = EnvironmentConfig(function="m:C")
        environments = Environments("Environments(0)", cfg, model=TOKENIZER, prompts=CHAT, make=kind)
        [(rollout, _, _)] = run(play(environments, make_prompt(), f"a{special}b"))
        assert json.loads(rollout.turns[0].observation)[0]["content"] == text


def test_a_function_may_make_the_instances():
    results = run(play(host("made"), make_prompt(turns=1), "x"))
    assert results[-1][0].finish_reason == "terminated"
    assert games.closed == {"Counting": 1}


@pytest.mark.parametrize(
    ("game", "reason"),
    [
        ("NoStep", "has no method step; write async def step(self, message) -> Step"),
        ("WithArguments", "must be made without arguments; it takes (size)"),
        ("WrongStep", "must have a method step that takes a message; it takes (self)"),
        ("Missing", "has no function Missing"),
    ],
)
def test_a_class_that_is_no_environment_is_refused(game, reason):
    with pytest.raises(UserError, match=r"^environment\.function \(tests\.actors\.environments\.games:") as caught:
        host(game)
    assert reason in str(caught.value)
