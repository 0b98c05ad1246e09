"""Token shards: a corpus as arrays of ids on the disk, read without loading them.

A shard is two files that numpy opens by itself: ``NAME.npy``, the ids of its documents behind one
another, and ``NAME.ends.npy``, where each document ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from instar.errors import UserError

ENDS = ".ends.npy"

OPEN = 128
"""Shards that are open at once: each counts as an open file, of which a process may often have no
more than 1,024."""


def write_shard(directory: Path, name: str, ids: np.ndarray, ends: np.ndarray) -> None:
    """Write one shard; whoever wants both files or neither renames the directory.

    Args:
        directory: Where.
        name: Its name, without the suffix.
        ids: All tokens ``(N,)``.
        ends: For each document, the place after its last token ``(D,)``, ascending.
    """
    np.save(directory / f"{name}.npy", ids)
    np.save(directory / f"{name}{ENDS}", ends.astype(np.int64))


def is_shards(path: Path) -> bool:
    """Whether a path is a directory of shards."""
    return path.is_dir() and any(path.glob(f"*{ENDS}"))


class Tokens:
    """The tokens of some shards as one sequence, of which only what is asked for is read.

    Args:
        paths: Their files, in order.

    Raises:
        UserError: One of them is damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._begins = np.cumsum([0, *(len(_mapped(path)) for path in paths)])
        self._opened = lru_cache(OPEN)(_mapped)

    @classmethod
    def open(cls, directory: Path, part: str = "train") -> Tokens:
        """The shards of a directory whose names begin with ``part``.

        Raises:
            UserError: There are none, or one of them is damaged.
        """
        paths = sorted(p for p in directory.glob(f"{part}-*.npy") if not p.name.endswith(ENDS))
        if not paths:
            raise UserError(
                f"{directory} holds no {part} shards", "`instar data prepare` writes them."
            )
        return cls(paths)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        """The tokens of a stretch ``(stop - start,)``, which may cross from shard to shard."""
        start, stop, _ = place.indices(len(self))
        if start >= stop:
            return self._opened(self._paths[0])[:0]
        first = int(np.searchsorted(self._begins, start, side="right")) - 1
        pieces = []
        while start < stop:
            begin, end = self._begins[first], self._begins[first + 1]
            shard = self._opened(self._paths[first])
            pieces.append(shard[start - begin : min(stop, end) - begin])
            start, first = end, first + 1
        return np.concatenate(pieces) if len(pieces) != 1 else np.asarray(pieces[0])


def _mapped(path: Path) -> np.ndarray:
    """A shard's ids, which are read when they are looked at."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} is damaged ({error})", "Run `instar data prepare` in a new directory."
        ) from None
