"""Preference pairs as rows: the chosen replies above, the rejected ones below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instar.data.batch import Batch
from instar.data.packing import Row, check_length, conversation_row, pad_rows
from instar.data.readers import place_of
from instar.tokenizer.hf import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt."""

    chosen: Row
    rejected: Row

    def __len__(self) -> int:
        """Tokens of both rows, padding included."""
        return 2 * self.longest

    @property
    def longest(self) -> int:
        """Tokens of the longer row."""
        return max(len(self.chosen), len(self.rejected))


def preference_pairs(
    records: Sequence[dict[str, Any]], tokenizer: Tokenizer, context: int | None
) -> list[Pair]:
    """Rendered pairs; the loss is taken on the last reply, not on earlier turns.

    Raises:
        UserError: A prompt does not end with a user turn, or a pair is longer than the context,
            if there is one.
    """
    places = [place_of(record, f"pair {i}") for i, record in enumerate(records, start=1)]
    pairs = [
        Pair(
            _row(record["messages"], record["chosen"], tokenizer, place),
            _row(record["messages"], record["rejected"], tokenizer, place),
        )
        for record, place in zip(records, places, strict=True)
    ]
    if context is None:
        return pairs
    for side in ("chosen", "rejected"):
        rows = [getattr(pair, side) for pair in pairs]
        check_length(rows, context, [f"{place} with its {side} reply" for place in places])
    return pairs


def _row(prompt: list[Any], reply: str, tokenizer: Tokenizer, place: str) -> Row:
    row = conversation_row([*prompt, {"role": "assistant", "content": reply}], tokenizer, place)
    # The line break after the last <|im_end|> belongs to no reply.
    end = max(i for i, learn in enumerate(row.learn) if learn) + 1
    first = end
    while first and row.learn[first - 1]:
        first -= 1
    return Row(row.ids[:end], [False] * first + [True] * (end - first))


def pad_pairs(pairs: Sequence[Pair], pad_id: int) -> Batch:
    """Pairs as one batch: row ``i`` is chosen, row ``i + P`` rejected."""
    return pad_rows([p.chosen for p in pairs] + [p.rejected for p in pairs], pad_id)
