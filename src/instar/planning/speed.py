"""How long the parts of a model take: straight lines in the number of tokens.

A part is something to begin with, something a token, and for attention something a token and
column. A stage is then a sum of such parts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """``start + token n + pair n w`` for n tokens that each see w columns."""

    start: float = 0.0
    token: float = 0.0
    pair: float = 0.0

    def __call__(self, tokens: float, width: float = 0.0) -> float:
        """The value."""
        return self.start + self.token * tokens + self.pair * tokens * width

    @staticmethod
    def through(*points: tuple[float, float, float]) -> Line:
        """The line through three points ``(tokens, width, value)``, the last two of equal tokens.

        No part of it is negative: where noise says so, it is nothing.
        """
        (n1, w1, t1), (n2, w2, t2), (_, w3, t3) = points
        pair = max(0.0, (t3 - t2) / (n2 * (w3 - w2)))
        token = max(0.0, (t2 - t1 - pair * (n2 * w2 - n1 * w1)) / (n2 - n1))
        return Line(max(0.0, t1 - token * n1 - pair * n1 * w1), token, pair)


@dataclass(frozen=True)
class Speed:
    """Seconds and bytes of a model's parts, for one shape of model on one device.

    Attributes:
        block: Seconds of one block, forward and backward.
        reading: The same forward only.
        ends: Seconds of the embedding and the last normalisation, forward and backward.
        head: Seconds of the head with its cross-entropy, forward and backward.
        head_reading: The same forward only.
        decode: Seconds of one block for one new token of every row; rows are its tokens.
        decode_rest: Seconds a new token of every row costs besides: head, draw, bookkeeping.
        update: Seconds of one optimizer step of one model.
        saved: Bytes that a block keeps for the backward pass.
        head_saved: Bytes that the head keeps, a token with a target.
        whole: Seconds of whole steps of a stage over the sum of their parts'.
        kernel: Seconds to choose the kernels of a micro-batch of a new shape.
        read: Seconds to read and tokenise a byte of text.
    """

    block: Line
    reading: Line
    ends: Line
    head: Line
    head_reading: Line
    decode: Line
    decode_rest: Line
    update: float
    saved: Line
    head_saved: Line
    whole: float = 1.0
    kernel: float = 0.0
    read: float = 0.0
