"""From records to rows: conversations, prompts with replies, padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from instar.data.batch import IGNORE, Batch, padded_width
from instar.data.schema import Message
from instar.errors import UserError
from instar.tokenizer.chat import check_messages, render
from instar.tokenizer.hf import Tokenizer

S = TypeVar("S")


@dataclass(frozen=True)
class Row:
    """One sequence, and which of its tokens are to be learnt.

    Attributes:
        ids: Token ids.
        learn: For each id, whether a loss is taken on predicting it.
    """

    ids: list[int]
    learn: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def conversation_row(messages: list[Message], tokenizer: Tokenizer, place: str) -> Row:
    """A rendered conversation in which the assistant's turns are to be learnt.

    Args:
        messages: The turns.
        tokenizer: Turns them into ids.
        place: Where they come from, for error messages.

    Raises:
        UserError: It cannot be rendered, or nobody replies.
    """
    check_place(messages, place, needs_reply=True)
    rendered = render(tokenizer, messages)
    return Row(rendered.ids, rendered.assistant_mask)


def check_place(messages: list[Message], place: str, needs_reply: bool = False) -> None:
    """``check_messages`` with an error that says which conversation it is."""
    try:
        check_messages(messages, needs_reply)
    except UserError as error:
        raise UserError(f"{place}: {error.problem}", error.remedy) from None


def reply_row(prompt_ids: list[int], reply_ids: list[int]) -> Row:
    """A prompt followed by a reply; the reply is to be learnt."""
    return Row(prompt_ids + reply_ids, [False] * len(prompt_ids) + [True] * len(reply_ids))


def check_length(rows: Sequence[Row], context: int, places: Sequence[str]) -> None:
    """Raise ``UserError`` if a row, named by its place, is longer than the model's context."""
    if not rows:
        return
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) > context:
        raise UserError(
            f"{places[longest]} has {len(rows[longest])} tokens, the context has {context}",
            f"Shorten it, or leave out what is longer: --max-length {context}.",
        )


def short_ones(
    examples: Sequence[S], length: Callable[[S], int], most: int, notes: list[str]
) -> list[S]:
    """Examples that are not too long; how many are left out is noted.

    Args:
        examples: What could be learnt from.
        length: Tokens of one.
        most: The most tokens.
        notes: Takes a line.

    Raises:
        UserError: None is left.
    """
    kept = [one for one in examples if length(one) <= most]
    if examples and not kept:
        raise UserError(f"max_length is {most}, and every example is longer", "Raise it.")
    if len(kept) < len(examples):
        left_out = len(examples) - len(kept)
        notes.append(f"{left_out} of {len(examples)} examples are longer than {most} tokens")
    return kept


def pad_rows(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows side by side ``(B, T)``, padded on the right.

    ``T`` is the ``padded_width`` of the longest row. A row's last token is an input too (a reward
    model reads it) and has no target.
    """
    width = padded_width(max(len(row) for row in rows))
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for i, row in enumerate(rows):
        ids, learn = np.array(row.ids), np.array(row.learn, dtype=bool)
        input_ids[i, : len(ids)] = ids
        targets[i, : len(ids) - 1] = np.where(learn[1:], ids[1:], IGNORE)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(targets))
