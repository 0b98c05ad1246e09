"""What is held out is decided by content, so that every machine and seed agree on it.

``train`` is learnt from, ``valid`` is watched during training, ``exam`` is asked when a stage is
done. Nothing belongs to two of them.
"""

from typing import Literal

from instar.primer.tables import fraction

Split = Literal["train", "valid", "exam"]

EXAM_PROMPTS = 0.1
"""Share of ordinary prompts that no stage learns from: models are compared on them."""
VALID_PROMPTS = 0.05
"""Share of ordinary prompts that are kept for validation."""


def split_of(content: str, exam_share: float, valid_share: float = 0.0) -> Split:
    """Which split ``content`` belongs to, for ever.

    Args:
        content: Identifies what must not leak (two operands, a prompt, ...).
        exam_share: Share of all contents that is kept for exams, in [0, 1].
        valid_share: Share that is kept for validation.
    """
    place = fraction(content)
    if place < exam_share:
        return "exam"
    return "valid" if place < exam_share + valid_share else "train"


def split_of_prompt(prompt: str) -> Split:
    """Which split an ordinary prompt belongs to, the same in every stage's data."""
    return split_of(prompt, EXAM_PROMPTS, VALID_PROMPTS)
