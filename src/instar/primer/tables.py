"""Hand-written tables are the primer's only source of truth.

Each table is a file of tab-separated values with a header row, meant to be read and edited by
hand. A column that exists in both languages is written twice, ``capital_en`` and ``capital_zh``.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from instar.errors import UserError

Row = dict[str, str]


@cache
def table(name: str) -> tuple[Row, ...]:
    """The rows of ``tables/<name>.tsv``, each a mapping from column to cell.

    Args:
        name: File name without its ending, such as ``countries``.

    Raises:
        UserError: If there is no such table, or a row has too few or too many cells.
    """
    file = files("instar.primer") / "tables" / f"{name}.tsv"
    if not file.is_file():
        raise UserError(f"primer table {name!r} does not exist", f"Create {file}")
    header, *lines = file.read_text(encoding="utf-8").splitlines()
    columns = header.split("\t")
    rows = []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise UserError(
                f"{file} line {number} has {len(cells)} cells, its header has {len(columns)}",
                "Separate the cells with single tabs",
            )
        rows.append(dict(zip(columns, cells, strict=True)))
    return tuple(rows)


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone.

    Splits into training and exam compare it with a share, so an item stays on its side of the
    split on every machine and under every seed. (Python's own ``hash`` changes with each run.)
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
