"""What the name of a source means, and which options it may have."""

import pytest

from common.data.source_names import ParsedSource, is_heldout, matching_files, parsed_source, split_options
from common.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.csv", "a.csv", "odd:name", "x?y=1.jsonl"):
        (tmp_path / name).write_text("")
    for name in ("gsm8k", "c.csv", "spark.parquet"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("p.parquet", ParsedSource("files", "p.parquet")),
        ("a:b.jsonl", ParsedSource("files", "a:b.jsonl")),
        ("data/[ab].*", ParsedSource("files", "data/[ab].*")),
        ("x.csv.gz", ParsedSource("files", "x.csv.gz")),
        ("odd:name", ParsedSource("files", "odd:name")),
        ("x?y=1.jsonl", ParsedSource("files", "x?y=1.jsonl")),
        ("missing?split=test", ParsedSource("files", "missing?split=test")),
        ("my.tasks:train", ParsedSource("function", "my.tasks:train")),
        ("gsm8k", ParsedSource("directory", "gsm8k")),
        ("spark.parquet", ParsedSource("directory", "spark.parquet")),
        ("gsm8k?split=train[:9%]", ParsedSource("directory", "gsm8k", {"split": "train[:9%]"})),
        ("hf:openai/gsm8k", ParsedSource("hub", "openai/gsm8k")),
        ("hf:openai/gsm8k?config=a&revision=e", ParsedSource("hub", "openai/gsm8k", {"config": "a", "revision": "e"})),
        ("reasoning-gym:chain_sum", ParsedSource("reasoning_gym", "chain_sum")),
        ("verifiers:owner/gsm8k", ParsedSource("verifiers", "owner/gsm8k")),
    ],
)  # fmt: skip
def test_a_name_says_which_kind_of_source_it_is(place, source, expected):
    assert parsed_source(source, "prompts.train") == expected


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            "hf:openai/gsm8k?splits=x",
            "'splits=x' is not an option of a data set; the options are split, config, revision,",
        ),
        ("hf:openai/gsm8k?split=", "'split=' is not an option"),
        ("hf:openai/gsm8k?split=a&split=b", "'split=b' is not an option"),
        ("gsm8k?revision=x", "'revision=x' is not an option of a data set; the options are split, config, each"),
        ("hf:a/b/c", "a data set of the hub is named as in hf:OWNER/NAME?split=train"),
        ("hf:json", "a data set of the hub is named as in hf:OWNER/NAME?split=train"),
        ("hf:", "a data set of the hub is named as in hf:OWNER/NAME?split=train"),
    ],
)
def test_an_unknown_option_or_hub_name_is_refused(place, source, complaint):
    with pytest.raises(UserError) as caught:
        parsed_source(source, "prompts.train")
    assert f"prompts.train ({source}): {complaint}" in str(caught.value)


def test_options_begin_at_a_question_mark_with_a_key():
    assert split_options("data/gsm8k?split=test&config=a=b") == ("data/gsm8k", "split=test&config=a=b")
    assert split_options("data/v?/x.parquet") == ("data/v?/x.parquet", "")


def test_files_of_a_pattern_are_sorted_and_no_directories(place):
    assert matching_files("*.csv") == ["a.csv", "b.csv"]
    assert matching_files("missing.csv") == []


def test_the_text_of_an_evaluation_is_held_out_too():
    assert all(map(is_heldout, ("prompts.heldout", "data.heldout", "evaluation.text")))
    assert not any(map(is_heldout, ("prompts.train", "prompts.source", "data.train")))
