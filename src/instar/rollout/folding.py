"""Replies to one prompt, folded into one row: the prompt is computed once for several of them.

Three replies are three rows that begin with the same prompt. Folded, the prompt stands once, and
the replies behind it, each of which sees the prompt and itself::

    ask ask a b c          ask | ask a b | ask d | ask e f g
    ask ask d        →     ^ shared      ^ each begins with the prompt's last token,
    ask ask e f g                          which has another target in every row

No log-probability changes but by rounding, and no gradient. Liu et al. 2025, "Prefix Grouper"
(arXiv:2506.05433), compute the same in two calls of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from instar.data.batch import Batch, padded_width
from instar.model.attention import FROM_TOKENS
from instar.model.config import ModelConfig
from instar.model.stack import SHARED

ATTENTION = 4
"""Time of an operation of attention, in those of a large product: many small products and passes
over the scores. Measured on a CPU."""


def fold(batch: Batch, config: ModelConfig, most: int) -> tuple[Batch, int]:
    """Rows that stand together and begin alike, folded as far as that saves time.

    On a GPU nothing is folded: attention with a mask would lose its fastest kernel there, and what
    is best has not been measured.

    Args:
        batch: One document a row ``(B, T)``. What comes before a row's first target is what it may
            share; rows that begin alike are consecutive.
        config: The model, which says what a token costs.
        most: The most documents to put into a row.

    Returns:
        The batch, with ``positions`` and ``segment_ids`` if anything was folded, and how many
        documents a row holds at most.
    """
    if not len(batch.input_ids) or batch.input_ids.is_cuda:
        return batch, 1
    begins = batch.mask.numpy().argmax(axis=1)
    # A row's last token predicts nothing; rows without a target have no length.
    ends = np.maximum(batch.row_lengths().numpy() - 1, begins)
    groups = _groups(batch.input_ids.numpy(), begins)
    parts, held = partition(groups, begins, ends - begins, config, most)
    return (batch, 1) if held == 1 else (_gathered(batch, parts, begins, ends), held)


def partition(
    groups: Sequence[range], shared: np.ndarray, own: np.ndarray, config: ModelConfig, most: int
) -> tuple[list[range], int]:
    """Which documents to put into a row.

    Narrow rows repeat what is shared, wide ones attend to more.

    Args:
        groups: Documents that begin alike.
        shared: Tokens that a document shares with its group ``(N,)``.
        own: Its other tokens ``(N,)``.
        config: The model.
        most: The most documents to put into a row.

    Returns:
        The documents of each row, and how many they are at most.
    """
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    # The head reads tokens with a target only, and folding changes nothing there.
    matrices = config.matrix_parameters() - config.vocab_size * config.hidden_size

    def price(parts: list[range]) -> float:
        tokens = np.array([row_tokens(part, shared, own) for part in parts])
        alone = np.array([len(part) == 1 for part in parts])
        halved = np.where(alone & (tokens >= FROM_TOKENS), 0.5, 1.0)  # plain causal order
        return float((tokens * (matrices + ATTENTION * 2 * width * halved * tokens)).sum())

    largest = min(most, max(len(group) for group in groups))
    counts = [*(2**i for i in range((largest - 1).bit_length())), largest]
    choices = [(_cut(groups, count), count) for count in counts]
    return min(choices, key=lambda choice: price(choice[0]))


def row_tokens(part: range, shared: np.ndarray, own: np.ndarray) -> int:
    """Tokens of a row that holds these documents."""
    return int(shared[part.start] + own[part.start : part.stop].sum())


def _groups(ids: np.ndarray, begins: np.ndarray) -> list[range]:
    starts = [
        row
        for row, begin in enumerate(begins)
        if not row or begin != begins[row - 1] or (ids[row, :begin] != ids[row - 1, :begin]).any()
    ]
    return [range(a, b) for a, b in pairwise([*starts, len(ids)])]


def _cut(groups: Sequence[range], most: int) -> list[range]:
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def _gathered(batch: Batch, parts: list[range], begins: np.ndarray, ends: np.ndarray) -> Batch:
    """Every cell of the new rows is a cell of an old one."""
    columns = batch.input_ids.shape[1]
    longest = max(row_tokens(part, begins, ends - begins) for part in parts)
    # The last column never has a target: what is padding is taken from there.
    cells = np.full((len(parts), padded_width(longest + 1)), columns - 1)
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
    source = torch.from_numpy(cells)
    gathered = {name: field.flatten(0, 1)[source] for name, field in batch.tensors().items()}
    gathered["positions"] = source % columns
    gathered["segment_ids"] = torch.from_numpy(segments)
    return Batch(**gathered)
