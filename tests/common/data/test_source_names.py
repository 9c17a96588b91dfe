"""What the name of a source means, and which options it may have."""

import pytest

from common.data.source_names import SourceName, is_heldout, matching_files, parsed_name, split_options
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
        ("p.parquet", SourceName("files", "p.parquet")),
        ("a:b.jsonl", SourceName("files", "a:b.jsonl")),
        ("data/[ab].*", SourceName("files", "data/[ab].*")),
        ("x.csv.gz", SourceName("files", "x.csv.gz")),
        ("odd:name", SourceName("files", "odd:name")),
        ("x?y=1.jsonl", SourceName("files", "x?y=1.jsonl")),
        ("missing?split=test", SourceName("files", "missing?split=test")),
        ("my.tasks:train", SourceName("function", "my.tasks:train")),
        ("gsm8k", SourceName("directory", "gsm8k")),
        ("spark.parquet", SourceName("directory", "spark.parquet")),
        ("gsm8k?split=train[:9%]", SourceName("directory", "gsm8k", {"split": "train[:9%]"})),
        ("hf:gsm8k", SourceName("hub", "gsm8k")),
        ("hf:openai/gsm8k?config=a&revision=e", SourceName("hub", "openai/gsm8k", {"config": "a", "revision": "e"})),
        ("reasoning-gym:chain_sum", SourceName("task", "chain_sum")),
    ],
)  # fmt: skip
def test_a_name_says_which_kind_of_source_it_is(place, source, expected):
    assert parsed_name(source, "prompts.train") == expected


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("hf:gsm8k?splits=x", "'splits=x' is no option of a data set; the options are split, config, revision, each"),
        ("hf:gsm8k?split=", "'split=' is no option"),
        ("hf:gsm8k?split=a&split=b", "'split=b' is no option"),
        ("gsm8k?revision=x", "'revision=x' is no option of a data set; the options are split, config, each"),
        ("hf:a/b/c", "a data set of the hub is named as in hf:OWNER/NAME?split=train"),
        ("hf:", "a data set of the hub is named as in hf:OWNER/NAME?split=train"),
    ],
)
def test_an_unknown_option_or_hub_name_is_refused(place, source, complaint):
    with pytest.raises(UserError) as caught:
        parsed_name(source, "prompts.train")
    assert f"prompts.train ({source}): {complaint}" in str(caught.value)


def test_options_begin_at_a_question_mark_with_a_key():
    assert split_options("data/gsm8k?split=test&config=a=b") == ("data/gsm8k", "split=test&config=a=b")
    assert split_options("data/v?/x.parquet") == ("data/v?/x.parquet", "")


def test_files_of_a_pattern_are_sorted_and_no_directories(place):
    assert matching_files("*.csv") == ["a.csv", "b.csv"]
    assert matching_files("missing.csv") == []


def test_settings_of_held_out_records_end_with_heldout():
    assert [is_heldout(key) for key in ("prompts.heldout", "data.heldout", "prompts.train")] == [True, True, False]
