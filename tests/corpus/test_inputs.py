"""Every kind of file gives the documents that are in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("daft")

from instar.errors import UserError

ROWS = [
    {"title": "The mill", "text": "The wheel turned slowly.\nThe miller slept."},
    {"title": "水磨", "text": "水车慢慢地转，磨坊主睡着了。"},
    {"title": "Quotes", "text": 'He said, "wait", and\tleft; a comma, too.'},
]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["title", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def page(title: str, text: str) -> bytes:
    menu = "<nav><a href='/'>Home</a> <a href='/shop'>Shop</a></nav>"
    body = f"{menu}<main><article><p>{text}</p></article></main>"
    return f"<html><head><title>{title}</title></head><body>{body}</body></html>".encode()


def warc() -> bytes:
    """A web archive by the book (ISO 28500): a note, then a page a row."""
    records = [("warcinfo", "application/warc-fields", "", b"software: by hand\r\n")]
    for number, row in enumerate(ROWS):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
        kind = "application/http; msgtype=response"
        address = f"http://mill.example/{number}"
        records.append(("response", kind, address, head + page(row["title"], row["text"])))
    out = b""
    for number, (name, kind, address, body) in enumerate(records):
        lines = [
            "WARC/1.0",
            f"WARC-Type: {name}",
            f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012}>",
            "WARC-Date: 2024-01-01T00:00:00Z",
            *([f"WARC-Target-URI: {address}"] if address else []),
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
        ]
        out += "\r\n".join(lines).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"
    return out


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def read(tmp_path: Path, build: Any, plain: Any, records: Any) -> Callable[..., list[Any]]:
    """What a corpus of these inputs holds, if nothing is changed."""

    def read(*inputs: Any, **recipe: Any) -> list[Any]:
        build(tmp_path / "out", inputs, **plain | {"valid_share": 0} | recipe)
        return records(tmp_path / "out")

    return read


FILES = {
    "a.jsonl": LINES,
    "a.ndjson": b"\xef\xbb\xbf" + LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES,
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": table(","),
    "a.csv.gz": gzip.compress(table(",")),
    "a.tsv": table("\t"),
    "a.tsv.zst": zstd(table("\t")),
    "a.parquet": parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_records(name: str, tmp_path: Path, read: Any) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    found = read(tmp_path / name)
    assert [row["text"] for row in found] == TEXTS
    assert [row["title"] for row in found] == [row["title"] for row in ROWS]
    assert all(row["place"].startswith(f"{tmp_path / name}, ") for row in found)
    assert {row["source"] for row in found} == {name}


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.zst", "A.TXT"])
def test_plain_text(name: str, tmp_path: Path, read: Any) -> None:
    data = "\n\n".join(TEXTS).encode()
    packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(packed(data))
    assert [row["text"] for row in read(tmp_path / name)] == ["\n\n".join(TEXTS)]


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path, read: Any) -> None:
    paragraphs = [f"Paragraph {n}.\n" + "All is well here.\n" * (n % 7) for n in range(40_000)]
    whole = "\n".join(paragraphs)
    assert len(whole) > 2 << 20, "several stretches"
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    found = read(tmp_path / "a.txt", cut=5000, partition_mb=0.5)
    assert "".join(row["text"] for row in found) == whole
    assert all(len(row["text"]) >= 5000 for row in found[:-1:20])
    assert max(len(row["text"]) for row in found) < 5300
    lines = whole.split("\n")
    for row in found[::50]:
        line = int(row["place"].rpartition(" ")[2])
        assert lines[line - 1] == row["text"].split("\n")[0]


def test_a_text_is_left_whole_where_asked(tmp_path: Path, read: Any) -> None:
    whole = "Two lines of a book.\nNo more.\n\n" * 90_000
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    found = read(tmp_path / "a.txt", cut=0, partition_mb=0.5)
    assert [row["text"] == whole for row in found] == [True]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_pages_of_an_archive(name: str, tmp_path: Path, read: Any) -> None:
    pytest.importorskip("fastwarc")
    data = warc()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = read(tmp_path / name)
    assert [" ".join(row["text"].split()) for row in found] == [" ".join(t.split()) for t in TEXTS]
    assert [row["title"] for row in found] == [row["title"] for row in ROWS]
    assert found[1]["place"] == f"{tmp_path / name}, http://mill.example/1"


@pytest.mark.parametrize("name", ["a.html", "a.htm", "a.html.gz"])
def test_a_page(name: str, tmp_path: Path, read: Any) -> None:
    pytest.importorskip("resiliparse")
    data = page("水磨", TEXTS[1])
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [(row["title"], row["text"]) for row in read(tmp_path / name)] == [("水磨", TEXTS[1])]


def test_older_chinese_files(tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[1], encoding="gb18030")
    found = read({"path": str(tmp_path / "a.txt"), "encoding": "gb18030"})
    assert [row["text"] for row in found] == [TEXTS[1]]


def test_folders_and_patterns(tmp_path: Path, build: Any, plain: Any, records: Any) -> None:
    files = ["b/2.txt", "b/1.txt", "a/3.md", ".hidden/4.txt", "b/5.pdf", "b/.git/x/7.txt"]
    for number, name in enumerate(files):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"Text {number}.")
    (tmp_path / "in" / "b" / ".6.txt").write_text("Text 6.")
    _, manifest = build(tmp_path / "x", [tmp_path / "in" / "b"], **plain, valid_share=0)
    assert [row["text"] for row in records(tmp_path / "x")] == ["Text 1.", "Text 0."]
    assert manifest["ignored"] == [str(tmp_path / "in/b/5.pdf")]
    names = {Path(file["path"]).name: file for file in manifest["inputs"][0]["files"]}
    assert names.keys() == {"1.txt", "2.txt"} and names["1.txt"]["bytes"] == 7
    build(tmp_path / "y", [tmp_path / "in" / "*" / "*.txt"], **plain, valid_share=0)
    assert [row["text"] for row in records(tmp_path / "y")] == ["Text 1.", "Text 0."]


@pytest.mark.parametrize(
    ("row", "column", "text"),
    [
        ({"content": "a b", "url": "c"}, "", "a b"),
        ({"markdown": "a b", "text": None}, "", "a b"),
        ({"paragraphs": ["a", "b"]}, "", "a\nb"),
        ({"story": "a b", "text": "c"}, "story", "a b"),
        ({"title": "T", "paragraphs": ["a", "b"]}, "{title}\n\n{paragraphs}", "T\n\na\nb"),
        ({"a": 1, "b": None}, "{a}: {b}.", "1: ."),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_columns(row: Any, column: str, text: str, ending: str, tmp_path: Path, read: Any) -> None:
    path = tmp_path / f"a[1].{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert [found["text"] for found in read({"path": str(path), "text": column})] == [text]


def test_a_record_without_a_text_is_empty_and_no_fault(
    tmp_path: Path, build: Any, plain: Any, records: Any
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "a b"}\n')
    _, manifest = build(tmp_path / "out", [tmp_path / "a.jsonl"], **plain)
    assert [row["text"] for row in records(tmp_path / "out")] == ["a b"]
    assert manifest["flows"]["read"]["drops"]["no text"]["documents"] == 2


def test_a_dataset_that_is_not_there_says_how_to_bring_it(
    tmp_path: Path, build: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        build(tmp_path / "out", ["mill-press/no-such-texts:small"], **plain)
    assert "mill-press/no-such-texts:small" in caught.value.problem
    assert "hf download mill-press/no-such-texts --repo-type dataset" in caught.value.remedy
    assert "--include 'small/*'" in caught.value.remedy and "--input DIR" in caught.value.remedy


def test_a_dataset_is_read_in_stretches_of_rows(
    tmp_path: Path, build: Any, plain: Any, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"Row {number}." for number in range(25)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr("instar.corpus.run.HUB_ROWS", 10)
    build(tmp_path / "out", ["mill-press/texts"], **plain, valid_share=0)
    assert [row["text"] for row in records(tmp_path / "out")] == rows["text"][:]
    files = sorted((tmp_path / "out" / "documents").glob("train-*"))
    assert [len(file.read_text().splitlines()) for file in files] == [10, 10, 5]
