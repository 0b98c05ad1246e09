"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instar.errors import UserError


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes ``target``'s place when the block ends well.

    Whatever stops the block (an error, a full disk, Ctrl-C), ``target`` stays as it was.
    """
    target = Path(os.path.abspath(target))  # which has a name, as `.` has none
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.writing")
    before = target.with_name(f".{target.name}.before")
    if before.exists() and not target.exists():
        before.rename(target)  # killed between the two renames below
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for written in [*beside.rglob("*"), beside]:
            settle(written)
        shutil.rmtree(before, ignore_errors=True)
        if target.exists():
            target.rename(before)
        beside.rename(target)
        settle(target.parent)
    finally:
        if before.exists() and not target.exists():
            before.rename(target)
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(beside, ignore_errors=True)


def is_free(path: Path) -> bool:
    """Whether a directory may be written there and nothing is lost: nothing is there, or empty."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def matching(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or in their order those that a pattern fits.

    Signs of patterns in the names of what is there, such as a folder `try[1]`, are only signs.
    """
    if path.exists():
        return [path]
    folder = next(parent for parent in path.parents if parent.exists())
    rest = str(path.relative_to(folder))
    if not any(sign in rest for sign in "*?["):
        return [path]
    return sorted(folder / found for found in glob.glob(rest, root_dir=folder))


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield the name of a file that takes ``target``'s place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.writing")
    try:
        yield beside
        settle(beside)
        os.replace(beside, target)
        settle(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk: no power cut undoes them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new, never half of it."""
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """``value`` as readable JSON, written as ``write_text`` does."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def whole_lines(path: Path) -> int:
    """Lines of a file of JSON lines that is added to; half a line at its end is cut off.

    A last line without a line break is whole if it is JSON (somebody wrote it by hand); otherwise
    a kill has left it there.
    """
    if not path.exists():
        return 0
    count, end, line = 0, 0, b"\n"
    with path.open("r+b") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        if not line.endswith(b"\n"):
            try:
                json.loads(line)
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
                count += 1
            except ValueError:
                stream.truncate(end)
    return count


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises ``UserError`` where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", "Is this the directory you meant?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})", "Write it again.") from None
