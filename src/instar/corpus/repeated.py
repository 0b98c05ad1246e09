"""Lines that many documents share, kept where each came first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from instar.corpus.clean import hash_of
from instar.corpus.columns import turns
from instar.corpus.config import LinesConfig

FILE = "repeated.npy"


class Repeated:
    """The lines that are taken out of all documents but one.

    Args:
        lines: Their hashes ``(N,)``, ascending.
        first: The number of the document that keeps each ``(N,)``.
    """

    def __init__(self, lines: np.ndarray, first: np.ndarray) -> None:
        self.first = dict(zip(lines.tolist(), first.tolist(), strict=True))

    @classmethod
    def count(cls, files: list[Path], config: LinesConfig, gone: np.ndarray) -> np.ndarray:
        """Look for them in what the first phase noted.

        Args:
            files: Its Parquet files of lines.
            config: How many documents are many.
            gone: Numbers of documents that do not count: copies, which are dropped.

        Returns:
            ``(N, 2)``: their hashes, ascending, and the documents that keep them.
        """
        import daft
        from daft import col, lit

        passes = turns(files)
        found = [np.zeros((0, 2), dtype=np.uint64)]
        for turn in range(passes):
            frame = daft.read_parquet([str(file) for file in files])
            frame = frame.where(f"line % {passes} = {turn}") if passes > 1 else frame
            if len(gone):
                frame = frame.join(daft.from_pydict({"document": gone}), on="document", how="anti")
            document = col("document")
            counted = frame.groupby("line").agg(
                document.count().alias("documents"), document.min().alias("first")
            )
            many = counted.where(col("documents") > lit(config.documents)).to_arrow()
            columns = [many[name].to_numpy().astype(np.uint64) for name in ("line", "first")]
            found.append(np.stack(columns, axis=1))
        lines = np.concatenate(found)
        return lines[np.argsort(lines[:, 0])]

    @classmethod
    def load(cls, directory: Path) -> Repeated:
        """What ``count`` found, as it was saved; nothing if it was not asked."""
        path = directory / FILE
        lines = np.load(path) if path.exists() else np.zeros((0, 2), dtype=np.uint64)
        return cls(lines[:, 0], lines[:, 1])

    def without(self, text: str, document: int) -> str:
        """A document's text without those of the lines that another document keeps."""
        if not self.first:
            return text
        lines = text.split("\n")
        kept = [n for n in lines if self.first.get(hash_of(n.strip()), document) == document]
        return text if len(kept) == len(lines) else "\n".join(kept).strip("\n")
