"""What cannot be read is named by file and line, or skipped and counted; nothing else is lost."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("daft")

from instar.errors import UserError

GOOD = [f"Line {number} of the mill's long book is good." for number in range(1, 2001)]
LINES = [json.dumps({"text": text}) for text in GOOD]
NOISE = bytes(range(256)) * 64


def jsonl(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def damaged(data: bytes) -> bytes:
    """A gzip file whose first block is of a kind that does not exist (RFC 1951, 3.2.3)."""
    return data[:10] + b"\x07" + data[11:]


def parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


PACKED = gzip.compress(jsonl([json.dumps({"text": f"{n * n} {n**3} {n**5}"}) for n in range(9000)]))
BROKEN = jsonl([*LINES[:2], LINES[2][:20], *LINES[3:5]])

BAD: dict[str, tuple[bytes, str, int]] = {
    # Name: its bytes, what is said of it, how many documents are in it all the same.
    "cut.jsonl.gz": (PACKED[: len(PACKED) // 2], r", line \d{3,4} .*damaged", -1),
    "damaged.jsonl.gz": (damaged(PACKED), r"\.gz .*damaged", 0),
    "none.jsonl.gz": (jsonl(LINES[:3]), r"\.gz .*damaged", 0),
    "cut.txt.zst": (zstd(NOISE[10:30] * 99 + os.urandom(70_000))[:50_000], "", 0),
    "noise.txt": (NOISE, "binary", 0),
    "noise.jsonl": (NOISE, "binary", 0),
    "wide.txt": (GOOD[0].encode("utf-16"), "in UTF-16", 0),
    "noise.csv": (NOISE, "binary", 0),
    "noise.parquet": (NOISE, "not Parquet, or damaged", 0),
    "cut.parquet": (parquet({"text": GOOD})[:-99], "not Parquet, or damaged", 0),
    "empty.parquet": (b"", "not Parquet, or damaged", 0),
    "noise.warc": (NOISE, r"noise\.warc ", 0),
    "empty.warc": (b"", "holds no page", 0),
    "noise.html": (NOISE, "binary", 0),
    "broken.jsonl": (BROKEN, r"broken\.jsonl, line 3 is not JSON", 4),
    "number.jsonl": (jsonl([*LINES[:2], "1" * 5000]), r"number\.jsonl, line 3 ", 2),
    "deep.jsonl": (jsonl([*LINES[:2], "[" * 10**5]), r"deep\.jsonl, line 3 ", 2),
    "bare.jsonl": (jsonl([LINES[0], "7"]), r"bare\.jsonl, line 2 is not a record", 1),
    "half.jsonl": (jsonl([LINES[0], r'{"text": "\ud800"}']), r"line 2 holds half a surrogate", 1),
    "title.jsonl": (
        jsonl([LINES[0], r'{"text": "a b", "title": "\ud800"}']),
        r"line 2 holds half a surrogate",
        1,
    ),
    "object.jsonl": (jsonl([LINES[0], '{"text": [{"a": 1}]}']), r"line 2 has an object", 1),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\nabc\n" + NOISE, "binary", 0),
    "missing.jsonl": (jsonl([LINES[0], '{"url": "x"}']), r"line 2 has no column 'text'; .* url", 1),
    "missing.parquet": (parquet({"url": ["x"]}), r"row 1 has no column 'text'; .* url", 0),
    "bytes.parquet": (parquet({"text": [b"a b", b"\xff"]}), "row 2 is not utf-8 at byte 0", 1),
    "missing.csv": (b"url,size\nx,3\n", r"missing\.csv, line 2 has no column 'text'", 0),
    "ragged.csv": (b"text,size\na b,3\nc d\ne f,4\n", r"line 3 does not have 2 columns", 2),
    "list.json": (b'[{"text": "a b"},\n {"text": }]', r"not JSON: .*line 2", 0),
    "long.jsonl": (
        jsonl([LINES[0], json.dumps({"text": "x" * (3 << 20)}), LINES[1]]),
        r"long\.jsonl, line 2 is 3 MB long, more than largest_record_mb",
        2,
    ),
    "chinese.txt": ("春眠不觉晓，\n".encode() + "处处闻啼鸟。\n".encode("gb18030"), "line 2", 1),
    "chinese.jsonl": (
        jsonl(LINES[:1]) + '{"text": "处处闻啼鸟。"}\n'.encode("gb18030"),
        r"chinese\.jsonl, line 2 is not utf-8",
        1,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file(name: str, tmp_path: Path, build: Any, plain: Any, records: Any) -> None:
    data, said, left = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "good.txt").write_text(GOOD[-1])
    recipe: dict[str, Any] = plain | {"valid_share": 0, "largest_record_mb": 2}
    with pytest.raises(UserError) as caught:
        build(tmp_path / "out", [tmp_path / "in"], **recipe)
    assert str(tmp_path / "in" / name) in caught.value.problem
    assert re.search(said, caught.value.problem)
    assert "on_error: skip" in caught.value.remedy
    _, manifest = build(tmp_path / "out", [tmp_path / "in"], **recipe, on_error="skip")
    found = records(tmp_path / "out")
    mine = [row for row in found if name in row["place"]]
    assert len(found) == len(mine) + 1, "the good one is there"
    assert len(mine) == left or (left < 0 and 0 < len(mine) < 9000)
    faults = manifest["faults"]
    assert faults["documents"] == 1
    (example,) = faults["examples"]
    assert name in example["place"]
    assert re.search(said, f"{example['place']} {example['text']}")


def test_empty_files_are_read(tmp_path: Path, build: Any, plain: Any, records: Any) -> None:
    """They hold nothing, and there is nothing wrong with that."""
    for name in ("a.txt", "b.jsonl", "c.csv", "d.json"):
        (tmp_path / name).touch()
    (tmp_path / "e.txt").write_text(GOOD[0])
    _, manifest = build(tmp_path / "out", [tmp_path / "*.*"], **plain, valid_share=0)
    assert [row["text"] for row in records(tmp_path / "out")] == [GOOD[0]]
    assert manifest["faults"]["documents"] == 0
    assert len(manifest["inputs"][0]["files"]) == 5


def test_a_name_that_is_not_unicode(tmp_path: Path, build: Any, plain: Any, records: Any) -> None:
    (tmp_path / "in").mkdir()
    try:
        for name in (b"odd\xff.txt", b"odd\xff.pdf"):
            (tmp_path / "in" / os.fsdecode(name)).write_text(GOOD[0])
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "in" / "b.txt").write_text(GOOD[1])
    with pytest.raises(UserError, match=r"odd\?\.txt has a name that is not UTF-8"):
        build(tmp_path / "out", [tmp_path / "in"], **plain)
    _, manifest = build(tmp_path / "out", [tmp_path / "in"], **plain, on_error="skip")
    assert [row["text"] for row in records(tmp_path / "out")] == [GOOD[1]]
    assert manifest["faults"]["documents"] == 1
    assert manifest["ignored"] == [str(tmp_path / "in" / "odd?.pdf")]


# --- Where the corpus goes


@pytest.mark.parametrize("name", ["documents/mine.txt", "manifest.json", "lineage.json"])
def test_what_is_no_corpus_is_not_replaced(
    name: str, tmp_path: Path, build: Any, plain: Any
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    (tmp_path / "a.txt").write_text(GOOD[0])
    with pytest.raises(UserError, match="which no corpus left there"):
        build(tmp_path / "out", [tmp_path / "a.txt"], **plain)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


def test_a_corpus_is_not_made_within_its_input(tmp_path: Path, build: Any, plain: Any) -> None:
    (tmp_path / "a.txt").write_text(GOOD[0])
    for out in (tmp_path, tmp_path / "x" / "out"):
        with pytest.raises(UserError, match="lies within the input"):
            build(out, [tmp_path], **plain)


# --- What is asked for


def test_nothing_to_read(tmp_path: Path, build: Any, plain: Any) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(NOISE)
    (tmp_path / "a.txt").write_text(GOOD[0])
    for inputs, problem, remedy in (
        ([], "no input", "--input"),
        ([tmp_path / "none"], "nothing to read", "folder"),
        ([tmp_path / "absent.txt"], "nothing to read", "folder"),
        ([tmp_path / "*.md"], "nothing to read", "pattern"),
        ([tmp_path / "pictures"], "could be read", ".jsonl"),
        ([tmp_path / "pictures" / "a.png"], "how to read it", ".jsonl"),
        ([tmp_path / "a.txt"] * 2, "two inputs are called 'a.txt'", "name"),
    ):
        with pytest.raises(UserError) as caught:
            build(tmp_path / "out", inputs, **plain)
        assert problem in caught.value.problem and remedy in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_an_encoding_that_nobody_knows(tmp_path: Path, build: Any, plain: Any) -> None:
    (tmp_path / "a.txt").write_text(GOOD[0])
    given = {"path": str(tmp_path / "a.txt"), "encoding": "klingon"}
    with pytest.raises(UserError, match="klingon"):
        build(tmp_path / "out", [given], **plain)


@pytest.mark.parametrize("tokenizer", [None, {"vocab_size": 500}])
def test_everything_dropped(tokenizer: Any, tmp_path: Path, build: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(LINES[:20]))
    with pytest.raises(UserError) as caught:
        build(tmp_path / "out", [tmp_path / "a.jsonl"], tokenizer=tokenizer)
    assert "no document is left" in caught.value.problem
    assert "too few words" in str(caught.value), "what dropped most"


def test_an_unreadable_file(
    tmp_path: Path, build: Any, plain: Any, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(GOOD[0])
    (tmp_path / "b.txt").write_text(GOOD[1])
    if os.geteuid():
        (tmp_path / "a.txt").chmod(0)
    else:  # nothing is forbidden to root
        opened = Path.open

        def forbidden(path: Path, *rest: Any, **more: Any) -> Any:
            if path.name == "a.txt":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return opened(path, *rest, **more)

        monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"a\.txt .*Permission denied"):
        build(tmp_path / "out", [tmp_path / "*.txt"], **plain)
    skipped = plain | {"valid_share": 0, "on_error": "skip"}
    _, manifest = build(tmp_path / "out", [tmp_path / "*.txt"], **skipped)
    assert [row["text"] for row in records(tmp_path / "out")] == [GOOD[1]]
    assert manifest["faults"]["documents"] == 1
    assert manifest["faults"]["examples"][0]["place"] == str(tmp_path / "a.txt")


# --- What was done already


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Six files, a partition each; the fifth has a line that is not JSON."""
    paths = [tmp_path / "in" / f"{number}.jsonl" for number in range(6)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        path.write_bytes(jsonl(LINES[number * 300 : number * 300 + 300]))
    paths[4].write_bytes(paths[4].read_bytes().replace(b'{"text"', b'{"text', 1))
    return paths


def finished(out: Path) -> dict[str, int]:
    """Partitions that have been cleaned, and when."""
    done = out.glob(".work/*/clean/*.json")
    return {path.name: path.with_suffix(".parquet").stat().st_mtime_ns for path in done}


@pytest.mark.parametrize("remedy", ["mend", "skip"])
def test_after_the_remedy_it_goes_on_where_it_was(
    remedy: str,
    many: list[Path],
    tmp_path: Path,
    build: Any,
    plain: Any,
    records: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe: dict[str, Any] = plain | {"partition_mb": 0.02, "valid_share": 0}
    with pytest.raises(UserError, match=r"4\.jsonl, line 1 is not JSON"):
        build(tmp_path / "out", [tmp_path / "in"], **recipe)
    before = finished(tmp_path / "out")
    assert len(before) == 4
    if remedy == "mend":
        many[4].write_bytes(jsonl(LINES[1200:1500]))
    else:
        recipe["on_error"] = "skip"
    from instar.corpus import prepare

    seen: dict[str, int] = {}
    publish = prepare._publish
    monkeypatch.setattr(
        prepare, "_publish", lambda run: (seen.update(finished(tmp_path / "out")), publish(run))
    )
    build(tmp_path / "out", [tmp_path / "in"], **recipe)
    assert len(records(tmp_path / "out")) == (1800 if remedy == "mend" else 1799)
    assert len(seen) == 6
    assert before.items() <= seen.items(), "what was finished was done again"


# --- Memory and disk

SLOW = pytest.mark.slow

RUN = """
import sys
from instar.corpus.config import CorpusConfig
from instar.corpus.prepare import prepare
from instar.corpus.workers import Workers
from instar.lineage import peak_rss_bytes
from instar.training.display import Display
from pathlib import Path

steps = dict.fromkeys(("repair", "language", "personal", "quality", "contamination"))
config = CorpusConfig.parse(
    {"inputs": [{"path": sys.argv[1]}], "tokenizer": None, "on_error": "skip", "steps": steps,
     "largest_record_mb": float(sys.argv[3])}, "test")
with Workers("local", 1) as workers:
    prepare(config, Path(sys.argv[2]), workers, Display())
print(peak_rss_bytes() >> 20)
"""


def run(*given: Any, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own; it prints last how many MiB it held."""
    command = [sys.executable, "-c", RUN, *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=before)


@pytest.mark.parametrize(
    "ending", ["jsonl", *(pytest.param(x, marks=SLOW) for x in ("txt", "csv"))]
)
def test_a_line_of_100_mb_takes_no_memory(ending: str, tmp_path: Path, records: Any) -> None:
    path = tmp_path / f"a.{ending}"
    with path.open("w") as stream:
        stream.write({"txt": "", "jsonl": '{"text": "', "csv": "text\n"}[ending])
        for _ in range(100):
            stream.write("a line of text " * (2**20 // 15))
        stream.write({"jsonl": '"}'}.get(ending, ""))
        stream.write("\n" + {"jsonl": LINES[0]}.get(ending, GOOD[0]) + "\n")
    done = run(path, tmp_path / "out", 8)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1024
    assert [row["text"].strip() for row in records(tmp_path / "out")] == [GOOD[0]]
    faults = json.loads((tmp_path / "out" / "manifest.json").read_text())["faults"]
    assert re.search("is (99|100) MB long", faults["examples"][0]["text"])


def test_a_text_without_blank_lines_is_cut_all_the_same(
    tmp_path: Path, build: Any, plain: Any, records: Any
) -> None:
    whole = "".join(f"{line}\n" for line in GOOD * 20)
    (tmp_path / "a.txt").write_text(whole)
    recipe = plain | {"valid_share": 0, "largest_record_mb": 0.25}
    build(tmp_path / "out", [tmp_path / "a.txt"], **recipe)
    found = [row["text"] for row in records(tmp_path / "out")]
    assert "".join(found) == whole
    assert max(map(len, found)) < 0.3 * 2**20


def test_a_disk_that_fills_leaves_what_was_done(
    many: list[Path], tmp_path: Path, build: Any, plain: Any, records: Any
) -> None:
    many[4].write_bytes(jsonl([json.dumps({"text": f"{n**9} {n**11}"}) for n in range(9000)]))
    recipe: dict[str, Any] = plain | {"partition_mb": 0.02, "valid_share": 0}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(OSError):
            build(tmp_path / "out", [tmp_path / "in"], **recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(finished(tmp_path / "out")) >= 4
    assert not list((tmp_path / "out").glob(".work/*/*/.*")), "half a file"
    assert not (tmp_path / "out" / "manifest.json").exists()
    build(tmp_path / "out", [tmp_path / "in"], **recipe)
    assert len(records(tmp_path / "out")) == 5 * 300 + 9000
