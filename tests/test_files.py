from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from instar.errors import UserError
from instar.files import (
    atomic_directory,
    is_free,
    matching,
    read_json,
    whole_lines,
    write_json,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_takes_the_old_ones_place(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as directory:
        (directory / "old").write_text("1")
    with atomic_directory(out) as directory:
        assert names(directory) == []
        assert names(out) == ["old"], "the old one stays until the new one is whole"
        (directory / "new").write_text("2")
    assert names(out) == ["new"]
    assert names(out.parent) == ["out"]


def test_the_directory_that_one_is_in_is_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_directory(Path()) as directory:
        (directory / "new").write_text("1")
    assert names(tmp_path / "here") == ["new"]


def test_nothing_is_lost_where_nothing_is(tmp_path: Path) -> None:
    assert is_free(tmp_path) and is_free(tmp_path / "out")
    (tmp_path / "file").touch()
    assert not is_free(tmp_path) and not is_free(tmp_path / "file")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_directory_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as directory:
        (directory / "old").write_text("1")
    with pytest.raises(error), atomic_directory(out) as directory:
        (directory / "new").write_text("2")
        raise error
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as directory:
        (directory / "old").write_text("1")
    rename = Path.rename

    def fails_once(self: Path, target: Path) -> Path:
        if self.name == ".out.writing":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(KeyboardInterrupt), atomic_directory(out) as directory:
        (directory / "new").write_text("2")
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".out.before").mkdir()
    (tmp_path / ".out.before" / "old").write_text("1")
    (tmp_path / ".out.writing").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]


def test_small_files_are_whole_or_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"春": 1})
    assert read_json(path) == {"春": 1}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "half")
    assert read_json(path) == {"春": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"no such file: .*a\.json"):
        read_json(path)
    for content in (b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json is not JSON"):
            read_json(path)


def test_patterns_below_folders_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "try[1]"
    folder.mkdir()
    for name in ("b.txt", "a.txt", "c[2].txt"):
        (folder / name).touch()
    assert matching(folder / "*.txt") == [folder / n for n in ("a.txt", "b.txt", "c[2].txt")]
    assert matching(folder / "[ab].txt") == [folder / "a.txt", folder / "b.txt"]
    assert matching(folder / "c[2].txt") == [folder / "c[2].txt"]
    assert matching(folder / "none.txt") == [folder / "none.txt"]
    assert matching(folder / "none*") == []


@pytest.mark.parametrize(
    ("before", "lines", "after"),
    [
        (b"", 0, b""),
        (b'{"a": 1}\n', 1, b'{"a": 1}\n'),
        (b'{"a": 1}\n{"a": "\xe4\xb8', 1, b'{"a": 1}\n'),
        (b'{"a": 1', 0, b""),
        (b'{"a": 1}\n{"a": 2}', 2, b'{"a": 1}\n{"a": 2}\n'),
    ],
)
def test_half_a_line_at_the_end_is_cut_off(tmp_path, before: bytes, lines: int, after: bytes):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == 0
    path.write_bytes(before)
    assert whole_lines(path) == lines
    assert path.read_bytes() == after
