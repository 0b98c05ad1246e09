"""Documents in columns between the phases, written a group of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from instar.corpus.document import EXTRA
from instar.errors import UserError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise UserError("raw text needs pyarrow and daft", EXTRA) from None

GROUP_BYTES = 8 << 20
"""About how much text a group of rows holds; so much is in memory at once."""

TEXT = pa.schema(
    [
        ("text", pa.large_string()),
        ("title", pa.string()),
        ("place", pa.string()),
        ("language", pa.string()),
    ]
)
"""A document."""

LINES = pa.schema([("line", pa.uint64()), ("document", pa.int64())])
"""A line's hash, and a document that holds it."""

ROWS_AT_ONCE = 1 << 23
"""About so many numbers are brought together at once, whatever the corpus' size."""

ROW_BITS = 32
"""A document's number is its partition's, times two to this power, plus its row."""


def number_of(partition: int, row: int) -> int:
    """The number of a document among all."""
    return (partition << ROW_BITS) + row


class Writer:
    """Writes rows to a Parquet file that has its name only once it is complete.

    Args:
        path: The file.
        schema: Its columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._beside = path.with_name(f".{path.name}.writing")
        self._rows: list[Mapping[str, Any]] = []
        self._held = 0

    def __enter__(self) -> Writer:
        self._beside.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(self._beside, self._schema, compression="lz4")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            try:
                if kind is None:
                    self._flush()
            finally:
                self._file.close()
            if kind is None:
                self._beside.replace(self._path)
        finally:
            self._beside.unlink(missing_ok=True)

    def add(self, row: Mapping[str, Any], size: int) -> None:
        """One row of about ``size`` bytes."""
        self._rows.append(row)
        self._held += size
        if self._held >= GROUP_BYTES:
            self._flush()

    def table(self, table: pa.Table) -> None:
        """Rows that are in columns already."""
        self._file.write_table(table)

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows, self._held = [], 0


def numbered(
    path: Path, partition: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """The documents of a partition with their numbers, one group of rows after the other."""
    number = number_of(partition, 0)
    for table in row_groups(path, columns):
        yield np.arange(number, number + len(table)), table
        number += len(table)


def turns(files: Sequence[Path]) -> int:
    """In how many turns the rows of some files are brought together, a share of them in each.

    On one machine as many as keep memory bounded, each at the cost of reading the files again; a
    cluster has room for all.
    """
    if os.environ.get("DAFT_RUNNER") == "ray":
        return 1
    return -(-sum(pq.read_metadata(file).num_rows for file in files) // ROWS_AT_ONCE)


def row_groups(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A Parquet file, one group of rows after the other."""
    with pq.ParquetFile(path, memory_map=True) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, list(columns) if columns else None)
