"""Preference pairs: records read, refused and cut, and access to the Arrow file."""

from random import Random

import numpy as np
import pyarrow as pa
import pytest

from common.config.reward_model import PreferencesConfig
from common.errors import UserError
from common.model.files import load_tokenizer
from learner.reward_model import pair_records
from learner.reward_model.pair_records import PairCounts, tokenise_pairs
from learner.reward_model.pairs import Pairs, split, without_prompts_of
from tests.fakes import WORDS, save_tiny_model
from tests.record_files import write

# `ask` before a user message, `b0` before an assistant message, and the end token after each message.
TEMPLATE = """{% for m in messages %}{{ {'system': 'a0', 'user': 'ask', 'assistant': 'b0'}[m.role] + ' ' }}
{{ m.content }} <end> {% endfor %}"""
GOOD = '{"prompt": "ask", "chosen": "b1", "rejected": "b2"}\n'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenised(tmp_path, tokenizer, records, *, name="pairs.jsonl", **settings):
    """Pairs and counts of records (or of a file's text), which pass through a file."""
    if isinstance(records, str):
        (tmp_path / name).write_text(records, encoding="utf-8")
    else:
        write(tmp_path / name, records)
    source = str(tmp_path / name)
    target = tmp_path / f"{name}.arrow"
    counts = tokenise_pairs(source, PreferencesConfig(train=source, **settings), tokenizer, target)
    return Pairs(target), counts


def refusal(tmp_path, tokenizer, records, **settings):
    with pytest.raises(UserError) as caught:
        tokenised(tmp_path, tokenizer, records, **settings)
    return str(caught.value)


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def parts(pairs):
    """Shared, chosen and rejected words of each pair, as three texts."""
    return [
        tuple(" ".join(WORDS[i] for i in part) for part in (pair.shared_ids, pair.chosen_ids, pair.rejected_ids))
        for pair in pairs
    ]


def record(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def said(*turns):
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2])]


# Records


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"chosen": "b1"', "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ('["b1", "b2"]', "a record must be an object of columns"),
        ("null", "a record must be an object of columns"),
        ('{"rejected": "b1"}', "the column `chosen` does not exist; the record has `rejected`"),
        ('{"chosen": "b1"}', "the column `rejected` does not exist"),
        ('{"chosen": 7, "rejected": "b1"}', "`chosen` must be text"),
        ('{"chosen": "b1", "rejected": null}', "the column `rejected` is empty (null)"),
        ('{"prompt": {"role": "user"}, "chosen": "b1", "rejected": "b2"}', "`prompt` must be text"),
        ('{"chosen": "b1", "rejected": ["b2"]}', "`rejected`, message 1 must be an object with `role`"),
        ('{"chosen": "b1", "rejected": [{"role": "user"}]}', "`rejected`, message 1 must have text as `content`"),
        ('{"chosen": "b1", "rejected": [{"role": 1, "content": "b2"}]}', "`rejected`, message 1 must be an object"),
        ('{"chosen": "b1", "rejected": [{"role": "robot", "content": "b2"}]}', "message 1 has the role 'robot'"),
        ('{"chosen": "b1", "rejected": "b\\u0000"}', "`rejected` has the character NUL"),
        ('{"chosen": "b1", "rejected": "b\\ud83d"}', "`rejected` has half of a surrogate pair"),
        ('{"chosen": "b1", "rejected": [{"role": "assistant", "content": "b2"}]}', "must both be text or both be chat"),
        ('{"chosen": "b1", "rejected": "b2", "margin": "1x"}', "`margin` is '1x'"),
        ('{"chosen": "b1", "rejected": "b2", "margin": true}', "`margin` is True"),
        ('{"chosen": "b1", "rejected": "b2", "margin": NaN}', "`margin` is nan"),
        ('{"chosen": "", "rejected": "b2", "margin": Infinity}', "`margin` is inf"),  # of a dropped record, too
    ],
)
def test_a_broken_record_is_refused_with_file_and_line(tmp_path, tokenizer, line, complaint):
    message = refusal(tmp_path, tokenizer, f"{GOOD}\n{line}\n{GOOD}", format="chat")
    assert message.startswith(f"{tmp_path}/pairs.jsonl, line 3: ")
    assert complaint in message


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_messages_under_format_plain_are_refused_with_the_setting(tmp_path, tokenizer, key):
    message = refusal(tmp_path, tokenizer, [{**record("ask", "b1", "b2"), key: said("user", "a1")}])
    assert message == f'{tmp_path}/pairs.jsonl, line 1: `{key}` is a list of chat messages; set data.format = "chat"'


def test_a_record_that_the_template_refuses_is_named_by_row(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'user' %}a1{% else %}{{ raise_exception('no user') }}{% endif %}"
    )
    records = [record("a1", "b1", "b2"), record("", "b1", "b2")]
    message = refusal(tmp_path, tokenizer, records, name="p.parquet", format="chat")
    assert f"{tmp_path}/p.parquet, row 2: the tokenizer or its chat template refuses the record: no user" in message


# Forms of a record


@pytest.mark.parametrize(
    ("found", "prompt", "expected"),
    [
        (record("ask a1", "b1", "b2"), "ask a1", ("ask a1", "b1 <end>", "b2 <end>")),
        ({"chosen": "a1 b1", "rejected": "a1 b2"}, "", ("a1", "b1 <end>", "b2 <end>")),
        (record("ask", "b1", "b1 b2"), "ask", ("ask b1", "<end>", "b2 <end>")),
        (record("", "<end>", "<end> <end>"), "", ("<end>", "<end>", "<end> <end>")),  # one token is each one's own
        ({"chosen": "\n\nHuman: a1\n\nAssistant: b1", "rejected": "\n\nHuman: a1\n\nAssistant: b2"},
         "\n\nHuman: a1\n\nAssistant:", ("<unk> <unk> a1 <unk> <unk>", "b1 <end>", "b2 <end>")),
        # The sides differ before the last response: no prompt is common to them.
        ({"chosen": "\n\nHuman: a1\n\nAssistant: b1", "rejected": "\n\nHuman: a2\n\nAssistant: b2"},
         "", ("<unk> <unk>", "a1 <unk> <unk> b1 <end>", "a2 <unk> <unk> b2 <end>")),
        # With a prompt, text is a response to it.
        (record("ask", "\n\nAssistant: b1", "\n\nAssistant: b2"), "ask", ("ask <unk> <unk>", "b1 <end>", "b2 <end>")),
    ],
)  # fmt: skip
def test_plain_text_is_prompt_and_response_or_a_whole_dialogue(tmp_path, tokenizer, found, prompt, expected):
    pairs, counts = tokenised(tmp_path, tokenizer, [found])
    assert (parts(pairs), pairs.prompt(0), counts) == ([expected], prompt, PairCounts(pairs=1))
    assert [a.dtype for a in (pairs[0].shared_ids, pairs[0].chosen_ids, pairs[0].rejected_ids)] == [np.int32] * 3
    assert pairs[0].num_tokens == sum(len(text.split()) for text in expected)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize(
    "found",
    [
        record("a1", "b1", "b2"),
        record(said("user", "a1"), "b1", "b2"),
        record(said("user", "a1"), said("assistant", "b1"), said("assistant", "b2")),
        record("a1", said("assistant", "b1"), said("assistant", "b2")),
        {"chosen": said("user", "a1", "assistant", "b1"), "rejected": said("user", "a1", "assistant", "b2")},
        record("a1", said("user", "a1", "assistant", "b1"), said("user", "a1", "assistant", "b2")),  # UltraFeedback
        {"chosen": "\n\nHuman: a1\n\nAssistant: b1", "rejected": "\n\nHuman: a1\n\nAssistant: b2"},
        record("\n\nHuman: a1\n\nAssistant:", " b1", " b2"),
    ],
)
def test_every_form_of_chat_gives_the_same_prompt_and_tokens(tmp_path, tokenizer, found, name):
    pairs, counts = tokenised(tmp_path, tokenizer, [found], name=name, format="chat")
    assert parts(pairs) == [("ask a1 <end> b0", "b1 <end>", "b2 <end>")]
    assert (pairs.prompt(0), counts) == (said("user", "a1"), PairCounts(pairs=1))
    reference, _ = tokenised(tmp_path, tokenizer, [record("a1", "b3", "b4")], name="other.jsonl", format="chat")
    assert len(without_prompts_of(pairs, reference)) == 0  # known as one prompt


def test_dialogues_are_split_where_their_messages_first_differ(tmp_path, tokenizer):
    def whole(*turns):
        return said("system", "a9", "user", "a1", "assistant", "b1", *turns)

    asked = ("user", "a2", "assistant", "b2")
    records = [
        {"chosen": whole(*asked), "rejected": whole("user", "a3", "assistant", "b2", "user", "a4")},
        {"chosen": whole(*asked), "rejected": whole(*asked, "user", "a3")},
    ]
    pairs, _ = tokenised(tmp_path, tokenizer, records, format="chat")
    assert [pairs.prompt(i) for i in range(2)] == [whole(), whole("user", "a2")]
    before = "a0 a9 <end> ask a1 <end> b0 b1 <end> ask"
    assert parts(pairs) == [
        (before, "a2 <end> b0 b2 <end>", "a3 <end> b0 b2 <end> ask a4 <end>"),
        (before + " a2 <end> b0 b2", "<end>", "<end> ask a3 <end>"),
    ]


def test_margins_come_with_their_pairs(tmp_path, tokenizer):
    records = [record("ask", "b1", "b2", margin=m) for m in (0.75, -2, 0)] + [record("ask", "b1", "b2")]
    pairs, _ = tokenised(tmp_path, tokenizer, records)
    assert [pair.margin for pair in pairs] == [0.75, -2.0, 0.0, 0.0]


FORMATS = ["p.jsonl.gz", "p.json", "p.csv", "p.parquet"]


@pytest.mark.parametrize("format", ["plain", "chat"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_records_in_another_format_are_the_same_pairs(tmp_path, tokenizer, name, format):
    random = Random(name)

    def text():
        return " ".join(random.choices(WORDS[3:], k=random.randint(1, 9)))

    records = [record(text(), text(), text(), margin=random.random()) for _ in range(40)]
    records += [record(text(), *[random.choice(["", text()])] * 2, margin=0.0) for _ in range(10)]
    if format == "chat":
        for found in records[:30]:
            found["prompt"] = said("system", text(), "user", text())
            found["chosen"], found["rejected"] = (said("assistant", text()) for _ in range(2))
        if name == "p.parquet":  # a column has one type
            records = records[:30]
    expected, counts = tokenised(tmp_path, tokenizer, records, format=format)
    found, others = tokenised(tmp_path, tokenizer, records, name=name, format=format)
    assert (len(found), others) == (len(expected), counts)
    assert (parts(found), [p.margin for p in found]) == (parts(expected), [p.margin for p in expected])
    assert [found.prompt(i) for i in range(len(found))] == [expected.prompt(i) for i in range(len(found))]


def test_columns_have_the_names_of_the_config(tmp_path, tokenizer):
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "margin": "by"}
    records = [{"question": "ask", "good": "b1", "bad": "b2", "by": 0.5, "prompt": 7, "margin": "no"}]
    pairs, _ = tokenised(tmp_path, tokenizer, records, columns=columns)
    assert (parts(pairs), pairs.prompt(0), pairs[0].margin) == ([("ask", "b1 <end>", "b2 <end>")], "ask", 0.5)
    message = refusal(tmp_path, tokenizer, [record("ask", "b1", "b2")], columns=columns)
    assert (
        "the column `good` does not exist; the record has `prompt`, `chosen`, `rejected`; fix the record, or" in message
    )
    assert message.endswith("set data.columns.chosen")


def test_pairs_of_a_function_are_read_as_those_of_a_file(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "made_pairs.py").write_text("def some(seed): yield {'chosen': f'b{seed}', 'rejected': 'b2'}")
    monkeypatch.syspath_prepend(tmp_path)
    source, target = "made_pairs:some", tmp_path / "pairs.arrow"
    assert tokenise_pairs(source, PreferencesConfig(train=source), tokenizer, target, seed=7).pairs == 1
    assert parts(Pairs(target)) == [("", "b7 <end>", "b2 <end>")]


def test_a_prompt_ending_with_the_assistant_is_treated_as_in_training(tmp_path, tokenizer):
    records = [record(said("user", "a1", "assistant", "b1"), " b2", " b3")]
    assert 'data.last_assistant = "remove"' in refusal(tmp_path, tokenizer, records, format="chat")
    pairs, _ = tokenised(tmp_path, tokenizer, records, format="chat", last_assistant="remove")
    assert parts(pairs) == [("ask a1 <end> b0", "b2 <end>", "b3 <end>")]
    pairs, _ = tokenised(tmp_path, tokenizer, records, format="chat", last_assistant="continue")
    assert parts(pairs) == [("ask a1 <end> b0 b1", "b2 <end>", "b3 <end>")]


# Dropped and cut pairs

LONG = record("ask a1 a2 a3", "b1 b2", "b3")  # 7 tokens and 6, of which 4 are shared


def test_empty_and_identical_pairs_are_dropped_and_counted(tmp_path, tokenizer):
    records = [
        record("ask", "", "b1"),
        record("ask", "b1", " \n"),
        record("ask", "b1 b2", "b1  b2"),  # other text, same tokens
        record("ask", *["b1 b2 b3 b4 b5 b6 b7 b8 b9"] * 2),  # too long besides
        record("", "b1", "b2"),
        LONG,
    ]
    pairs, counts = tokenised(tmp_path, tokenizer, records, max_tokens=6, overlong="drop")
    assert counts == PairCounts(pairs=1, empty=2, identical=2, cut=0, overlong=1)
    assert parts(pairs) == [("", "b1 <end>", "b2 <end>")]
    assert str(counts) == ("1 pairs, 0 of them cut to length; dropped: 2 empty, 2 identical, 1 too long")
    assert PairCounts(**counts.record()) == counts
    empty = [record("a1", [], said("assistant", "b1")), record("a1", said("assistant", "b1"), said("assistant", " "))]
    assert tokenised(tmp_path, tokenizer, empty, format="chat")[1] == PairCounts(empty=2)


def test_repeated_pairs_are_kept_and_counted(tmp_path, tokenizer):
    records = [record("ask", "b1", "b2"), record("ask", "b2", "b1"), record("ask", "b1", "b2", margin=1.0)]
    pairs, counts = tokenised(tmp_path, tokenizer, [*records, record("", "b1", "b2")])
    assert (len(pairs), counts) == (4, PairCounts(pairs=4, repeated=1))
    assert str(counts).startswith("4 pairs, 1 of them repeat an earlier one, 0 of them cut")


@pytest.mark.parametrize(
    ("overlong", "max_tokens", "expected"),
    [
        ("drop", 7, ("ask a1 a2 a3", "b1 b2 <end>", "b3 <end>")),
        ("drop", 6, None),
        ("cut_start", 7, ("ask a1 a2 a3", "b1 b2 <end>", "b3 <end>")),
        ("cut_start", 6, ("a1 a2 a3", "b1 b2 <end>", "b3 <end>")),  # both sides lose the same tokens
        ("cut_start", 4, ("a3", "b1 b2 <end>", "b3 <end>")),
        ("cut_start", 3, None),  # nothing of the prompt would be left
        ("cut_end", 7, ("ask a1 a2 a3", "b1 b2 <end>", "b3 <end>")),
        (
            "cut_end",
            6,
            ("ask a1 a2 a3", "b1 <end>", "b3 <end>"),
        ),  # the long side only, not its last token
        ("cut_end", 5, None),  # ask a1 a2 a3 <end>, on both sides
        ("cut_end", 1, None),
    ],
)
def test_long_pairs_are_dropped_or_cut_as_the_config_says(tmp_path, tokenizer, overlong, max_tokens, expected):
    swapped = record(LONG["prompt"], LONG["rejected"], LONG["chosen"])
    pairs, counts = tokenised(tmp_path, tokenizer, [LONG, swapped], max_tokens=max_tokens, overlong=overlong)
    if expected is None:
        assert (len(pairs), counts) == (0, PairCounts(overlong=2))
    else:
        shared, first, second = expected
        assert parts(pairs) == [(shared, first, second), (shared, second, first)]
        assert counts == PairCounts(pairs=2, cut=0 if max_tokens == 7 else 2)


def test_a_side_that_is_short_enough_keeps_its_whole_end(tmp_path, tokenizer):
    short = record("ask", "b1", "b2 b3 b4 b5")
    pairs, _ = tokenised(tmp_path, tokenizer, [short], max_tokens=5, overlong="cut_end")
    assert parts(pairs) == [("ask", "b1 <end>", "b2 b3 b4 <end>")]


# The Arrow file


def many(tmp_path, tokenizer, prompts, *, name="many.jsonl"):
    """One pair for each prompt given; pair i prefers b<i> to `b29 b29`."""
    records = [record(f"ask a{p}", f"b{i}", "b29 b29", margin=i / 4) for i, p in enumerate(prompts)]
    return tokenised(tmp_path, tokenizer, records, name=name)[0]


def numbers(pairs):
    """Which of the pairs of `many` these are."""
    return [int(WORDS[pair.chosen_ids[0]][1:]) for pair in pairs]


@pytest.mark.parametrize(("count", "batches"), [(0, []), (1, [1]), (3, [3]), (10, [3, 3, 3, 1]), (12, [3, 3, 3, 3])])
def test_pairs_come_back_from_any_number_of_record_batches(tmp_path, tokenizer, monkeypatch, count, batches):
    monkeypatch.setattr(pair_records, "_ROWS_PER_BATCH", 3)
    pairs = many(tmp_path, tokenizer, [i % 4 for i in range(count)])
    with pa.ipc.open_file(str(tmp_path / "many.jsonl.arrow")) as file:
        assert [file.get_batch(i).num_rows for i in range(file.num_record_batches)] == batches
    assert parts(pairs) == [(f"ask a{i % 4}", f"b{i} <end>", "b29 b29 <end>") for i in range(count)]
    assert [pairs.prompt(i) for i in range(len(pairs))] == [f"ask a{i % 4}" for i in range(count)]
    assert [pair.margin for pair in pairs] == [i / 4 for i in range(count)]
    hashes = pairs.prompt_hashes()
    assert hashes.dtype == np.int64
    assert (hashes[:, None] == hashes).tolist() == [[i % 4 == j % 4 for j in range(count)] for i in range(count)]


def test_pairs_are_chosen_in_any_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pair_records, "_ROWS_PER_BATCH", 3)
    pairs = many(tmp_path, tokenizer, range(10))
    assert [numbers([pairs[i]])[0] for i in (9, 0, 3, 2, -1, np.int64(5))] == [9, 0, 3, 2, 9, 5]
    chosen = pairs[np.array([7, 1, 1, 8])]
    assert numbers(chosen) == [7, 1, 1, 8]
    assert [chosen.prompt(i) for i in range(4)] == ["ask a7", "ask a1", "ask a1", "ask a8"]
    assert chosen.prompt_hashes().tolist() == pairs.prompt_hashes()[[7, 1, 1, 8]].tolist()
    assert numbers(pairs[2:8][::-2]) == [7, 5, 3]
    assert numbers(pairs[4:][np.arange(6) % 2 == 1]) == [5, 7, 9]
    assert (len(pairs[:0]), list(pairs[:0])) == (0, [])
    for beyond in (10, -11):
        with pytest.raises(IndexError):
            pairs[beyond]


# Held-out pairs

PROMPTS = [0, 1, 2, 0, 3, 4, 1, 5, 0, 6, 7, 8, 4, 9]  # of the pairs 0, 1, 2, ...


@pytest.mark.parametrize("heldout", [0, 1, 2, 5, 13, 14, 100])
def test_a_split_keeps_a_prompt_on_one_side_and_loses_no_pair(tmp_path, tokenizer, heldout):
    pairs = many(tmp_path, tokenizer, PROMPTS)
    for seed in range(8):
        sides = split(pairs, heldout, seed=seed)
        train, held = (numbers(side) for side in sides)
        assert sorted(train + held) == list(range(14))
        assert not {PROMPTS[i] for i in train} & {PROMPTS[i] for i in held}
        # At least as many as wanted, and one prompt less would not do.
        assert min(heldout, 14) <= len(held) <= (heldout + 2 if heldout else 0)


def test_a_split_is_a_function_of_the_seed(tmp_path, tokenizer):
    pairs = many(tmp_path, tokenizer, PROMPTS)
    held = [numbers(split(pairs, 4, seed=seed)[1]) for seed in (0, 1, 2, 3, 4, 0, 1)]
    assert held[:2] == held[5:]
    assert len({tuple(found) for found in held[:5]}) > 1
    backwards = many(tmp_path, tokenizer, PROMPTS[::-1], name="backwards.jsonl")  # the file's order does not matter
    assert sorted(13 - i for i in numbers(split(backwards, 4, seed=0)[1])) == held[0]


def test_pairs_whose_prompt_is_among_others_are_left_out(tmp_path, tokenizer):
    pairs, others = many(tmp_path, tokenizer, PROMPTS), many(tmp_path, tokenizer, [0, 4, 20], name="others.jsonl")
    assert numbers(without_prompts_of(pairs, others)) == [1, 2, 4, 6, 7, 9, 10, 11, 13]
    assert numbers(without_prompts_of(others, pairs)) == [2]
    assert numbers(without_prompts_of(pairs[5:9], others[1:])) == [6, 7, 8]
    assert len(without_prompts_of(pairs, pairs)) == 0
    assert numbers(without_prompts_of(pairs, pairs[:0])) == list(range(14))


# Rare inputs


def test_pairs_without_a_prompt_are_not_one_group(tmp_path, tokenizer):
    records = [{"chosen": f"a{i}", "rejected": f"b{i}"} for i in range(10)]
    pairs, _ = tokenised(tmp_path, tokenizer, records)
    train, heldout = split(pairs, 2, seed=0)
    assert (len(train), len(heldout)) == (8, 2)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_null_means_absent(tmp_path, tokenizer, name):
    records = [record(None, "a1", "b1", margin=None), record("ask", "a1", "b1", margin=1.0)]
    pairs, counts = tokenised(tmp_path, tokenizer, records, name=name)
    assert (counts, [pair.margin for pair in pairs]) == (PairCounts(pairs=2), [0.0, 1.0])
    assert [pairs.prompt(i) for i in range(2)] == ["", "ask"]


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path, tokenizer):
    _, counts = tokenised(tmp_path, tokenizer, GOOD, name="pairs[1].jsonl")
    assert counts.pairs == 1


@pytest.mark.parametrize("margin", ["1e39", "1" + "0" * 400, "1" + "0" * 5000])
def test_a_margin_beyond_float32_is_refused_by_line(tmp_path, tokenizer, margin):
    broken = GOOD + f'{{"prompt": "ask", "chosen": "a1", "rejected": "b1", "margin": {margin}}}\n'
    assert "line 2" in refusal(tmp_path, tokenizer, broken)


def test_json_nested_beyond_reason_is_refused_by_line(tmp_path, tokenizer):
    assert "line 2" in refusal(tmp_path, tokenizer, GOOD + "[" * 100_000 + "\n")


def test_a_dialogue_paired_with_a_single_response_is_refused(tmp_path, tokenizer):
    mixed = [{"chosen": said("user", "ask", "assistant", "a1"), "rejected": said("assistant", "b1")}]
    assert "whole dialogue" in refusal(tmp_path, tokenizer, mixed, format="chat")
