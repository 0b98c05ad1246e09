"""Files of JSON records in and out, with every mistake named by file and line."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from instar.data.formats import FORMATS, KEYS, Kind, convert, recognise
from instar.data.schema import Role
from instar.errors import UserError

TYPES: dict[str, type] = {
    "text": str,
    "messages": list,
    "chosen": str,
    "rejected": str,
    "verifier": str,
    "answer": str,
}
"""What the keys of ``instar.data.schema`` must hold."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Record(dict[str, Any]):
    """A JSON object that knows where it stood, for whoever finds a mistake in it later.

    Attributes:
        place: File and line.
    """

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def place_of(record: Mapping[str, object], otherwise: str) -> str:
    """File and line of a record; ``otherwise`` where it was not read from a file."""
    return getattr(record, "place", otherwise)


def read_records(path: Path, required: tuple[str, ...] = ()) -> Iterator[Record]:
    """The objects of a file, one at a time: a line each, or a ``.json`` file with a list of them.

    Objects in another format that ``instar.data.formats`` knows, and that fits what is required,
    are converted. A name that ends with ``.gz`` is unpacked.

    Args:
        path: The file, UTF-8.
        required: Keys that every object must have.

    Raises:
        UserError: The file is missing, or holds something that is not UTF-8, not Unicode, or not
            such an object; it names the line.
    """
    is_list = ".json" in path.suffixes
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            pieces = _items(stream.read(), path) if is_list else enumerate(stream, start=1)
            for number, text in pieces:
                if text.strip():
                    yield _parse(text, f"{path}, line {number}", required)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", "Check the path in the config.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory", "Name a .jsonl file inside it.") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error})", "Fetch or pack it again.") from None


def _items(data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """The items of a JSON list, each with the line on which it begins."""
    text, decoder = _decoded(data, str(path)), json.JSONDecoder()
    blank = re.compile(r"[\s,]*")
    begin = re.match(r"\s*\[", text)
    if begin is None:
        raise UserError(f"{path} is not a JSON list", "Name it .jsonl if it has an object a line.")
    at, line, counted = blank.match(text, begin.end()).end(), 1, 0  # type: ignore[union-attr]
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {error.lineno} is not JSON: {error.msg}",
                f"Mend the item that begins on line {line}.",
            ) from None
        yield line, text[at:end].encode()
        at = blank.match(text, end).end()  # type: ignore[union-attr]
    if at == len(text):
        raise UserError(f"{path} ends before its list does", "It was cut off; fetch it again.")


def _decoded(data: bytes, place: str) -> str:
    try:
        # Some editors begin a file with an invisible mark, which JSON does not know.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 (at byte {error.start})",
            "Convert the file, for example with `iconv -f GB18030 -t UTF-8`.",
        ) from None


def _parse(data: bytes, place: str, required: tuple[str, ...]) -> Record:
    """One object that has the required keys."""
    try:
        record = json.loads(_decoded(data, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg}", "Mend or remove the line.") from None
    if _SURROGATE.search(data):
        _check_surrogates(record, place)
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object", "Write each line as {...}.")
    kind: Kind | None = next((k for k, keys in KEYS.items() if keys == required), None)
    if kind and not _is_ours(record, required):
        record = _converted(record, kind, place)
    for key in required:
        if key not in record:
            raise UserError(f"{place} has no `{key}`", _needed(record, required))
        value_type = TYPES.get(key, object)
        if not isinstance(record[key], value_type):
            raise UserError(
                f"{place}: `{key}` is {record[key]!r}", f"Make it a {value_type.__name__}."
            )
    return Record(record, place)


def _is_ours(record: Mapping[str, Any], required: tuple[str, ...]) -> bool:
    """Whether a record is in our own words already."""
    if not record.keys() >= set(required) or "tools" in record:
        return False
    turns = record.get("messages", []) if "messages" in required else []
    return not isinstance(turns, list) or all(
        isinstance(turn, dict)
        and turn.get("role") in get_args(Role)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )


def _converted(record: dict[str, Any], kind: Kind, place: str) -> dict[str, Any]:
    """The record in our words; as it is where no format fits, for the checks to complain."""
    try:
        return convert(record, kind) or record
    except UserError as error:
        raise UserError(f"{place}: {error.problem}", error.remedy) from None


def _needed(record: Mapping[str, Any], required: tuple[str, ...]) -> str:
    """What a record should have had, and what it looks like instead."""
    found = recognise(record)
    looks = f" It looks like {found.name}, which does not fit." if found else ""
    kinds = [kind for kind, keys in KEYS.items() if keys == required]
    others = [form.name for form in FORMATS if kinds and kinds[0] in form.makes]
    known = f" (or one of these formats: {', '.join(others)})" if others else ""
    return f"Each line needs: {', '.join(required)}{known}.{looks}"


def _check_surrogates(value: object, place: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise UserError(
            f"{place} is not Unicode: it holds {half!a}, half of a surrogate pair",
            "Mend or remove the line; a character was probably cut in two.",
        ) from None


def read_all(paths: Iterable[Path], required: tuple[str, ...]) -> list[Record]:
    """The objects of several files.

    Raises:
        UserError: As ``read_records`` does, or there is no object, or none with any text in it.
    """
    paths = list(paths)
    records = [record for path in paths for record in read_records(path, required)]
    names = ", ".join(map(str, paths)) or "(no file)"
    if not records:
        raise UserError(f"no data in {names}", "Name files with at least one line.")
    texts = [key for key in required if TYPES.get(key) is str]
    if texts and not any(record[key].strip() for record in records for key in texts):
        raise UserError(f"no text in {names}: every `{texts[0]}` is empty", "Name other files.")
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line and return how many there were."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count
