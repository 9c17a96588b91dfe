"""Tokens of continuations: a conversation by turns has the tokens that it has as a whole, for several templates."""

import json
import random

import pytest

from actors.environments.rendering import (
    NEXT,
    TOOL_ANSWERS,
    check_conversations,
    check_template,
    continued_ids,
    make_rendering,
)
from common.data.prompt_tokens import bare_ids, rendered, rendered_ids
from common.errors import UserError
from tests.actors.environments import templates
from tests.actors.environments.templates import with_template

# Per template: its tokenizer, and what it writes before an answer that is not a part of the prompt.
GOOD = {
    "SmolLM2": (lambda: with_template(None), ""),
    "ChatML": (lambda: with_template(templates.CHATML), ""),
    "ChatML without a last line break": (lambda: with_template(templates.OPEN_ENDED), ""),
    "ChatML of a model that ends with another token": (
        lambda: with_template(templates.CHATML, end="<|endoftext|>"),
        "",
    ),
    "Llama 3": (templates.llama_3, ""),
    "Mistral": (lambda: with_template(templates.MISTRAL, end="</s>", bos="<s>"), " "),
    "Mistral with SentencePiece": (lambda: with_template(templates.MISTRAL, end="</s>", bos="<s>", pieces=True), " "),
    "Zephyr": (lambda: with_template(templates.ZEPHYR, end="</s>"), ""),
    "Gemma": (lambda: with_template(templates.GEMMA, end="<end_of_turn>", bos="<s>"), ""),
}
ENDS = {"ChatML of a model that ends with another token": "<|im_end|>"}
TEXTS = ["Hello.", "4", "It's 12 + 30, isn't it?", "a\n\nb", "Yes, I do so", "def f_x", "good bad cab"]


def conversation(random, *, only_user):
    """A question, then turns of an answer and messages of the environment."""
    turns = []
    for _ in range(random.randint(1, 4)):
        roles = ["user"] if only_user else random.choices(["user", "tool", "system"], k=random.randint(1, 3))
        turns.append((random.choice(TEXTS), [{"role": role, "content": random.choice(TEXTS)} for role in roles]))
    return {"role": "user", "content": random.choice(TEXTS)}, turns


@pytest.mark.parametrize("name", GOOD)
def test_turns_have_the_tokens_of_the_whole_conversation(name):
    make, before_answer = GOOD[name]
    tokenizer, chance = make(), random.Random(name)
    end = tokenizer.convert_tokens_to_ids(ENDS.get(name, tokenizer.eos_token))
    rendering = make_rendering(tokenizer, chat=True)
    for _ in range(40):
        question, turns = conversation(chance, only_user=name.startswith("Mistral"))
        whole = [question]
        ids = rendered_ids(tokenizer, rendered(tokenizer, whole, add_generation_prompt=True))
        for answer, observation in turns:
            # Sampled, but sometimes cut off before the end token.
            ids += continued_ids(tokenizer, before_answer + answer) + ([end] if chance.random() < 0.7 else [])
            ids += rendering.continuation(observation, ids[-1])
            whole += [{"role": "assistant", "content": answer}, *observation]
        assert ids == rendered_ids(tokenizer, rendered(tokenizer, whole, add_generation_prompt=True))


@pytest.mark.parametrize("name", GOOD)
def test_a_template_that_keeps_earlier_messages_passes_the_check(name):
    check_template(GOOD[name][0](), "org/model")


# Per template: its tokenizer, and the most calls of a message.
CALLING = {
    "Mistral": (lambda: with_template(templates.MISTRAL_WITH_TOOLS, end="</s>", bos="<s>"), 3),
    "Llama 3": (lambda: templates.llama_3(templates.LLAMA_3_WITH_TOOLS), 1),
    "DeepSeek": (lambda: with_template(templates.DEEPSEEK), 1),
}


def called(form, number, text):
    """A call and its answer."""
    call = {"type": "function", "id": f"call{number:05d}", "function": {"name": f"f{number}", "arguments": form(text)}}
    return call, {"role": "tool", "name": f"f{number}", "tool_call_id": call["id"], "content": text[::-1]}


@pytest.mark.parametrize("name", CALLING)
def test_answers_of_tools_have_the_tokens_of_a_conversation_with_the_calls(name):
    make, most = CALLING[name]
    tokenizer, chance = make(), random.Random(name)
    ends = tokenizer.convert_tokens_to_ids(["<|eom_id|>"] if name == "Llama 3" else [])
    rendering = make_rendering(tokenizer, chat=True, end_tokens=ends)
    form = (lambda text: json.dumps({"x": text})) if name == "DeepSeek" else (lambda text: {"x": text})
    for _ in range(20):
        whole = [{"role": "user", "content": chance.choice(TEXTS)}]
        before = rendered(tokenizer, whole, add_generation_prompt=True)
        ids = rendered_ids(tokenizer, before)
        for turn in range(chance.randint(1, 3)):
            pairs = [called(form, 10 * turn + i, chance.choice(TEXTS)) for i in range(chance.randint(1, most))]
            whole.append({"role": "assistant", "content": "", "tool_calls": [call for call, _ in pairs]})
            # The model samples its message as the template writes it.
            ids += continued_ids(tokenizer, rendered(tokenizer, whole).removeprefix(before))
            whole += [answer for _, answer in pairs]
            ids += rendering.continuation([answer for _, answer in pairs], ids[-1])
            before = rendered(tokenizer, whole, add_generation_prompt=True)
        assert ids == rendered_ids(tokenizer, before)


@pytest.mark.parametrize("name", CALLING)
def test_a_template_that_demands_or_ends_calls_in_its_own_way_passes_the_check(name):
    make, most = CALLING[name]
    answers = [[called(str, number, "A text.")[1] for number in range(count)] for count in range(1, most + 1)]
    check_template(make(), "org/model", answers)


@pytest.mark.parametrize("name", CALLING)
def test_a_template_that_demands_calls_can_write_each_turn_anew_with_them(name):
    make, most = CALLING[name]
    answers = [[called(str, number, "A text.")[1] for number in range(count)] for count in range(1, most + 1)]
    check_conversations(make(), "org/model", answers, calls=True)
    if name != "Llama 3":  # the only one that writes an answer without a call
        with pytest.raises(UserError, match="refuses a conversation of several turns"):
            check_conversations(make(), "org/model", answers)


def test_a_call_that_was_cut_off_gets_the_end_token_of_the_template():
    tokenizer = CALLING["Mistral"][0]()
    rendering = make_rendering(tokenizer, chat=True)
    said = "[TOOL_RESULTS] ollA call00003[/TOOL_RESULTS]"
    _, answer = called(str, 3, "Allo")
    found = {last: tokenizer.decode(rendering.continuation([answer], last)) for last in (tokenizer.eos_token_id, 5)}
    assert found == {tokenizer.eos_token_id: said, 5: f"</s>{said}"}


def test_any_end_token_of_the_model_stands_for_the_templates():
    """Llama 3.1 ends a call of a tool with <|eom_id|>, and an answer with <|eot_id|>."""
    tokenizer = templates.llama_3()
    eom, eot, word = tokenizer.convert_tokens_to_ids(["<|eom_id|>", "<|eot_id|>", "a"])
    rendering = make_rendering(tokenizer, chat=True, end_tokens=[eom, eot])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    follows = f"{header.format('ipython')}4<|eot_id|>{header.format('assistant')}"
    tool = [{"role": "tool", "content": "4"}]
    found = {last: tokenizer.decode(rendering.continuation(tool, last)) for last in (eom, eot, word, None)}
    assert found == {eom: follows, eot: follows, word: f"<|eot_id|>{follows}", None: f"<|eot_id|>{follows}"}


def test_a_template_without_end_tokens_closes_the_answer_with_its_text():
    tokenizer = with_template(templates.WORDS_ONLY, end="<|endoftext|>")
    check_template(tokenizer, "org/model")
    rendering = make_rendering(tokenizer, chat=True)
    for last in (tokenizer.eos_token_id, 5):
        text = tokenizer.decode(rendering.continuation([{"role": "user", "content": "And?"}], last))
        assert text == "\n\nUser: And?\n\nAssistant:"


def test_nothing_said_still_closes_the_answer_and_begins_the_next_one():
    rendering = make_rendering(with_template(templates.CHATML), chat=True)
    tokenizer = with_template(templates.CHATML)
    assert tokenizer.decode(rendering.continuation([], tokenizer.eos_token_id)) == "\n<|im_start|>assistant\n"


def test_the_arguments_of_the_template_are_passed_on():
    template = templates.CHATML.replace("message.content", "message.content + (suffix or '')")
    tokenizer = with_template(template)
    rendering = make_rendering(tokenizer, chat=True, suffix="!")
    text = tokenizer.decode(rendering.continuation([{"role": "user", "content": "Go"}], tokenizer.eos_token_id))
    assert text == "\n<|im_start|>user\nGo!<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("text", [*TEXTS, "", " a", "\na"])
def test_a_plain_observation_is_added_unchanged(pieces, text):
    tokenizer = with_template(None, end="</s>", pieces=pieces)
    rendering = make_rendering(tokenizer, chat=False)
    ids = rendering.continuation([{"role": "user", "content": text}], tokenizer.eos_token_id)
    assert tokenizer.bos_token_id not in ids
    before = bare_ids(tokenizer, ["go\n"])[0]
    assert tokenizer.decode([*before, *ids]) == tokenizer.decode(before) + text


BAD = {
    "Qwen 3": (lambda: with_template(templates.QWEN_3), [NEXT], "drops the reasoning (<think>) of earlier answers"),
    "a prompt that begins a thought": (lambda: with_template(templates.THINKS_FIRST), [NEXT], "changes or drops"),
    "numbered rounds": (lambda: with_template(templates.NUMBERED), [NEXT], "changes or drops earlier messages"),
    "only the last messages": (lambda: with_template(templates.FORGETFUL), [NEXT], "changes or drops"),
    "no tool messages": (
        lambda: with_template(templates.MISTRAL, end="</s>", bos="<s>"),
        [{"role": "tool", "content": "4"}],
        "refuses a conversation of several turns: roles must alternate",
    ),
    "calls, after a question with the number of messages": (
        lambda: with_template(templates.MISTRAL_WITH_TOOLS.replace("'[INST] '", "messages | length ~ '[INST] '")),
        [{"role": "tool", "tool_call_id": "call00000", "content": "4"}],
        "changes or drops earlier messages",
    ),
    "no template": (lambda: with_template(""), [NEXT], "refuses a conversation of several turns"),
    "answers left out": (
        lambda: with_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        [NEXT],
        "it leaves out what the assistant says",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_another_template_is_refused_with_the_models_name_and_a_remedy(name):
    make, observation, reason = BAD[name]
    with pytest.raises(UserError) as caught:
        check_template(make(), "org/model", [observation])
    message = str(caught.value)
    assert message.startswith("environment: the chat template of org/model ")
    assert reason in message
    assert message.endswith(', or use prompts.format = "plain"')
    # Only one of them also refuses answers of tools to a message without calls.
    anew = "refuses" not in message and name != "calls, after a question with the number of messages"
    assert ('set environment.sequence = "turn"' in message) == anew


@pytest.mark.parametrize(
    ("template", "calls", "remedies"),
    [
        (
            templates.MISTRAL_WITH_TOOLS.replace("'[INST] '", "messages | length ~ '[INST] '"),
            True,
            'set environment.sequence = "turn", or give the model a chat_template that keeps earlier messages '
            "unchanged (in m, chat_template.jinja or tokenizer_config.json)",
        ),
        (
            templates.MISTRAL_WITH_TOOLS.replace("'[INST] '", "messages | length ~ '[INST] '"),
            False,
            "give the model a chat_template that keeps earlier messages unchanged (in m, chat_template.jinja or "
            "tokenizer_config.json)",
        ),
        (templates.MISTRAL, True, "give the model another chat_template"),
    ],
)
def test_a_refusal_of_tools_names_the_remedies_that_help(template, calls, remedies):
    tokenizer = with_template(template, end="</s>", bos="<s>")
    with pytest.raises(UserError) as caught:
        check_template(tokenizer, "m", TOOL_ANSWERS, calls=calls, plain=False)
    assert str(caught.value).partition("; ")[2] == remedies
    if "sequence" in remedies:
        check_conversations(tokenizer, "m", TOOL_ANSWERS, calls=calls, plain=False)
    else:
        with pytest.raises(UserError):
            check_conversations(tokenizer, "m", TOOL_ANSWERS, calls=calls, plain=False)


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_changes_earlier_messages_can_write_each_turn_anew(name):
    make, observation, reason = BAD[name]
    if "refuses" not in reason:
        check_conversations(make(), "org/model", [observation], calls=True)
    else:
        with pytest.raises(UserError, match="chat template of org/model refuses a conversation of several turns"):
            check_conversations(make(), "org/model", [observation], calls=True)


def test_qwen_3_keeps_its_reasoning_between_calls_of_tools():
    tokenizer = with_template(templates.QWEN_3)
    observation = [{"role": "tool", "content": "4"}]
    check_template(tokenizer, "org/model", [observation])
    text = tokenizer.decode(make_rendering(tokenizer, chat=True).continuation(observation, tokenizer.eos_token_id))
    assert text == ("\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
