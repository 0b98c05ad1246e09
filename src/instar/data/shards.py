"""Token shards: a corpus as arrays of ids on the disk, read without loading them.

A shard is two files that numpy opens by itself: ``NAME.npy``, the ids of its documents behind one
another, and ``NAME.ends.npy``, where each document ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instar.errors import UserError

ENDS = ".ends.npy"


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
        shards: Their arrays, in order.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = list(shards)
        self._begins = np.cumsum([0, *(len(shard) for shard in shards)])

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
        shards = []
        for path in paths:
            try:
                shards.append(np.load(path, mmap_mode="r"))
            except (ValueError, EOFError) as error:
                raise UserError(
                    f"{path} is damaged ({error})", "Run `instar data prepare` again."
                ) from None
        return cls(shards)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        """The tokens of a stretch ``(stop - start,)``, which may cross from shard to shard."""
        start, stop, _ = place.indices(len(self))
        first = int(np.searchsorted(self._begins, start, side="right")) - 1
        pieces = []
        while start < stop:
            begin, end = self._begins[first], self._begins[first + 1]
            pieces.append(self._shards[first][start - begin : min(stop, end) - begin])
            start, first = end, first + 1
        return np.concatenate(pieces) if len(pieces) != 1 else np.asarray(pieces[0])
