"""The engine's memory: a row of keys and values for each reply, each row with a length of its own.

Rows are aligned on the left. What stands right of a row's length is never looked at, so that
padding may be written there and is overwritten later.

Shapes: R rows, KV key heads, C columns, E head width.
"""

from __future__ import annotations

import copy
from itertools import accumulate

import torch
from torch import Tensor

from instar.model.cache import KVCache
from instar.model.config import ModelConfig

COLUMNS = 64
"""The used width of the cache is rounded up to a multiple of this.

Where torch sums over columns, the sums are then cut in the same places, on most processors, however
long the neighbours are: a row's result depends on its company by rounding at most.
"""

WORTHWHILE = 32
"""A common beginning of fewer tokens is computed again rather than looked for."""


class Slots:
    """Keys and values of all rows, and which tokens they are of.

    Args:
        config: Shape of the model.
        most_rows: The most rows ever needed.
        dtype: Type of keys and values.
        device: Where they lie.
        zeroed: Whether what nobody has written is zero. Where columns out of sight are masked,
            they take part in a product with weight zero, and have to be numbers.
        most_bytes: The most memory that they may take, if there is a limit. While they move to a
            store of another shape, the former one exists besides.

    Attributes:
        tokens: What each row holds; its length is theirs.
        owners: The adapter that each row was computed with.
    """

    def __init__(
        self,
        config: ModelConfig,
        most_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        zeroed: bool = True,
        most_bytes: int | None = None,
    ) -> None:
        self.config, self.most_rows, self.zeroed = config, most_rows, zeroed
        self.most_bytes = most_bytes
        self.shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.store = self._empty(0, 0, dtype, device)
        self.tokens: list[list[int]] = []
        self.owners: list[str | None] = []

    def _empty(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        layers, heads, width = self.shape
        make = torch.zeros if self.zeroed else torch.empty
        return make(layers, 2, rows, heads, columns, width, dtype=dtype, device=device)

    @property
    def keys(self) -> Tensor:
        """``(layers, R, KV, C, E)``."""
        return self.store[:, 0]

    @property
    def values(self) -> Tensor:
        """``(layers, R, KV, C, E)``."""
        return self.store[:, 1]

    @property
    def rows(self) -> int:
        """How many rows there are by now."""
        return self.store.shape[2]

    @property
    def columns(self) -> int:
        """How many columns there are by now."""
        return self.store.shape[4]

    @property
    def column_bytes(self) -> int:
        """Bytes of one column of one row."""
        layers, heads, width = self.shape
        return layers * 2 * heads * width * self.store.element_size()

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the memory is enough for so many."""
        needed = rows * rounded(columns) * self.column_bytes
        return self.most_bytes is None or needed <= self.most_bytes

    def reserve(self, rows: int, columns: int, hoped: int = 0) -> None:
        """Make room; what is there stays, as far as the memory allows.

        Sizes at least double where they can, so that this is rare; beyond half of the memory, which
        ``rest`` takes back, nothing is made that is not needed. Where they cannot, rows behind the
        first ones are given up, and what remains of those may be cut.

        Args:
            rows: How many rows must be there, the first ones.
            columns: How many columns they must have, and those at work may use; so many must fit.
            hoped: How many rows would be good to have.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        tall, wide = self.rows, self.columns
        if rows > tall:
            tall = max(rows, hoped, min(2 * tall, self.most_rows))
        if columns > wide:
            most = rounded(self.config.max_position_embeddings)
            wide = rounded(max(columns, min(2 * wide, most)))
        if self.most_bytes is not None:
            half, needed = self.most_bytes // 2, rows * rounded(columns) * self.column_bytes
            most = half if needed <= half else self.most_bytes
            if tall * wide * self.column_bytes > most:
                room = most // (max(rows, 1) * self.column_bytes * COLUMNS) * COLUMNS
                wide = max(rounded(columns), min(rounded(columns * 5 // 4), room, wide))
                tall = max(rows, min(tall, most // (wide * self.column_bytes)))
        self._resize(tall, wide)

    def rest(self) -> None:
        """Nobody is at work: what is beyond half of the memory is given back.

        As many of the first rows stay as fit, cut to what they hold: at least the one that ended
        last.
        """
        if self.most_bytes is None or 2 * self.store.nbytes <= self.most_bytes:
            return
        widths = list(accumulate((rounded(max(len(tokens), 1)) for tokens in self.tokens), max))
        half = self.most_bytes // (2 * self.column_bytes)
        tall = max((n for n, wide in enumerate(widths, start=1) if n * wide <= half), default=1)
        if (tall, widths[tall - 1]) != (self.rows, self.columns):
            self._resize(tall, widths[tall - 1])

    def _resize(self, rows: int, columns: int) -> None:
        """So many rows and columns, with what they have room for of what was there."""
        tall, wide = min(rows, self.rows), min(columns, self.columns)
        resized = self._empty(rows, columns, self.store.dtype, self.store.device)
        resized[:, :, :tall, :, :wide] = self.store[:, :, :tall, :, :wide]
        self.store = resized
        self.tokens = [tokens[:wide] for tokens in self.tokens[:tall]]
        self.tokens += [[] for _ in range(rows - tall)]
        self.owners = self.owners[:tall] + [None] * (rows - tall)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give one row the first columns of another."""
        if source != target:
            self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]
        self.tokens[target] = self.tokens[source][:length]
        self.owners[target] = self.owners[source]

    def forget(self, first: int) -> None:
        """The rows from ``first`` on hold nothing any more."""
        for row in range(first, self.rows):
            self.tokens[row] = []

    def swap(self, a: int, b: int) -> None:
        """Two rows change places."""
        if a == b:
            return
        width = max(len(self.tokens[a]), len(self.tokens[b]))
        first, second = (self.store[:, :, row, :, :width] for row in (a, b))
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        self.tokens[a], self.tokens[b] = self.tokens[b], self.tokens[a]
        self.owners[a], self.owners[b] = self.owners[b], self.owners[a]

    def nearest(self, prompt: list[int], owner: str | None) -> tuple[int, int]:
        """The row that begins most like a prompt, and how many tokens of it can be taken over.

        The last token is always read anew: what follows it is asked for. Fewer than ``WORTHWHILE``
        count as none.
        """
        best, length = -1, 0
        for row, tokens in enumerate(self.tokens):
            if self.owners[row] == owner and tokens[:WORTHWHILE] == prompt[:WORTHWHILE]:
                shared = min(shared_length(tokens, prompt), len(prompt) - 1)
                if shared > length:
                    best, length = row, shared
        return (best, length) if length >= WORTHWHILE else (-1, 0)


def rounded(columns: int) -> int:
    """The next multiple of ``COLUMNS``."""
    return -(-columns // COLUMNS) * COLUMNS


def shared_length(a: list[int], b: list[int]) -> int:
    """Length of the longest beginning that two lists have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is fast, so the place is searched by halves
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class View(KVCache):
    """Some rows of the slots, as what a model's forward pass takes for its cache.

    Args:
        slots: Where they lie.
        rows: Which: a stretch, or numbers.
        lengths: How many columns of each are in use ``(rows,)``.
        width: Columns that may be looked at, new ones included.
    """

    def __init__(self, slots: Slots, rows: slice | Tensor, lengths: Tensor, width: int) -> None:
        self.store, self.keys, self.values = slots.store, slots.keys, slots.values
        self.chosen, self.lengths, self.width = rows, lengths, width
        self.length = 0
        first, last = (rows.start, rows.stop) if isinstance(rows, slice) else (0, slots.rows)
        numbers = torch.arange(first, last, device=lengths.device)
        self.numbers = numbers if isinstance(rows, slice) else rows

    def part(self, rows: Tensor) -> View:
        """Some of these rows, by their places among them."""
        part = copy.copy(self)
        part.chosen = part.numbers = self.numbers[rows]
        part.lengths = self.lengths[rows]
        return part

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new columns of one layer behind each row's own, and give all of them."""
        new = keys.shape[2]
        columns = self.lengths[:, None] + torch.arange(new, device=keys.device)
        # Indices around a slice: the result has rows and columns first.
        where = (self.numbers[:, None], slice(None), columns)
        self.keys[layer][where] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][where] = values.transpose(1, 2).to(self.values.dtype)
        width = slice(self.width)
        return self.keys[layer][self.chosen, :, width], self.values[layer][self.chosen, :, width]

    def positions(self, new: int) -> Tensor:
        """Position of each of the next ``new`` columns within its sequence ``(R, new)``."""
        return self.lengths[:, None] + torch.arange(new, device=self.lengths.device)

    def key_positions(self, new: int) -> Tensor:
        """Left-aligned, a column's number is its position ``(R, width)``."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return columns.expand(len(self.lengths), -1)

    def visible(self, new: int) -> Tensor:
        """Which columns each of the next ``new`` tokens may look at ``(R, new, width)``."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return columns <= self.positions(new)[:, :, None]
