"""Texts of plain files and of records; broken ones are refused by their place."""

import pytest

from common.data.texts import read_texts
from common.errors import UserError
from tests.record_files import write

TEXTS = ["Grüße.\nA second line.\n", "another"]


def texts(source, column="text"):
    return [text for _, text in read_texts(str(source), column=column, setting="evaluation.text", seed=0)]


def test_every_plain_file_of_a_pattern_is_one_text_by_name(tmp_path):
    for name, text in zip(("b.TXT", "c.txt", "a.txt"), ["\ufeff" + TEXTS[0], "  \n", TEXTS[1]]):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert texts(tmp_path / "b.TXT") == TEXTS[:1]
    assert texts(tmp_path / "*.txt") == TEXTS[1:]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv.gz", "t.parquet"])
def test_the_column_of_every_record_is_a_text(tmp_path, name):
    path = write(tmp_path / name, [{"story": text, "text": "no"} for text in [*TEXTS, " "]])
    assert texts(path, "story") == TEXTS


def test_a_function_may_give_the_texts(monkeypatch, tmp_path):
    (tmp_path / "of_mine.py").write_text("def stories(seed):\n    return [{'text': f'seed {seed}'}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert texts("of_mine:stories") == ["seed 0"]


@pytest.mark.parametrize(
    ("name", "row", "parts"),
    [
        ("t.jsonl", {"story": "a"}, ["t.jsonl, line 1", "`text` does not exist", "`story`", "evaluation.text_column"]),
        ("t.jsonl", {"text": 3}, ["t.jsonl, line 1", "`text` is 3, not text"]),
        ("t.pdf", {"text": "a"}, ["evaluation.text", "t.pdf"]),
    ],
)
def test_a_broken_source_is_refused_by_its_place(tmp_path, name, row, parts):
    with pytest.raises(UserError) as refused:
        texts(write(tmp_path / name, [row]))
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_missing_plain_file_and_one_that_is_not_utf8_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.text .*no\.txt.*there is no such file"):
        texts(tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt, line 1.*UTF-8"):
        texts(tmp_path / "latin.txt")
