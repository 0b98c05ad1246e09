"""JSON-lines files in and out, with every mistake named by file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def read_jsonl(path: Path, required: tuple[str, ...] = ()) -> Iterator[Record]:
    """The objects of a JSON-lines file, one at a time.

    Args:
        path: The file, UTF-8.
        required: Keys that every object must have.

    Raises:
        UserError: The file is missing, or a line is not UTF-8, not Unicode or not such an object.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}", required)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", "Check the path in the config.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory", "Name a .jsonl file inside it.") from None


def _parse(line: bytes, place: str, required: tuple[str, ...]) -> Record:
    """One line as an object that has the required keys."""
    try:
        # Some editors begin a file with an invisible mark, which JSON does not know.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 (byte {error.start} of the line)",
            "Convert the file, for example with `iconv -f GB18030 -t UTF-8`.",
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg}", "Mend or remove the line.") from None
    if _SURROGATE.search(line):
        _check_surrogates(record, place)
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object", "Write each line as {...}.")
    for key in required:
        if key not in record:
            raise UserError(f"{place} has no `{key}`", f"Each line needs: {', '.join(required)}.")
        kind = TYPES.get(key, object)
        if not isinstance(record[key], kind):
            raise UserError(f"{place}: `{key}` is {record[key]!r}", f"Make it a {kind.__name__}.")
    return Record(record, place)


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
        UserError: As ``read_jsonl`` does, or there is no object, or none with any text in it.
    """
    paths = list(paths)
    records = [record for path in paths for record in read_jsonl(path, required)]
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
