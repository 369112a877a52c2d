"""Rows are read from whatever people keep them in; what cannot be read is named with its place and cause."""

import bz2
import csv
import gzip
import json
import lzma
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlzero.data.sources import DataError, load_rows, read_file

ROWS = [
    {"prompt": "1+1?", "answer": "2", "tests": ["a", "b"], "level": 1},
    {"prompt": "é+1?", "answer": None, "tests": [], "level": None},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def values(source, split="train", **params) -> list[dict]:
    return [row.values for row in load_rows(str(source), params, split, 0)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("no suffix", LINES),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES),
        ("utf16.jsonl", LINES.decode().encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("array.jsonl", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_json_is_read_however_it_is_kept(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path / name) == ROWS


def test_tables_are_read_from_parquet_and_both_formats_of_arrow(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        assert values(tmp_path / name) == ROWS


def test_csv_keeps_every_value_as_the_text_it_is(tmp_path):
    pairs = [("a, b\n\"c\"", "007"), ("NA", "1.50"), ("é", "")]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert values(tmp_path / name) == rows
    assert [row.where.rpartition(":")[2] for row in read_file(tmp_path / "a.csv")] == ["3", "4", "5"]


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for index in (2, 1):
        pq.write_table(pa.Table.from_pylist([{"prompt": str(index)}]), tmp_path / f"train-{index}.parquet")
    assert values(tmp_path / "train-*.parquet") == [{"prompt": "1"}, {"prompt": "2"}]


def test_a_folder_that_datasets_saved_is_read_by_its_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    held_out = datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": made, "test": held_out}).save_to_disk(str(tmp_path / "both"))
    assert values(tmp_path / "one") == values(tmp_path / "both") == values(tmp_path / "both", split="train") == ROWS
    assert values(tmp_path / "both", "evaluation") == ROWS[:1]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_rows(str(tmp_path / "both"), {"split": "dev"}, "train", 0)


def test_a_folder_of_files_gives_the_split_that_is_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([{"prompt": name}]), tmp_path / f"{name}-00000-of-00001.parquet")
    assert values(tmp_path) == [{"prompt": "train"}] and values(tmp_path, "evaluation") == [{"prompt": "test"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a.csv:3: fewer values than the 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: more values than the 2 columns"),
        ("a.csv", b"a,b\n1,\xff\n", r"a.csv:2: not UTF-8"),
        ("a.parquet", b"PAR1 cut short", r"a.parquet: not a whole Parquet or Arrow file"),
        ("a.json", b'[{"prompt": "a"}, 3]', r"1 of 2 entries are no objects\n.*a.json\[1\]: found int"),
        ("a.json", b'[{"prompt": "a"},', r"a.json: malformed JSON array"),
        ("a.jsonl.gz", gzip.compress(LINES)[:40], r"a.jsonl.gz: cannot be read"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name), {}, "train", 0)


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "hf://datasets/nobody/nothing"):
        with pytest.raises(DataError, match=r"no such file or folder \(looked in .*\), and no data set of that name"):
            load_rows(name, {}, "train", 0)
    with pytest.raises(DataError, match="data/rows.jsonl: no such data file"):
        load_rows("data/rows.jsonl", {}, "train", 0)


def test_values_of_numpy_and_pandas_become_pythons_own_and_others_stay(tmp_path):
    (tmp_path / "gen.py").write_text(
        "import numpy as np, pandas as pd\nfrom datetime import date\n"
        "def rows():\n    return [{'a': np.array(['x', 'y']), 'n': np.int64(3), 'm': np.nan, 'd': date(2024, 1, 2),\n"
        "             'messages': np.array([{'role': 'user', 'content': None}], dtype=object), 'b': b'raw'}]\n"
        "def table():\n    return pd.DataFrame({'prompt': ['a', 'b'], 'answer': [1.0, None]})\n"
    )
    (row,) = values(f"{tmp_path}/gen.py:rows")
    assert row == {
        "a": ["x", "y"], "n": 3, "m": None, "d": date(2024, 1, 2), "messages": [{"role": "user", "content": None}],
        "b": b"raw",
    }  # fmt: skip
    assert type(row["n"]) is int
    assert values(f"{tmp_path}/gen.py:table") == [{"prompt": "a", "answer": 1.0}, {"prompt": "b", "answer": None}]
