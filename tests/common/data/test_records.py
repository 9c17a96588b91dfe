"""Every format and a function give the same records; broken ones are refused by line."""

import gzip
import hashlib
import json
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data import file_formats
from common.data.records import read_source
from common.errors import UserError
from tests.record_files import write


def raw_records(source):
    return read_source(str(source), "data.train", seed=3)


GOOD = '{"prompt": "ask", "chosen": "b1", "rejected": "b2"}\n'

# Formats

FILES = ["p.jsonl", "p.jsonl.gz", "p.json", "p.json.gz", "p.csv", "p.csv.gz", "p.parquet", "P.JSONL", "p.Csv"]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_records_in_order(tmp_path, monkeypatch, name):
    monkeypatch.setattr(file_formats, "_ROWS_PER_BATCH", 2)
    texts = ["Grüße\u2028 ", 'a, "b"\nc\r\n', "[1]", " ", "0", "\U0001f600", "é" * 200_000]
    chat = [{"role": "user", "content": "a\n"}, {"role": "assistant", "content": '"b"'}]
    rows = [{"prompt": text, "chosen": chat, "k": str(i)} for i, text in enumerate(texts)]
    assert [record for _, record in raw_records(write(tmp_path / name, rows))] == rows


@pytest.mark.parametrize(
    ("name", "places"),
    [("p.jsonl", ["line 1", "line 2"]), ("p.json", ["record 1", "record 2"]), ("p.csv", ["line 2", "line 4"]),
     ("p.parquet", ["row 1", "row 2"])],
)  # fmt: skip
def test_a_record_is_located_by_line_or_row(tmp_path, name, places):
    path = write(tmp_path / name, [{"prompt": "a\nb"}, {"prompt": "c"}])
    assert [where for where, _ in raw_records(path)] == [f"{path}, {place}" for place in places]


def test_json_may_hold_columns_instead_of_records(tmp_path):
    rows = [{"prompt": "a", "k": 1}, {"prompt": "b", "k": None}]
    (tmp_path / "lists.json").write_text(json.dumps({"prompt": ["a", "b"], "k": [1, None]}))
    (tmp_path / "pandas.json").write_text(json.dumps({"prompt": {"0": "a", "7": "b"}, "k": {"0": 1, "7": None}}))
    for name in ("lists", "pandas"):
        assert [record for _, record in raw_records(tmp_path / f"{name}.json")] == rows


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, name):
    path = tmp_path / name
    write(path, [{"prompt": "a"}])
    plain = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    marked = b"\xef\xbb\xbf" + plain
    path.write_bytes(gzip.compress(marked) if name.endswith(".gz") else marked)
    assert [record for _, record in raw_records(path)] == [{"prompt": "a"}]


def test_parquet_values_become_values_of_json(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "when": pa.array([datetime(2026, 11, 26, 1, 2), None], pa.timestamp("us")),
            "day": pa.array([date(2026, 11, 26), None]),
            "price": pa.array([Decimal("1.25"), None]),
            "raw": pa.array([b"bytes", None]),
            "nested": pa.array([[[1, 2], None], []], pa.list_(pa.list_(pa.int8()))),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "real": pa.array([0.5, None], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    first, second = (record for _, record in raw_records(tmp_path / "p.parquet"))
    assert first == {"prompt": "a", "when": "2026-11-26T01:02:00", "day": "2026-11-26", "price": 1.25, "raw": "bytes",
                     "nested": [[1, 2], None], "kind": "x", "real": 0.5}  # fmt: skip
    assert second == {
        "prompt": "b",
        **dict.fromkeys(["when", "day", "price", "raw", "real"]),
        "nested": [],
        "kind": "y",
    }
    assert json.loads(json.dumps(first)) == first


def test_a_function_gets_the_seed_and_its_values_become_json(tmp_path, monkeypatch):
    (tmp_path / "made_records.py").write_text(
        "import numpy as np\n"
        "def some(seed):\n"
        "    x = np.array([[0.5]])\n"
        "    yield {'prompt': np.str_('a'), 'n': np.int64(seed), 'x': x, 'ok': np.bool_(True), 't': (1,)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    [(where, record)] = read_source("made_records:some", "prompts.train", seed=3)
    assert where == "made_records:some, record 1"
    assert record == {"prompt": "a", "n": 3, "x": [[0.5]], "ok": True, "t": [1]}
    assert [type(record[key]) for key in ("prompt", "n", "ok")] == [str, int, bool]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return None", "after record 0 it raised TypeError: 'NoneType' object is not iterable"),
        ("yield {}; raise KeyError('x')", "after record 1 it raised KeyError: 'x'"),
        ("raise SystemExit(3)", "after record 0 it raised SystemExit: 3"),
        ("return ['a']", "record 1: a record must be an object of columns, not 'a'"),
        ("return [{'a': {1}}]", "record 1: `a` is a set, which JSON does not have"),
        ("return [{'a': {1: 2}}]", "record 1: `a` has a key that is not text (1)"),
        ("return [{1: 'a'}]", "record 1: a column is named 1; names must be text"),
        ("return [{'a': 10 ** 5000}]", "record 1: `a` is a number of more than 4,300 digits"),
        ("return [{'a': 'x\\ud83d'}]", "record 1: `a` has half of a surrogate pair"),
        ("return [{'a': b'\\xff'}]", "record 1: `a` is bytes that are not UTF-8 text"),
        ("a = []; a.append(a); return [{'a': a}]", "record 1: `a` is nested deeper than 100 levels"),
    ],
)
def test_a_function_that_gives_no_records_is_refused(tmp_path, monkeypatch, request, body, complaint):
    module = f"no_records_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(f"def f(seed):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        list(raw_records(f"{module}:f"))
    assert complaint in str(caught.value)


# Names


def test_a_pattern_reads_its_files_sorted_by_name(tmp_path, monkeypatch):
    for name in ("b.jsonl.gz", "a.parquet", "c.jsonl", "other.txt"):
        write(tmp_path / name, [{"chosen": name}])
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = [(f"{tmp_path}/a.parquet, row 1", {"chosen": "a.parquet"}),
                (f"{tmp_path}/b.jsonl.gz, line 1", {"chosen": "b.jsonl.gz"}),
                (f"{tmp_path}/c.jsonl, line 1", {"chosen": "c.jsonl"})]  # fmt: skip
    assert list(raw_records(f"{tmp_path}/[abc].*")) == list(raw_records("~/?.*")) == expected


def test_empty_lines_count_as_lines_but_not_as_records(tmp_path):
    (tmp_path / "p.jsonl").write_text('\n{"chosen": "a"}\n  \n{"chosen": "b"}')
    assert [where[-6:] for where, _ in raw_records(f"{tmp_path}/p.jsonl")] == ["line 2", "line 4"]


def test_records_are_yielded_before_later_ones_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD + "{broken\n")
    records = raw_records(f"{tmp_path}/a.jsonl")
    assert next(records)[1]["chosen"] == "b1"
    with pytest.raises(UserError, match="line 2"):
        next(records)

    write(tmp_path / "1.parquet", [{"chosen": "a"}])
    (tmp_path / "2.parquet").write_bytes(b"PAR1 broken PAR1")
    records = raw_records(f"{tmp_path}/*.parquet")
    assert next(records)[1] == {"chosen": "a"}
    with pytest.raises(UserError, match=r"2\.parquet cannot be read as Parquet"):
        next(records)


def test_a_truncated_gzip_file_is_refused_where_it_ends(tmp_path):
    texts = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(2000)]  # do not compress to nothing
    path = write(tmp_path / "p.jsonl.gz", [{"chosen": text} for text in texts])
    whole = (tmp_path / "p.jsonl.gz").read_bytes()
    (tmp_path / "p.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = []
    with pytest.raises(UserError) as caught:
        found.extend(got["chosen"] for _, got in raw_records(path))
    assert 0 < len(found) < 2000
    assert found == texts[: len(found)]
    assert f"{path} cannot be read after line {len(found)} (" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.jsonl.gz", b'{"a": "a"}\n', "p.jsonl.gz cannot be read after line 0"),
        ("p.jsonl", b'{"a": "a"}\n{"a": "\xff"}\n', "p.jsonl, line 2: byte 8 of the line (0xff) is not UTF-8"),
        ("p.csv", b"a\nb\n\xe4\n", "p.csv, line 3: byte 1 of the line (0xe4) is not UTF-8"),
        ("p.jsonl", '{"a": "a"}'.encode("utf-16"), "p.jsonl is UTF-16 text; save it as UTF-8"),
        ("p.jsonl", gzip.compress(b"{}", mtime=0), "p.jsonl is compressed with gzip; add .gz to its name"),
        ("p.parquet", b'{"a": "a"}\n', "p.parquet cannot be read as Parquet after row 0"),
        ("p.jsonl", b"{}\n{}{}\n", "p.jsonl, line 2: not valid JSON (Extra data at column 3)"),
        ("p.json", b'{"a": 1}\n{"a": 2}\n', "p.json: not valid JSON (Extra data at line 2, column 1)"),
        ("p.json", b'{"a": [1, 2], "b": [1]}', "p.json: it must be a list of records, or columns of equal length"),
        ("p.json", b'{"a": {"0": 1}, "b": {"1": 1}}', "or columns of equal length; convert it"),
        ("p.json", b'{"a": 1}', "or columns of equal length; convert it"),
        ("p.json", b"{}", "or columns of equal length; convert it"),
        ("p.json", b"7", "p.json: it must be a list of records, not 7"),
        ("p.json", b'[{"a": 1}, []]', "p.json, record 2: a record must be an object of columns, not []"),
        ("p.json", b'[{"a": 1}, {"a": "\\ud83d"}]', "p.json, record 2: `a` has half of a surrogate pair"),
        ("p.jsonl", b"[" * 200_000, "p.jsonl, line 1: not usable JSON (RecursionError"),
        (
            "p.jsonl",
            b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
            "p.jsonl, line 1: `a` is nested deeper than 100 levels",
        ),
        ("p.jsonl", b'{"a": ' + b"7" * 5000 + b"}", "p.jsonl, line 1: not usable JSON (ValueError: Exceeds the limit"),
        ("p.csv", b'a,b\n1,2\n"x\ny",2,3\n', "p.csv, line 3: 3 cells, but the first line names 2 columns"),
        ("p.csv", b'a,b\n1,2\n"x,2\n', "p.csv, line 3: not valid CSV (unexpected end of data)"),
        (
            "p.csv",
            b"a,b\n1,\"[{'role': 'user', 'content': 'x'}]\"\n",
            "p.csv, line 2: `b` has chat messages as Python prints them",
        ),
        (
            "p.csv",
            b"a,b\n1,\"[{'content': 'x', 'role': 'user'}]\"\n",
            "a cell must have them as JSON: write it with json.dumps",
        ),
        ("p.csv", b"a,a\n1,2\n", "p.csv: several columns are named 'a'; rename all but one"),
    ],
)
def test_a_broken_file_is_refused_where_it_is_broken(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(raw_records(tmp_path / name))
    assert complaint in str(caught.value)


def test_a_missing_file_and_an_unknown_format_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"nothing\*\.jsonl\): there is no such file; .* Formats: JSON lines \(\.jsonl\)"
    ):
        list(raw_records(f"{tmp_path}/nothing*.jsonl"))
    (tmp_path / "p.txt").write_text(GOOD)
    with pytest.raises(UserError, match=r"the ending of .*/p\.txt names no known format; known are JSON lines"):
        list(raw_records(tmp_path / "p.txt"))
    for name in ("openai/gsm8k", "", "a.b:c d", "p:", ":f", "x\0y", "x\ud83d", "a" * 5000, "~nobody/x"):
        with pytest.raises(UserError, match="is neither a file, a directory nor a function"):
            list(raw_records(name))
    for name in ("x\0*.jsonl", "\ud83d.jsonl", "a" * 5000 + ".csv", "\ud83d*"):
        with pytest.raises(UserError, match="there is no such file"):
            list(raw_records(name))


def test_every_error_of_zlib_becomes_a_refusal_naming_the_file(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    write(path, [{"chosen": f"a{i % 30}", "rejected": f"b{i * 7 % 30}"} for i in range(3000)])
    sound = path.read_bytes()
    for place in range(100, len(sound) - 60, len(sound) // 7):
        path.write_bytes(sound[:place] + b"\xff" * 40 + sound[place + 40 :])
        with pytest.raises(UserError, match=r"pairs\.jsonl\.gz"):
            list(raw_records(str(path)))
