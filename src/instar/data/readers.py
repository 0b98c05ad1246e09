"""JSON-lines files in and out, with every mistake named by file and line."""

from __future__ import annotations

import json
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


def read_jsonl(path: Path, required: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one at a time.

    Args:
        path: The file, UTF-8.
        required: Keys that every object must have.

    Raises:
        UserError: The file is missing, is not UTF-8, or a line is not such an object.
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


def _parse(line: bytes, place: str, required: tuple[str, ...]) -> dict[str, Any]:
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
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object", "Write each line as {...}.")
    for key in required:
        if key not in record:
            raise UserError(f"{place} has no `{key}`", f"Each line needs: {', '.join(required)}.")
        kind = TYPES.get(key, object)
        if not isinstance(record[key], kind):
            raise UserError(f"{place}: `{key}` is {record[key]!r}", f"Make it a {kind.__name__}.")
    return record


def read_all(paths: Iterable[Path], required: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of several files; raises ``UserError`` where there is none at all."""
    paths = list(paths)
    records = [record for path in paths for record in read_jsonl(path, required)]
    if not records:
        names = ", ".join(map(str, paths)) or "(no file)"
        raise UserError(f"no data in {names}", "Name files with at least one line.")
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line and return how many there were."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count
