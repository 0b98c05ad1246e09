"""Rows that begin alike, folded into one: what they share is computed once.

Eight replies to one question are eight rows that begin with the same prompt. Folded, the prompt
stands once, and the replies behind it, each of which sees the prompt and itself::

    ask ask a b c          ask | ask a b | ask d | ask e f g
    ask ask d        →     ^ shared      ^ each begins with the prompt's last token,
    ask ask e f g                          which has another target in every row

No log-probability changes but by rounding, and no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from instar.data.batch import Batch, padded_width
from instar.model.config import ModelConfig
from instar.model.stack import SHARED

ATTENTION = 4
"""Time of an operation of attention, in those of a large product: many small products and passes
over the scores. Measured on a CPU."""


def fold(batch: Batch, config: ModelConfig) -> tuple[Batch, int]:
    """Rows that stand together and begin alike, folded as far as that saves time.

    Args:
        batch: One document a row ``(B, T)``. What comes before a row's first target is what it may
            share; the rows of an alike beginning are consecutive.
        config: The model, which says what a token costs.

    Returns:
        The batch, with ``positions`` and ``segment_ids`` if anything was folded, and how many
        documents a row holds at most.
    """
    if not len(batch.input_ids):
        return batch, 1
    mask = batch.mask.cpu().numpy()
    begins = mask.argmax(axis=1)
    ends = np.where(mask.any(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1), begins)
    families = _families(batch.input_ids.cpu().numpy(), begins)
    parts, most = folded(families, begins, ends - begins, config)
    return (batch, 1) if most == 1 else (_made(batch, parts, begins, ends), most)


def folded(
    families: Sequence[range], shared: np.ndarray, own: np.ndarray, config: ModelConfig
) -> tuple[list[range], int]:
    """How many documents to put into a row.

    Narrow rows repeat what is shared, wide ones attend to more.

    Args:
        families: Documents that begin alike.
        shared: Tokens that a document shares with its family ``(N,)``.
        own: Its other tokens ``(N,)``.
        config: The model.

    Returns:
        The documents of each row, and how many they are at most.
    """

    def price(parts: list[range]) -> float:
        tokens = np.array([row_tokens(part, shared, own) for part in parts])
        width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return float((tokens * (config.matrix_parameters() + ATTENTION * 2 * width * tokens)).sum())

    largest = max(len(family) for family in families)
    counts = [*(2**i for i in range((largest - 1).bit_length())), largest]
    choices = [(_cut(families, most), most) for most in counts]
    return min(choices, key=lambda choice: price(choice[0]))


def row_tokens(part: range, shared: np.ndarray, own: np.ndarray) -> int:
    """Tokens of a row that holds these documents."""
    return int(shared[part.start] + own[part.start : part.stop].sum())


def _families(ids: np.ndarray, begins: np.ndarray) -> list[range]:
    starts = [
        row
        for row, begin in enumerate(begins)
        if not row or begin != begins[row - 1] or (ids[row, :begin] != ids[row - 1, :begin]).any()
    ]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _cut(families: Sequence[range], most: int) -> list[range]:
    return [family[i : i + most] for family in families for i in range(0, len(family), most)]


def _made(batch: Batch, parts: list[range], begins: np.ndarray, ends: np.ndarray) -> Batch:
    """Every cell of the new rows is a cell of an old one."""
    columns = batch.input_ids.shape[1]
    width = padded_width(max(row_tokens(part, begins, ends - begins) for part in parts))
    # The last column never has a target: what is padding is taken from there.
    cells = np.full((len(parts), width), columns - 1)
    segments = np.zeros_like(cells)
    for number, part in enumerate(parts):
        first = part.start
        filled = begins[first]
        cells[number, :filled] = first * columns + np.arange(filled)
        segments[number, :filled] = SHARED
        for document, row in enumerate(part):
            to = filled + ends[row] - begins[row]
            cells[number, filled:to] = row * columns + np.arange(begins[row], ends[row])
            segments[number, filled:] = document
            filled = to
    device = batch.input_ids.device
    source = torch.from_numpy(cells).to(device)
    gathered = {name: field.flatten(0, 1)[source] for name, field in batch.tensors().items()}
    gathered["positions"] = source % columns
    gathered["segment_ids"] = torch.from_numpy(segments).to(device)
    return Batch(**gathered)
