"""The prompt stream's order, its state, and what is refused before a run starts."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.config import PromptFormat, PromptsConfig, UserError
from common.prompts import PromptRecord, PromptStream, heldout_prompts, load_records, prompt_record
from common.reward_config import PairPromptsConfig
from common.types import SampleId

WORDS = ["<unk>", "<end>", "which", "is", "larger", "7", "9", "user", ":"]  # ids 0, 1, 2, ...


@pytest.fixture
def tokenizer():
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")


def said(index):
    return [{"role": "user", "content": f"question {index}"}]


def stream(*, prompts=5, seed=0, rollouts_per_prompt=1):
    records = [
        PromptRecord(f"question {i}", np.array([i], np.int32), {"answer": i}, said(i) if i % 2 else None)
        for i in range(prompts)
    ]
    return PromptStream(records, seed=seed, rollouts_per_prompt=rollouts_per_prompt)


def take(prompts, count):
    return [prompts.next().sample_id for _ in range(count)]


def load(tmp_path, tokenizer, text, *, format="plain", max_tokens=100):
    path = tmp_path / "questions.jsonl"
    path.write_text(text, encoding="utf-8")
    return load_records(
        str(path), PromptsConfig(train=str(path), format=format), tokenizer, seed=0, max_tokens=max_tokens
    )


def refusal(tmp_path, tokenizer, text, **settings):
    with pytest.raises(UserError) as caught:
        load(tmp_path, tokenizer, text, **settings)
    return str(caught.value)


# The stream


def test_the_order_is_a_function_of_the_seed():
    assert take(stream(seed=3), 20) == take(stream(seed=3), 20)
    assert take(stream(prompts=50, seed=3), 50) != take(stream(prompts=50, seed=4), 50)


def test_each_epoch_is_a_permutation_of_all_prompts_and_epochs_differ():
    ids = take(stream(prompts=20), 60)
    epochs = [ids[:20], ids[20:40], ids[40:]]
    assert [[i.epoch for i in epoch] for epoch in epochs] == [[0] * 20, [1] * 20, [2] * 20]
    orders = [[i.prompt for i in epoch] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_prompt_is_issued_rollouts_per_prompt_times_in_a_row():
    ids = take(stream(prompts=4, rollouts_per_prompt=3), 24)
    assert [i.replica for i in ids] == [0, 1, 2] * 8
    assert [i.epoch for i in ids] == [0] * 12 + [1] * 12
    runs = [ids[k : k + 3] for k in range(0, 24, 3)]
    assert all(len({(i.epoch, i.prompt) for i in run}) == 1 for run in runs)
    assert sorted(run[0].prompt for run in runs[:4]) == [0, 1, 2, 3]
    assert len(set(ids)) == 24


def test_the_order_of_prompts_does_not_depend_on_rollouts_per_prompt():
    single = [i.prompt for i in take(stream(prompts=9), 18)]
    assert [i.prompt for i in take(stream(prompts=9, rollouts_per_prompt=2), 36)[::2]] == single


def test_a_prompt_carries_the_record_that_its_id_names():
    prompts = stream()
    for _ in range(5):
        prompt = prompts.next()
        index = prompt.sample_id.prompt
        assert (prompt.text, prompt.token_ids.tolist(), prompt.fields) == (
            f"question {index}",
            [index],
            {"answer": index},
        )
        assert prompt.messages == (said(index) if index % 2 else None)


def test_settled_samples_leave_the_state_and_the_others_stay_in_order_of_issue():
    prompts = stream()
    ids = take(prompts, 5)
    prompts.settle([ids[3], ids[0]])
    state = prompts.state()
    assert (state["issued"], state["outstanding"]) == (5, [[1, 3], [4, 5]])
    assert prompts.outstanding == [ids[1], ids[2], ids[4]]
    prompts.settle(ids[1:3] + ids[4:])
    assert (prompts.state()["outstanding"], prompts.outstanding) == ([], [])


def test_the_state_does_not_grow_with_what_is_outstanding():
    prompts = stream(rollouts_per_prompt=1)
    ids = take(prompts, 20_000)
    prompts.settle(ids[:64])
    assert prompts.state()["outstanding"] == [[64, 20_000]]


def test_settling_what_is_not_outstanding_is_an_error():
    prompts = stream()
    ids = take(prompts, 2)
    prompts.settle(ids[:1])
    for unknown in (ids[0], SampleId(9, 0, 0)):  # trained twice; never issued
        with pytest.raises(KeyError):
            prompts.settle([unknown])


def test_what_is_given_back_is_asked_next_and_stays_outstanding():
    once = stream(rollouts_per_prompt=1)
    issued = [once.next().sample_id for _ in range(4)]
    once.settle([issued[0]])
    once.give_back([issued[1], issued[3]])
    assert once.outstanding == issued[1:]
    assert [once.next().sample_id for _ in range(2)] == [issued[1], issued[3]]
    assert once.next().sample_id not in issued
    restored = stream(rollouts_per_prompt=1)
    restored.restore(once.state())
    assert restored.next().sample_id == issued[1]


def test_a_restored_stream_reissues_the_outstanding_in_order_and_goes_on_as_the_uninterrupted_one():
    uninterrupted = take(stream(rollouts_per_prompt=2), 60)
    prompts = stream(rollouts_per_prompt=2)
    ids = take(prompts, 17)  # in the middle of epoch 1, between two replicas
    prompts.settle([i for i in ids if i not in (ids[2], ids[7], ids[16])])
    state = json.loads(json.dumps(prompts.state()))  # as the journal keeps it

    restored = stream(rollouts_per_prompt=2)
    restored.restore(state)
    assert restored.state() == state
    reissued = [restored.next() for _ in range(3)]
    assert [p.sample_id for p in reissued] == [ids[2], ids[7], ids[16]]
    assert [p.text for p in reissued] == [f"question {i.prompt}" for i in (ids[2], ids[7], ids[16])]
    assert [p.messages for p in reissued] == [
        said(i.prompt) if i.prompt % 2 else None for i in (ids[2], ids[7], ids[16])
    ]
    assert restored.state() == state  # issued again, still outstanding
    assert take(restored, 43) == uninterrupted[17:]
    restored.settle([ids[7]])
    assert restored.outstanding == [ids[2], ids[16], *uninterrupted[17:]]


def test_a_state_taken_while_reissuing_restores_to_the_same_outstanding_samples():
    prompts = stream()
    ids = take(prompts, 4)
    once = stream()
    once.restore(prompts.state())
    once.next()  # a second crash after one of four
    twice = stream()
    twice.restore(once.state())
    assert take(twice, 5) == [*ids, *take(stream(), 5)[4:]]


def test_a_fresh_state_restores_to_the_whole_stream():
    restored = stream(seed=2)
    restored.restore(stream(seed=2).state())
    assert take(restored, 12) == take(stream(seed=2), 12)


def test_a_state_of_other_prompts_is_refused():
    prompts = stream(prompts=5)
    take(prompts, 5)
    with pytest.raises(UserError):
        stream(prompts=3).restore(prompts.state())


def test_heldout_prompts_are_the_first_ones_under_ids_no_training_stream_issues():
    records = [
        PromptRecord("q0", np.array([0], np.int32), {"answer": 0}),
        PromptRecord("q1", np.array([1], np.int32), {"answer": 1}, said(1)),
        PromptRecord("q2", np.array([2], np.int32), {"answer": 2}),
    ]
    prompts = heldout_prompts(records, 2)
    assert [(p.sample_id, p.text, p.fields, p.messages) for p in prompts] == [
        (SampleId(-1, 0, 0), "q0", {"answer": 0}, None),
        (SampleId(-1, 1, 0), "q1", {"answer": 1}, said(1)),
    ]
    assert [p.token_ids.tolist() for p in prompts] == [[0], [1]]
    assert len(heldout_prompts(records, 9)) == 3


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


def test_records_of_a_function_are_those_of_the_seed(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "made_prompts.py").write_text(
        "def train(seed): return [{'prompt': f'is {seed}'}, {'prompt': 'larger'}]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = "made_prompts:train"
    records = load_records(source, PromptsConfig(train=source), tokenizer, seed=7, max_tokens=5)
    assert [r.token_ids.tolist() for r in records] == [[3, 5], [4]]
    with pytest.raises(UserError, match="made_prompts:train, record 0: the prompt has 2 tokens"):
        load_records(source, PromptsConfig(train=source), tokenizer, seed=7, max_tokens=1)


@pytest.mark.parametrize("line", ['{"prompt": "is"', "prompt: is", '{"prompt": "is"} {"prompt": "is"}'])
def test_a_broken_json_line_is_named_by_number(tmp_path, tokenizer, line):
    message = refusal(tmp_path, tokenizer, f'{{"prompt": "is"}}\n\n{line}\n{{"prompt": "is"}}\n')
    assert f"{tmp_path / 'questions.jsonl'}, line 3: not valid JSON" in message
    assert "mend or remove the line" in message


@pytest.mark.parametrize("record", ['{"question": "is"}', '{"prompt": ""}', '{"prompt": []}', '{"prompt": 7}', '"is"'])
def test_a_record_without_a_prompt_is_named_by_line(tmp_path, tokenizer, record):
    message = refusal(tmp_path, tokenizer, f'{{"prompt": "is"}}\n{record}\n')
    assert "questions.jsonl, line 2: a record must be an object with text or chat messages under `prompt`" in message


def test_a_prompt_without_a_single_token_is_refused(tmp_path, tokenizer):
    assert "line 1" in refusal(tmp_path, tokenizer, '{"prompt": "  "}\n')


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, tokenizer, text):
    message = refusal(tmp_path, tokenizer, text)
    assert message == f"{tmp_path / 'questions.jsonl'} holds no prompts; it must give at least one"


def test_a_missing_file_is_refused_by_name(tokenizer):
    with pytest.raises(UserError, match=r"prompt file nowhere\.jsonl cannot be read .* under \[prompts\]"):
        load_records("nowhere.jsonl", PromptsConfig(train="nowhere.jsonl"), tokenizer, seed=0, max_tokens=5)


def test_a_prompt_at_the_limit_is_accepted_and_one_token_more_refused(tmp_path, tokenizer):
    text = '{"prompt": "which is"}\n{"prompt": "which is larger"}\n'
    assert [len(r.token_ids) for r in load(tmp_path, tokenizer, text, max_tokens=3)] == [2, 3]
    message = refusal(tmp_path, tokenizer, text, max_tokens=2)
    assert "questions.jsonl, line 2: the prompt has 3 tokens" in message
    assert "(2); shorten it, raise prompts.max_tokens, or lower sampling.max_new_tokens" in message


def test_chat_messages_under_format_plain_are_refused_with_the_setting_to_change(tmp_path, tokenizer):
    message = refusal(tmp_path, tokenizer, '{"prompt": [{"role": "user", "content": "is"}]}')
    assert 'line 1: `prompt` is a list of chat messages; set prompts.format = "chat"' in message


def test_format_chat_goes_through_the_tokenizers_template(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' : ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %} <end>{% endif %}"
    )
    messages = '{"prompt": [{"role": "user", "content": "7 is"}]}\n{"prompt": "7 is"}\n'
    records = load(tmp_path, tokenizer, messages, format="chat")
    assert [r.text for r in records] == ["user : 7 is <end>"] * 2  # bare text is one message of the user
    assert [r.token_ids.tolist() for r in records] == [[7, 8, 5, 3, 1]] * 2


def test_a_prompt_carries_the_messages_that_its_template_was_given_and_plain_text_has_none(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}<end>"
    dialogue = [
        {"role": "system", "content": "larger"},
        {"role": "user", "content": "7 is"},
        {"role": "assistant", "content": "is", "name": "9"},  # a key that this template does not look at
        {"role": "user", "content": "9"},
    ]
    lines = [json.dumps({"prompt": dialogue, "answer": 9}), '{"prompt": "7 is"}']
    records = load(tmp_path, tokenizer, "\n".join(lines), format="chat")
    assert [r.messages for r in records] == [dialogue, [{"role": "user", "content": "7 is"}]]
    assert [r.text for r in records] == ["larger 7 is is 9 <end>", "7 is <end>"]
    assert [r.fields for r in records] == [{"answer": 9}, {}]
    assert [p.messages for p in heldout_prompts(records, 2)] == [dialogue, [{"role": "user", "content": "7 is"}]]
    prompts = PromptStream(records, seed=0, rollouts_per_prompt=2)
    issued = [prompts.next() for _ in range(4)]
    assert [p.messages for p in issued] == [records[p.sample_id.prompt].messages for p in issued]

    assert load(tmp_path, tokenizer, '{"prompt": "7 is"}')[0].messages is None


def test_prompts_of_pairs_are_read_as_those_of_training(tmp_path, tokenizer):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "7 is", "answer": 7}\n')
    (record,) = load_records(str(path), PairPromptsConfig(source=str(path)), tokenizer, seed=0, max_tokens=2)
    assert (record.text, record.token_ids.tolist(), record.fields) == ("7 is", [5, 3], {"answer": 7})


@pytest.mark.parametrize(
    ("record", "format", "reason"),
    [
        ({"prompt": []}, "chat", "a record must be an object with text or chat messages under `prompt`"),
        ({"prompt": [{"role": "user", "content": "is"}]}, "plain", 'set prompts.format = "chat"'),
        ({"prompt": "is"}, "chat", "the tokenizer's chat template refuses the prompt"),  # it has none
        ({"prompt": "  "}, "plain", "the prompt has no tokens"),
        ({"prompt": "is", "answer": {9}}, "plain", "its fields go into the journal as JSON, and cannot"),
    ],
)
def test_a_record_at_fault_is_named_by_where_it_is_from(tokenizer, record, format, reason):
    with pytest.raises(UserError) as caught:
        prompt_record("the prompt of pair 7", record, PromptFormat(format=format), tokenizer)
    assert str(caught.value).startswith("the prompt of pair 7: ")
    assert reason in str(caught.value)


def test_the_tokenizers_own_special_tokens_are_added_to_plain_text_but_not_to_a_templates(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<end> $A", special_tokens=[("<end>", 1)]
    )
    tokenizer.chat_template = "<end>{{ messages[0].content }}"  # writes its own
    text = '{"prompt": "7 is"}\n'
    for format in ("plain", "chat"):
        assert load(tmp_path, tokenizer, text, format=format)[0].token_ids.tolist() == [1, 5, 3]


def test_a_template_that_refuses_a_prompt_or_is_missing_names_the_line(tmp_path, tokenizer):
    text = '{"prompt": [{"role": "user", "content": "is"}]}'
    assert "line 1: the tokenizer's chat template refuses the prompt" in refusal(
        tmp_path, tokenizer, text, format="chat"
    )
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    assert "no system role" in refusal(tmp_path, tokenizer, text, format="chat")
