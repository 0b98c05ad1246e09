"""Documents out of files of many formats, with whatever cannot be read named by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from instar.corpus.document import Document
from instar.corpus.hub import hub_rows
from instar.corpus.inputs import InputConfig, Piece
from instar.errors import UserError

COLUMNS = ("text", "content", "raw_content", "body", "markdown", "paragraphs")
"""Where the text of a record is looked for, in this order."""

READ = 1 << 16

ROWS = 1024
"""Rows of a Parquet file that are in memory at once."""

LARGEST_LIST = 1 << 28
"""Bytes of the longest JSON list, which has to be read as a whole."""


@dataclass(frozen=True)
class Fault:
    """Something that could not be read.

    Attributes:
        place: File, and line or record.
        problem: What is wrong with it.
    """

    place: str
    problem: str

    def refused(self) -> UserError:
        """The error that ends the work where nothing may be left out."""
        return UserError(
            f"{self.place} {self.problem}",
            "Mend it, or set `on_error: skip` to have such things left out and counted",
        )


class _Unreadable(Exception):  # noqa: N818 - not an error of ours
    """The rest of a file cannot be read."""


@dataclass(frozen=True)
class Reading:
    """How to read.

    Attributes:
        input: The source, and its columns.
        cut: Characters after which a plain text is cut, at the next blank line; 0 for never.
        largest: Bytes of the largest record that is taken.
    """

    input: InputConfig
    cut: int
    largest: int


def read_piece(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """The documents of a file, or of a stretch of one, and its faults, in their order."""
    last = f"{piece.path}, line {piece.line}" if piece.line > 1 else piece.path
    try:
        for found in READERS[piece.kind](piece, how):
            last = found.place
            yield found
    except _Unreadable as error:
        yield Fault(last, str(error))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Fault(last, f"is damaged behind this ({error})")
    except OSError as error:
        if error.errno is not None:  # the disk's, not the file's
            raise
        yield Fault(last, f"is damaged behind this ({error})")


def _open(piece: Piece) -> io.BufferedReader[Any]:
    """The unpacked bytes of a file, from where the piece begins."""
    path = Path(piece.path)
    if path.suffix == ".gz":
        return cast(Any, gzip.GzipFile(path))  # it has all that is asked of it
    if path.suffix == ".zst":
        import pyarrow

        packed: Any = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(packed, READ)
    stream: Any = path.open("rb", buffering=READ)
    stream.seek(piece.start)
    return stream


def _lines(piece: Piece, how: Reading) -> Iterator[tuple[int, str] | Fault]:
    """Number and text of each line; a fault for each that is too long or not in the encoding."""
    codec = "utf-8-sig" if how.input.encoding.lower() in ("utf-8", "utf8") else how.input.encoding
    with _open(piece) as stream:
        left = None if piece.stop is None else piece.stop - piece.start
        number = piece.line
        if (
            b"\0" in stream.peek(READ)[:READ]
        ):  # not in the first line alone: pictures begin with one
            raise _Unreadable("is a binary file, or in UTF-16; save text as UTF-8")
        while left is None or left > 0:
            line = stream.readline(how.largest)
            if not line:
                return
            size = len(line)
            if size == how.largest and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(READ)
                    size += len(line)
                problem = f"is {size >> 20} MB long, more than largest_record_mb"
                yield Fault(f"{piece.path}, line {number}", problem)
            else:
                try:
                    yield number, line.decode(codec)
                except UnicodeDecodeError as error:
                    problem = f"is not {how.input.encoding} at byte {error.start}"
                    yield Fault(f"{piece.path}, line {number}", problem)
            number += 1
            left = None if left is None else left - size


def _text(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """Plain text: one document, or several of at least ``cut`` characters, ending at blank lines.

    Where no blank line comes for as long as the largest record may be, any line's end will do. Of a
    text that is not all in the encoding, the lines that are not are left out.
    """
    held: list[str] = []
    size, since = 0, piece.line
    for item in _lines(piece, how):
        if isinstance(item, Fault):
            yield item
            continue
        number, line = item
        if not held:
            since = number
        held.append(line)
        size += len(line)
        if (how.cut and size >= how.cut and not line.strip()) or size >= how.largest:
            yield Document("".join(held), f"{piece.path}, line {since}", how.input.called())
            held, size = [], 0
    if "".join(held).strip():
        yield Document("".join(held), f"{piece.path}, line {since}", how.input.called())


def _json_lines(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """One JSON object a line."""
    find = _finder(how)
    for item in _lines(piece, how):
        if isinstance(item, Fault):
            yield item
            continue
        number, line = item
        if not line.strip():
            continue
        place = f"{piece.path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield Fault(place, f"is not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:  # or a number of thousands of digits
            yield Fault(place, f"cannot be read ({error})")
        else:
            yield find(record, place)


def _json_list(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """A list of objects in one file, or, as many a `.json` file is, one object a line."""
    with _open(piece) as stream:
        begin = stream.read(READ).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not begin.startswith(b"["):
            yield from _json_lines(piece, how)
            return
    with _open(piece) as stream:
        data = stream.read(LARGEST_LIST + 1)
    if len(data) > LARGEST_LIST:
        limit = f"{LARGEST_LIST >> 20} MB"
        raise _Unreadable(f"is a list of more than {limit}; write one object a line instead")
    try:
        records = json.loads(data.decode(how.input.encoding))
    except UnicodeDecodeError as error:
        raise _Unreadable(f"is not {how.input.encoding} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _Unreadable(f"is not JSON: {error.msg} (line {error.lineno})") from None
    except (RecursionError, ValueError) as error:
        raise _Unreadable(f"cannot be read ({error})") from None
    find = _finder(how)
    for number, record in enumerate(records, start=1):
        yield find(record, f"{piece.path}, item {number}")


def _table(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """Comma- or tab-separated values with a line of column names."""
    csv.field_size_limit(how.largest)
    faults: list[Fault] = []

    def plain() -> Iterator[str]:
        for item in _lines(piece, how):
            if isinstance(item, Fault):
                faults.append(item)
            else:
                yield item[1]

    is_tabbed = ".tsv" in Path(piece.path).suffixes
    rows = csv.DictReader(plain(), delimiter="\t" if is_tabbed else ",")
    find = _finder(how)
    try:
        for row in rows:
            yield from faults
            faults.clear()
            place = f"{piece.path}, line {rows.line_num}"
            if None in row.values() or None in row:
                yield Fault(place, f"does not have {len(rows.fieldnames or [])} columns")
            else:
                yield find(row, place)
    except csv.Error as error:
        raise _Unreadable(f"is not a table: {error}") from None
    yield from faults


def _parquet(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """Columns of a Parquet file, some rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    find = _finder(how)
    number = 0
    try:
        # Not by the column engine, which would take a name with brackets in it for a pattern.
        with pq.ParquetFile(piece.path, buffer_size=READ) as file:
            wanted = _wanted(file.schema_arrow.names, how.input)
            for batch in file.iter_batches(ROWS, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield find(record, f"{piece.path}, row {number}")
    except pa.ArrowException as error:
        raise _Unreadable(f"is not Parquet, or damaged ({str(error).splitlines()[0]})") from None


def _wanted(columns: list[str], source: InputConfig) -> list[str]:
    """The columns of a table that matter, so that the others are not read."""
    named = set(re.findall(r"{(\w+)}", source.text)) | {source.text}
    wanted = [c for c in columns if c in named] or [c for c in columns if c in COLUMNS][:1]
    return ([*wanted, "title"] if "title" in columns and "title" not in wanted else wanted) or [
        *columns
    ]


def _warc(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """The main text of every page that a web archive holds (ISO 28500)."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    seen = False
    kinds = WarcRecordType.response | WarcRecordType.conversion
    with Path(piece.path).open("rb") as stream:  # unpacks by itself
        for record in ArchiveIterator(stream, record_types=kinds):
            seen = True
            address = record.headers.get("WARC-Target-URI") or record.record_id
            place = f"{piece.path}, {address}"
            kind = record.http_content_type or record.headers.get("Content-Type") or ""
            is_text = record.record_type == WarcRecordType.conversion  # WET: text already
            if not (is_text or "html" in kind):
                yield Document("", place, how.input.called())  # a picture, a style: no text
            elif record.content_length > how.largest:
                yield Fault(place, "is longer than largest_record_mb")
            elif len(data := record.reader.read()) < record.content_length:
                yield Fault(place, "is cut off; is the file whole?")
            elif is_text:
                yield Document(data.decode("utf-8", "replace"), place, how.input.called())
            else:
                yield _page(data, place, how)
    if not seen:
        raise _Unreadable("holds no page; is it a WARC file, and whole?")


def _html(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """The main text of a page."""
    with _open(piece) as stream:
        data = stream.read(how.largest + 1)
    if len(data) > how.largest:
        raise _Unreadable("is longer than largest_record_mb")
    yield _page(data, piece.path, how)


def _page(data: bytes, place: str, how: Reading) -> Document | Fault:
    """A page without menus, advertisements and footers."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_encoding
    from resiliparse.parse.html import HTMLTree

    if b"\0" in data[:READ] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Fault(place, "is binary, not a page")
    tree = HTMLTree.parse_from_bytes(data, detect_encoding(data) or "utf-8")
    text = extract_plain_text(tree, main_content=True, alt_texts=False)
    return Document(text, place, how.input.called(), title=(tree.title or "").strip())


def _hub(piece: Piece, how: Reading) -> Iterator[Document | Fault]:
    """Rows ``start`` to ``stop`` of a dataset that the library ``datasets`` has fetched."""
    find = _finder(how)
    data = hub_rows(piece.path)
    rows = data.select(range(piece.start, piece.stop or len(data)))
    for number, record in enumerate(rows, start=piece.start + 1):
        yield find(record, f"{piece.path}, row {number}")


def _finder(how: Reading) -> Callable[[Any, str], Document | Fault]:
    """What turns a record into a document."""
    source, pattern = how.input.called(), how.input.text

    def find(record: Any, place: str) -> Document | Fault:
        if not isinstance(record, Mapping):
            return Fault(place, "is not a record with columns")
        try:
            text = _filled(pattern, record) if pattern else _first(record)
        except KeyError as missing:
            have = ", ".join(map(str, record))
            problem = f"has no column {missing}; it has {have}. Name the one with the text: `text:`"
            return Fault(place, problem)
        except UnicodeDecodeError as error:
            return Fault(place, f"is not utf-8 at byte {error.start}")
        except TypeError:
            return Fault(place, "has an object with columns of its own where its text should be")
        title = record.get("title")
        title = title if isinstance(title, str) else ""
        try:
            (text + title).encode()
        except UnicodeEncodeError:
            return Fault(place, "holds half a surrogate pair, which is no character")
        return Document(text, place, source, title=title)

    return find


def _first(record: Mapping[str, Any]) -> str:
    """The text of a record, where its columns have usual names."""
    there = [column for column in COLUMNS if column in record]
    if not there:
        raise KeyError("text")
    return _plain(record[next((c for c in there if record[c] is not None), there[0])])


def _filled(pattern: str, record: Mapping[str, Any]) -> str:
    """A column, or a pattern with columns in it."""
    if "{" not in pattern:
        return _plain(record[pattern])
    return re.sub(r"{(\w+)}", lambda column: _plain(record[column[1]]), pattern)


def _plain(value: Any) -> str:
    """A column's value as text, lists line by line; ``TypeError`` where there is an object."""
    if isinstance(value, Mapping):
        raise TypeError
    if isinstance(value, (list, tuple)):
        return "\n".join(map(_plain, value))
    if isinstance(value, bytes):
        return value.decode()
    return "" if value is None else str(value)


READERS: dict[str, Callable[[Piece, Reading], Iterator[Document | Fault]]] = {
    "text": _text,
    "lines": _json_lines,
    "list": _json_list,
    "table": _table,
    "parquet": _parquet,
    "warc": _warc,
    "html": _html,
    "hub": _hub,
}
"""Kind of a piece (``instar.corpus.inputs``) to what reads it."""
