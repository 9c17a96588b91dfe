"""Episodes of several contexts: the tokens of new prompts, what the policy sees, and which turns end a sequence."""

import json
from dataclasses import replace

import numpy as np
import pytest

from actors.environments.environments import Environments
from actors.environments.rendering import make_rendering
from actors.environments.steps import Continuation, Restart
from common.config.environment import EnvironmentConfig
from common.data.prompt_records import prompt_record
from common.data.prompt_tokens import rendered, rendered_ids
from common.environment import Step
from common.types import IN_EPISODE, Prompt, SampleId, Turn, Void
from tests.actors.environments import templates
from tests.actors.environments.templates import with_template
from tests.actors.environments.test_environments import CHAT, PLAIN, begun, play, run, written
from tests.fakes import make_prompt as plain_prompt
from tests.fakes import make_rollout

QUESTION = {"role": "user", "content": "Begin."}


def host(tokenizer, make, *, prompts=CHAT, **settings):
    cfg = EnvironmentConfig(function="tests.tasks:NoSuchClass", **settings)
    return Environments("Environments(0)", cfg, model=tokenizer, prompts=prompts, make=make)


def asked(tokenizer, *, messages=(QUESTION,), prompts=CHAT):
    content = list(messages) if prompts is CHAT else "Begin."
    record = prompt_record("here", {"prompt": content}, prompts, tokenizer)
    return Prompt(SampleId(0, 0, 0), record.text, record.token_ids, record.fields, record.messages)


class Repeating:
    """Repeats the model's last word. Ends after three turns."""

    turn = 0

    async def step(self, message):
        self.turn += 1
        return Step(f"{self.turn}:{message['content'].split()[-1]}", 1.0, terminated=self.turn == 3)


class Beginning:
    """Answers each turn with the next one of `observations`."""

    def __init__(self, *observations, first=None):
        self.observations, self.first = list(observations), first

    async def reset(self, prompt):
        return self.first

    async def step(self, message):
        return Step(self.observations.pop(0), 0.5)


def whole_prompt(tokenizer, *messages, **options):
    return rendered_ids(tokenizer, rendered(tokenizer, messages, add_generation_prompt=True, **options))


def assistant(text):
    return {"role": "assistant", "content": text}


def user(text):
    return {"role": "user", "content": text}


THOUGHTS = [f"<think>\nthought {word}\n</think>\n\n{word}" for word in ("one", "two", "three")]


@pytest.mark.parametrize("template", [None, templates.QWEN_3, templates.FORGETFUL, templates.NUMBERED])
def test_each_turn_has_the_whole_conversation_as_its_prompt(template):
    tokenizer = with_template(template)
    results = run(play(host(tokenizer, Repeating, sequence="turn"), asked(tokenizer), *THOUGHTS))
    said, contexts = [QUESTION], []
    for (rollout, _, _), text in zip(results, THOUGHTS, strict=True):
        turn = rollout.turns[-1]
        contexts.append(turn.new_context)
        assert decoded(tokenizer, rollout.response_ids[: turn.end]).endswith(f"{text}<|im_end|>")
        said += [assistant(text), *json.loads(turn.observation)]
        if turn.new_context:
            assert rollout.context_ids.tolist() == whole_prompt(tokenizer, *said)
            assert rollout.context_starts[-1] == turn.end
            assert rollout.response_ids[turn.end : turn.next_start].tolist() == whole_prompt(tokenizer, *said)
    assert contexts == [True, True, False]  # nothing follows the last turn
    assert not any(turn.ends for turn in rollout.turns)
    assert rollout.finish_reason == "terminated"
    assert rollout.response_mask.sum() == len(rollout.rollout_logprobs)
    assert decoded(tokenizer, rollout.sampled_ids) == "".join(f"{text}<|im_end|>" for text in THOUGHTS)
    if template is templates.QWEN_3:  # it drops the thoughts of earlier answers, which the policy does not read then
        assert "thought one" not in decoded(tokenizer, rollout.response_ids[rollout.turns[0].end :])


def decoded(tokenizer, ids):
    return tokenizer.decode(np.asarray(ids).tolist())


def test_without_the_setting_turns_continue_one_context():
    tokenizer = with_template(None)
    rollout = run(play(host(tokenizer, Repeating), asked(tokenizer), "one", "two", "three"))[-1][0]
    assert rollout.context_starts == []
    assert rollout.context_ids.tolist() == [*rollout.prompt.token_ids, *rollout.response_ids]


def test_the_policy_may_continue_a_message_of_the_prompt():
    tokenizer = with_template(None)
    prompts = CHAT.model_copy(update={"last_assistant": "continue"})
    record = prompt_record("here", {"prompt": [QUESTION, assistant("It is")]}, prompts, tokenizer)
    prompt = Prompt(SampleId(0, 0, 0), record.text, record.token_ids, record.fields, record.messages)
    environments = host(tokenizer, Repeating, prompts=prompts, sequence="turn")
    [(rollout, _, _)] = run(play(environments, prompt, " one"))
    expected = whole_prompt(tokenizer, QUESTION, assistant("It is one"), user("1:one"))
    assert rollout.context_ids.tolist() == expected


def test_max_tokens_counts_the_tokens_of_new_prompts():
    tokenizer = with_template(None)
    [(whole, _, _)] = run(play(host(tokenizer, Repeating, sequence="turn"), asked(tokenizer), "one"))
    room = len(whole.response_ids) + 1
    for most, reason in ((room, IN_EPISODE), (room - 1, "max_tokens")):
        environments = host(tokenizer, Repeating, sequence="turn", max_tokens=most)
        [(rollout, _, _)] = run(play(environments, asked(tokenizer), "one"))
        assert rollout.finish_reason == reason
    assert rollout.context_starts == []  # there is no prompt after the last turn
    assert len(rollout.response_ids) == rollout.turns[0].end


@pytest.mark.parametrize("ends", [False, True])
def test_a_restart_replaces_the_whole_conversation(ends):
    tokenizer = with_template(templates.CHATML.replace("message.content", "message.content + (suffix or '')"))
    messages = [{"role": "system", "content": "Be brief."}, user("Again.")]
    restart = Restart(messages, ends=ends, options={"suffix": "!"})
    first, second = run(play(host(tokenizer, lambda: Beginning(restart, "Go on.")), asked(tokenizer), "one", "two"))
    rollout = first[0]
    assert rollout.context_ids.tolist() == whole_prompt(tokenizer, *messages, suffix="!")
    assert "Be brief.!" in decoded(tokenizer, rollout.context_ids)
    assert (rollout.turns[0].new_context, rollout.turns[0].ends) == (True, ends)
    assert json.loads(rollout.turns[0].observation) == messages
    assert rollout.turns[0].reward == 0.5
    # The next turn continues the newest context.
    after = second[0]
    assert not after.turns[1].new_context
    follows = make_rendering(tokenizer, chat=True).continuation([user("Go on.")], tokenizer.eos_token_id)
    sampled = after.response_ids[after.turns[0].next_start : after.turns[1].end].tolist()
    assert after.context_ids.tolist() == [*rollout.context_ids, *sampled, *follows]


@pytest.mark.parametrize("ends", [False, True])
def test_with_turns_as_sequences_later_prompts_begin_with_the_newest_restart(ends):
    """Between ordinary steps, whose prompts are what came before; the template drops old thoughts, and has an
    argument."""
    tokenizer = with_template(templates.QWEN_3 + "{{ suffix or '' }}")
    first, again = [user("Again.")], [{"role": "system", "content": "Be brief."}, user("More.")]
    said = ["Go on.", Restart(first, ends=ends), "And?", Restart(again, ends=ends, options={"suffix": "!"}),
            Continuation([user("Now?")], {"suffix": "?"}), "So?"]  # fmt: skip
    texts = [f"<think>\nthought {place}\n</think>\n\nanswer {place}" for place in range(len(said))]
    answers = [assistant(text) for text in texts]
    environments = host(tokenizer, lambda: Beginning(*said), sequence="turn", max_tokens=4000)
    results = run(play(environments, asked(tokenizer), *texts))
    assert [rollout.context_ids.tolist() for rollout, _, _ in results] == [
        whole_prompt(tokenizer, QUESTION, answers[0], user("Go on.")),
        whole_prompt(tokenizer, *first),
        whole_prompt(tokenizer, *first, answers[2], user("And?")),
        whole_prompt(tokenizer, *again, suffix="!"),
        whole_prompt(tokenizer, *again, answers[4], user("Now?"), suffix="?"),
        whole_prompt(tokenizer, *again, answers[4], user("Now?"), answers[5], user("So?")),
    ]
    turns = results[-1][0].turns
    assert [turn.ends for turn in turns] == [False, ends, False, ends, False, False]
    assert all(turn.new_context for turn in turns)


def test_a_restart_may_begin_with_tokens_that_were_sampled_before():
    """They are not encoded again: another tokenization of the same text stays as it was sampled."""
    tokenizer = with_template(None)
    pieces = [token for letter in "hello" for token in tokenizer(letter)["input_ids"]]
    assert tokenizer.decode(pieces) == "hello"
    assert tokenizer("hello")["input_ids"] != pieces
    before = [*whole_prompt(tokenizer, QUESTION), *pieces, tokenizer.eos_token_id]
    restart = Restart([user("More.")], ends=True, token_ids=before)
    [(rollout, _, _)] = run(play(host(tokenizer, lambda: Beginning(restart)), asked(tokenizer), "one"))
    follows = make_rendering(tokenizer, chat=True).continuation([user("More.")], tokenizer.eos_token_id)
    assert rollout.context_ids.tolist() == [*before, *follows]
    assert decoded(tokenizer, rollout.context_ids).endswith(
        "hello<|im_end|>\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rollout.sampled_ids.tolist() == rollout.response_ids[: rollout.turns[0].end].tolist()


def test_the_first_prompt_may_be_a_restart():
    tokenizer = with_template(templates.CHATML.replace("message.content", "message.content + (suffix or '')"))
    environments = host(tokenizer, lambda: Beginning(first=Restart([user("Now")], ends=False, options={"suffix": "?"})))
    prompt, _ = run(environments.begin(asked(tokenizer)))
    assert prompt.token_ids.tolist() == whole_prompt(tokenizer, user("Now"), suffix="?")
    assert prompt.messages == [user("Now")]


@pytest.mark.parametrize(
    ("restart", "prompts", "reason"),
    [
        (Restart([user("a")], ends=True), PLAIN, 'set prompts.format = "chat"'),
        (Restart([3], ends=True), CHAT, "step returned the message 3"),
        (Restart([user("a")], ends=True, token_ids=[10**7]), CHAT, "step returned an observation that the model"),
        (Restart([user("a")], ends=True, token_ids=[]), CHAT, "the chat template refuses what step returned"),
    ],
)
def test_a_restart_that_cannot_become_tokens_voids_its_episode(restart, prompts, reason, monkeypatch):
    tokenizer = with_template(None)
    environments = host(tokenizer, lambda: Beginning(restart), prompts=prompts)
    monkeypatch.setattr(environments._transcript, "_vocabulary", len(tokenizer))
    [(_, void, _)] = run(play(environments, asked(tokenizer, prompts=prompts), "one"))
    assert isinstance(void, Void)
    assert reason in void.reason


def test_with_turns_as_sequences_a_restart_has_messages_alone():
    environments = host(
        with_template(None), lambda: Beginning(Restart([user("a")], ends=True, token_ids=[5])), sequence="turn"
    )
    [(_, void, _)] = run(play(environments, asked(with_template(None)), "one"))
    assert void.reason.endswith(
        'step returned a Restart with token_ids; with environment.sequence = "turn" a later turn needs the whole '
        "conversation as messages, so return these alone"
    )


def test_a_conversation_without_tokens_is_no_new_context():
    tokenizer = with_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    environments = host(tokenizer, lambda: Beginning(Restart([assistant("x")], ends=True)))
    [(_, void, _)] = run(play(environments, asked(tokenizer), "one"))
    assert "step returned a conversation without any token" in void.reason


def test_a_lost_process_continues_with_the_same_new_prompt():
    tokenizer = with_template(templates.QWEN_3)

    class Saving(Repeating):
        def state(self):
            return self.turn

        def restore(self, state):
            self.turn = state

    async def steps(*, lost):
        environments = host(tokenizer, Saving, sequence="turn")
        await environments.begin(asked(tokenizer))
        rollout, _, state = await environments.step(written(begun(asked(tokenizer)), "one"))
        if lost:
            environments = host(tokenizer, Saving, sequence="turn")
            _, restored = await environments.begin(asked(tokenizer), state)
            assert restored
        rollout, _, _ = await environments.step(written(rollout, "two"))
        return rollout

    whole, continued = run(steps(lost=False)), run(steps(lost=True))
    assert continued.response_ids.tolist() == whole.response_ids.tolist()
    assert [replace(turn, seconds=0) for turn in continued.turns] == [replace(turn, seconds=0) for turn in whole.turns]


def test_the_context_of_a_rollout_begins_at_its_newest_prompt():
    rollout = make_rollout(plain_prompt(), [10, 11, 12, 13, 14, 15, 16])
    turns = Turn(1, 3, 0.0, new_context=True), Turn(4, 5, 0.0, new_context=True), Turn(6, 7, 0.0)
    found = [replace(rollout, response_ids=rollout.response_ids[:n], turns=turns[:k]) for n, k in ((1, 0), (4, 1))]
    found.append(replace(rollout, turns=turns))
    assert [each.context_ids.tolist() for each in found] == [[3, 4, 5, 10], [11, 12, 13], [14, 15, 16]]
    assert [each.context_starts for each in found] == [[], [1], [1, 4]]
