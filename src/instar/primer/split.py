"""What is kept for exams is decided by content, so that every machine and seed agree on it."""

from typing import Literal

from instar.primer.tables import fraction

Split = Literal["train", "exam"]


def split_of(content: str, exam_share: float) -> Split:
    """Which split ``content`` belongs to, for ever.

    Args:
        content: Identifies what must not leak (two operands, a prompt, ...).
        exam_share: Share of all contents that is kept for exams, in [0, 1].
    """
    return "exam" if fraction(content) < exam_share else "train"
