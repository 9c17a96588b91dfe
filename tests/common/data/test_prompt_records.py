"""Prompts from records: reading, counting, cutting and refusing before a run starts."""

import json
import tomllib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.config.actors import PromptFormat, PromptsConfig
from common.config.reward_model import PairPromptsConfig, PreferencesConfig
from common.data.prompt_records import PromptCounts, load_records, prompt_record
from common.errors import UserError
from learner.loop.prompts import PromptStream, heldout_prompts
from tests.record_files import write

WORDS = ["<unk>", "<end>", "which", "is", "larger", "7", "9", "user", ":", "<s>", "assistant"]  # ids 0, 1, 2, ...
ROLES = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}"


@pytest.fixture
def tokenizer():
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", bos_token="<s>")


def adding(tokenizer, template):
    """The tokenizer with a post-processor, such as `<s> $A <end>`."""
    special = [(token, WORDS.index(token)) for token in ("<s>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer


def load(tmp_path, tokenizer, records, *, max_tokens=100, vocabulary=None, report=lambda text: None, **settings):
    """Prompts of records, or of a file's text."""
    path = tmp_path / "questions.jsonl"
    text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    cfg = PromptsConfig(train=str(path), **settings)
    return load_records(str(path), cfg, tokenizer, seed=0, max_tokens=max_tokens, vocabulary=vocabulary, report=report)


def refusal(tmp_path, tokenizer, records, **settings):
    with pytest.raises(UserError) as caught:
        load(tmp_path, tokenizer, records, **settings)
    return str(caught.value).removeprefix(f"{tmp_path}/questions.jsonl, ")


def said(*turns):
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2])]


def ids(text):
    return [WORDS.index(word) for word in text.split()]


# Reading prompts


def test_records_of_a_file_are_read_in_order(tmp_path, tokenizer):
    records = load(
        tmp_path,
        tokenizer,
        '{"prompt": "which is larger 7 9", "answer": 9, "prompt_kind": null}\n\n  \n{"prompt": "7 Grüße\u2028"}\n',
    )
    assert [r.text for r in records] == ["which is larger 7 9", "7 Grüße\u2028"]  # a line separator ends no line
    assert [r.token_ids.tolist() for r in records] == [[2, 3, 4, 5, 6], [5, 0]]
    assert [r.token_ids.dtype for r in records] == [np.int32, np.int32]
    assert [r.fields for r in records] == [{"answer": 9, "prompt_kind": None}, {}]


def test_a_function_makes_the_records_of_the_seed(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "made_prompts.py").write_text(
        "def train(seed): return [{'prompt': f'is {seed}'}, {'prompt': 'larger'}]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = "made_prompts:train"
    records = load_records(source, PromptsConfig(train=source), tokenizer, seed=7, max_tokens=5)
    assert [r.token_ids.tolist() for r in records] == [[3, 5], [4]]
    with pytest.raises(UserError, match="made_prompts:train, record 1: the prompt has 2 tokens"):
        load_records(source, PromptsConfig(train=source), tokenizer, seed=7, max_tokens=1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "is", "n": 1}, "the column `prompt` does not exist; the record has `question`, `n`; fix the "
         "record, or set prompts.columns.prompt"),
        ({"prompt": None}, "the column `prompt` is empty (null)"),
        ({"prompt": 7}, "`prompt` must be text or a list of chat messages, not 7"),
        ({"prompt": {"role": "user"}}, "`prompt` must be text or a list of chat messages, not {'role': 'user'}"),
        ({"prompt": "is \0"}, "`prompt` has the character NUL"),
        ({"prompt": "is \ud83d"}, "`prompt` has half of a surrogate pair ('\\ud83d' at character 4)"),
        ({"prompt": "is", "answer": float("inf")}, "`answer` cannot be written to the journal as JSON"),
    ],
)  # fmt: skip
def test_a_faulty_record_is_named_by_line(tmp_path, tokenizer, record, reason):
    message = refusal(tmp_path, tokenizer, [{"prompt": "is"}, record])
    assert message.startswith("line 2: ")
    assert reason in message


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, tokenizer, text):
    message = refusal(tmp_path, tokenizer, text)
    path = tmp_path / "questions.jsonl"
    assert message == f"prompts.train ({path}) has no usable prompt; it must have at least one"


def test_a_prompt_of_one_token_over_the_limit_is_refused(tmp_path, tokenizer):
    text = '{"prompt": "which is"}\n{"prompt": "which is larger"}\n'
    assert [len(r.token_ids) for r in load(tmp_path, tokenizer, text, max_tokens=3)] == [2, 3]
    message = refusal(tmp_path, tokenizer, text, max_tokens=2)
    assert message.startswith("line 2: the prompt has 3 tokens")
    assert "context allow 2; shorten it, raise prompts.max_tokens, lower sampling.max_new_tokens, or set" in message


def test_chat_messages_under_format_plain_are_refused(tmp_path, tokenizer):
    message = refusal(tmp_path, tokenizer, '{"prompt": [{"role": "user", "content": "is"}]}')
    assert 'line 1: `prompt` is a list of chat messages; set prompts.format = "chat"' in message


def test_format_chat_goes_through_the_tokenizers_template(tmp_path, tokenizer):
    tokenizer.chat_template = ROLES + "{% if add_generation_prompt %}assistant :{% endif %}"
    records = load(tmp_path, tokenizer, [{"prompt": said("user", "7 is")}, {"prompt": "7 is"}], format="chat")
    assert [r.text for r in records] == ["user : 7 is assistant :"] * 2  # bare text is one message of the user
    assert [r.token_ids.tolist() for r in records] == [ids("user : 7 is assistant :")] * 2


def test_a_chat_prompt_keeps_its_messages(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}:"
    dialogue = [
        {"role": "system", "content": "larger"},
        {"role": "user", "content": "7 is"},
        {"role": "assistant", "content": "is", "name": "9"},  # a key that this template does not look at
        {"role": "user", "content": "9"},
    ]
    lines = [json.dumps({"prompt": dialogue, "answer": 9}), '{"prompt": "7 is"}']
    records = load(tmp_path, tokenizer, "\n".join(lines), format="chat")
    assert [r.messages for r in records] == [dialogue, [{"role": "user", "content": "7 is"}]]
    assert [r.text for r in records] == ["larger 7 is is 9 :", "7 is :"]
    assert [r.fields for r in records] == [{"answer": 9}, {}]
    assert [p.messages for p in heldout_prompts(records, 2)] == [dialogue, [{"role": "user", "content": "7 is"}]]
    prompts = PromptStream(records, seed=0, rollouts_per_prompt=2)
    issued = [prompts.next() for _ in range(4)]
    assert [p.messages for p in issued] == [records[p.sample_id.prompt].messages for p in issued]

    assert load(tmp_path, tokenizer, '{"prompt": "7 is"}')[0].messages is None


def test_prompts_for_pairs_are_read_like_prompts_for_training(tmp_path, tokenizer):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "7 is", "answer": 7}\n')
    (record,) = load_records(str(path), PairPromptsConfig(source=str(path)), tokenizer, seed=0, max_tokens=2)
    assert (record.text, record.token_ids.tolist(), record.fields) == ("7 is", [5, 3], {"answer": 7})


@pytest.mark.parametrize(
    ("record", "format", "reason"),
    [
        ({"prompt": said("user", "is")}, "plain", 'set prompts.format = "chat"'),
        ({"prompt": "is"}, "chat", "the tokenizer's chat template refuses the prompt"),  # it has none
        ({"prompt": "is", "answer": {9}}, "plain", "`answer` cannot be written to the journal as JSON"),
    ],
)
def test_a_faulty_record_is_named_by_its_origin(tokenizer, record, format, reason):
    with pytest.raises(UserError) as caught:
        prompt_record("the prompt of pair 7", record, PromptFormat(format=format), tokenizer)
    assert str(caught.value).startswith("the prompt of pair 7: ")
    assert reason in str(caught.value)


def test_special_tokens_are_added_to_plain_text_only(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<end> $A", special_tokens=[("<end>", 1)]
    )
    tokenizer.chat_template = "<end>{{ messages[0].content }}"  # writes its own
    text = '{"prompt": "7 is"}\n'
    for format in ("plain", "chat"):
        assert load(tmp_path, tokenizer, text, format=format)[0].token_ids.tolist() == [1, 5, 3]


def test_a_missing_or_failing_template_is_refused_by_line(tmp_path, tokenizer):
    text = '{"prompt": [{"role": "user", "content": "is"}]}'
    reason = "line 1: the tokenizer's chat template refuses the prompt"
    assert reason in refusal(tmp_path, tokenizer, text, format="chat")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    assert "no system role" in refusal(tmp_path, tokenizer, text, format="chat")


@pytest.mark.parametrize("format", ["plain", "chat"])
@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.json", "p.csv", "p.parquet"])
def test_every_file_format_gives_the_same_prompts(tmp_path, tokenizer, name, format):
    tokenizer.chat_template = ROLES
    random = Random(name)

    def text():
        return " ".join(random.choices(WORDS[2:9], k=random.randint(1, 9)))

    prompts = [said("system", text(), "user", text()) if format == "chat" else text() for _ in range(50)]
    rows = [{"prompt": prompt, "answer": text(), "n": "7"} for prompt in prompts]
    expected, cfg = load(tmp_path, tokenizer, rows, format=format), PromptsConfig(train="", format=format)
    found = load_records(write(tmp_path / name, rows), cfg, tokenizer, seed=0, max_tokens=100)
    assert [(r.text, r.messages, r.fields) for r in found] == [(r.text, r.messages, r.fields) for r in expected]
    assert [r.token_ids.tolist() for r in found] == [r.token_ids.tolist() for r in expected]


# The beginning and the end of a prompt


@pytest.mark.parametrize("template", ["$A <end>", "<s> $A <end>", "<s> $A <end> <end>", "<s> $A"])
def test_added_tokens_before_a_prompt_stay_and_those_after_it_go(tmp_path, tokenizer, template):
    adding(tokenizer, template)
    (record,) = load(tmp_path, tokenizer, [{"prompt": "7 is"}])
    assert record.token_ids.tolist() == ids("<s> 7 is" if template.startswith("<s>") else "7 is")
    assert record.text == "7 is"


@pytest.mark.parametrize("text", ["<s> 7 is", "7 is", " <s> <s> 7 is"])
def test_bos_is_never_doubled(tmp_path, tokenizer, text):
    adding(tokenizer, "<s> $A")
    tokenizer.chat_template = "{{ bos_token + ' ' + messages[0].content }}"
    for format in ("plain", "chat"):
        (record,) = load(tmp_path, tokenizer, [{"prompt": text}], format=format)
        assert record.token_ids.tolist() == ids("<s> 7 is")


def test_unknown_words_stay_where_bos_is_the_unknown_token(tmp_path, tokenizer):
    tokenizer.bos_token = "<unk>"
    assert load(tmp_path, tokenizer, [{"prompt": "what now 7"}])[0].token_ids.tolist() == ids("<unk> <unk> 7")


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_an_end_token_at_the_end_is_refused_removed_or_kept(tmp_path, tokenizer, format):
    tokenizer.chat_template = "{{ messages[0].content }}"
    records = [{"prompt": "7 is"}, {"prompt": "7 <end> is <end> <end>"}]
    origin = {"plain": "text", "chat": "chat template"}[format]
    message = refusal(tmp_path, tokenizer, records, format=format)
    assert message.startswith(f"line 2: the {origin} ends the prompt with the end token '<end>'")
    found = load(tmp_path, tokenizer, records, format=format, last_end_token="remove")[1]
    assert (found.text.rstrip(), found.token_ids.tolist()) == ("7 <end> is", ids("7 <end> is"))
    found = load(tmp_path, tokenizer, records, format=format, last_end_token="keep")[1]
    assert found.token_ids.tolist() == ids("7 <end> is <end> <end>")


def test_a_token_beyond_the_embedding_is_refused_by_line(tmp_path, tokenizer):
    records = [{"prompt": "7 is"}, {"prompt": "7 : 9"}]  # `:` is token 8
    assert len(load(tmp_path, tokenizer, records, vocabulary=9)) == 2
    message = refusal(tmp_path, tokenizer, records, vocabulary=8)
    assert message.startswith("line 2: it has ':', token 8, but the model's embedding has 8 rows")


# A last message of the assistant

ANSWERED = said("user", "7", "assistant", "is larger")


def test_a_last_message_of_the_assistant_is_refused_removed_or_continued(tmp_path, tokenizer):
    tokenizer.chat_template = ROLES + "{% if add_generation_prompt %}assistant :{% endif %}"
    records = [{"prompt": said("user", "9")}, {"prompt": ANSWERED}]
    message = refusal(tmp_path, tokenizer, records, format="chat")
    assert message.startswith("line 2: the prompt ends with a message of the assistant")
    assert 'prompts.last_assistant = "remove"' in message
    removed = load(tmp_path, tokenizer, records, format="chat", last_assistant="remove")[1]
    assert (removed.text, removed.messages) == ("user : 7 assistant :", ANSWERED[:1])
    continued = load(tmp_path, tokenizer, records, format="chat", last_assistant="continue")[1]
    assert (continued.text, continued.messages) == ("user : 7 assistant : is larger", ANSWERED)
    assert continued.token_ids.tolist() == ids("user : 7 assistant : is larger")


def test_a_prompt_with_only_the_removed_message_counts_as_empty(tmp_path, tokenizer):
    tokenizer.chat_template = ROLES
    records = [{"prompt": ANSWERED[1:]}]
    assert "1 empty" in refusal(tmp_path, tokenizer, records, format="chat", last_assistant="remove")


# Dropping, cutting and counting


def test_long_prompts_are_dropped_or_cut_and_counted(tmp_path, tokenizer):
    adding(tokenizer, "<s> $A")
    records = [{"prompt": "7 is"}, {"prompt": "which is larger 7", "n": 2}]
    reports = []
    found = load(tmp_path, tokenizer, records, max_tokens=4, overlong="drop", report=reports.append)
    assert [r.text for r in found] == ["7 is"]
    found = load(tmp_path, tokenizer, records, max_tokens=4, overlong="cut_start", report=reports.append)
    assert [r.token_ids.tolist() for r in found] == [ids("<s> 7 is"), ids("<s> is larger 7")]
    assert [(r.text, r.fields) for r in found] == [("7 is", {}), ("is larger 7", {"n": 2})]
    source = f"prompts.train ({tmp_path}/questions.jsonl)"
    assert reports == [
        f"{source}: 1 prompts; dropped: 0 empty, 1 too long",
        f"{source}: 2 prompts, 1 of them cut to length; dropped: 0 empty, 0 too long",
    ]


def test_a_cut_chat_prompt_keeps_its_messages(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ bos_token }} " + ROLES + "assistant :"
    messages = said("user", "which is larger 7")
    (found,) = load(tmp_path, tokenizer, [{"prompt": messages}], format="chat", max_tokens=5, overlong="cut_start")
    assert found.token_ids.tolist() == ids("<s> larger 7 assistant :")
    assert (found.text, found.messages) == ("<s> larger 7 assistant :", messages)


def test_empty_prompts_are_dropped_and_repeated_ones_kept(tmp_path, tokenizer):
    tokenizer.chat_template = ROLES
    records = [
        {"prompt": p} for p in ("is", "", " \n", [], said("user", " "), "is", said("user", "7", "user", ""), "7")
    ]
    reports = []
    found = load(tmp_path, tokenizer, records, format="chat", report=reports.append)
    assert [r.text for r in found] == ["user : is ", "user : is ", "user : 7 "]
    (report,) = reports
    assert report.endswith("3 prompts, 1 of them repeat an earlier one; dropped: 5 empty, 0 too long")
    load(tmp_path, tokenizer, [{"prompt": "is"}], report=reports.append)
    assert len(reports) == 1  # nothing to tell


def test_when_no_prompt_is_left_the_message_says_why(tmp_path, tokenizer):
    records = [{"prompt": ""}, {"prompt": "which is larger"}, {"prompt": "7 is larger"}]
    message = refusal(tmp_path, tokenizer, records, max_tokens=2, overlong="drop")
    assert "has no usable prompt (0 prompts" in message
    assert "dropped: 1 empty, 2 too long" in message
    assert not PromptCounts(prompts=3).notable


# Columns and fields


def test_another_column_is_the_prompt_and_the_rest_are_fields(tmp_path, tokenizer):
    records = [{"question": "7 is", "prompt": "no prompt", "n": [1, None, {"a": 0.5}]}]
    (found,) = load(tmp_path, tokenizer, records, columns={"prompt": "question"})
    assert (found.text, found.fields) == ("7 is", {"prompt": "no prompt", "n": [1, None, {"a": 0.5}]})


def test_nan_in_a_field_is_no_value(tmp_path, tokenizer):
    nan = float("nan")
    (found,) = load(tmp_path, tokenizer, [{"prompt": "is", "a": nan, "b": {"c": [1.5, nan]}, "d": 1}])
    assert found.fields == {"a": None, "b": {"c": [1.5, None]}, "d": 1}


def test_the_settings_named_in_the_data_page_exist():
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    tree = tomllib.loads(page.partition("## Columns")[2].split("```toml\n")[1].split("```")[0])
    assert PromptsConfig(**tree["prompts"]).columns.prompt == "question"
    assert PreferencesConfig(**tree["data"]).columns.chosen == "better"


TOOL = {"type": "function", "function": {"name": "larger", "description": "d", "parameters": {"type": "object"}}}


def test_the_chat_template_gets_the_tools(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.function.name + ' ' }}{% endfor %}" + ROLES
    path = write(tmp_path / "questions.jsonl", [{"prompt": "which is"}])
    cfg, reports = PromptsConfig(train=path, format="chat"), []
    (record,) = load_records(path, cfg, tokenizer, seed=0, max_tokens=9, tools=[TOOL], report=reports.append)
    assert (record.text, reports) == ("larger user : which is ", [])
    assert record.token_ids.tolist() == ids("larger user : which is")


def test_a_chat_template_that_ignores_tools_is_reported_once(tmp_path, tokenizer):
    tokenizer.chat_template = ROLES
    cfg = PromptsConfig(train="", format="chat")

    def reports(name, *prompts):
        found, path = [], write(tmp_path / name, [{"prompt": prompt} for prompt in prompts])
        load_records(path, cfg, tokenizer, seed=0, max_tokens=9, tools=[TOOL], report=found.append)
        return found

    assert reports("silent.jsonl", "which", "is") == [
        "prompts.train: no tool is named in the first prompt, because the model's chat template ignores tools; "
        "describe them in the prompts, with an example of a call"
    ]
    assert reports("described.jsonl", "is larger", "which") == []
