"""Keys and values of the past, kept so that each new token costs one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from instar.model.config import ModelConfig

if TYPE_CHECKING:
    from instar.model.stack import Stack


@runtime_checkable
class Past(Protocol):
    """What puts keys and values of the past in front of those of new tokens."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a block that its new tokens may look at ``(B, KV, S, E)``."""
        ...


@runtime_checkable
class Prefix(Protocol):
    """Virtual tokens that stand before every sequence: keys and values without words."""

    @property
    def length(self) -> int:
        """How many."""
        ...

    @property
    def longest(self) -> int:
        """The most there are for anybody."""
        ...

    def keys_values(self, decoder: Stack) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(1, KV, length, E)`` of each block, keys already rotated."""
        ...


class Prefixed:
    """A past that begins with the same virtual tokens in every row.

    Args:
        pairs: What ``Prefix.keys_values`` gave.
        cache: What else there is of a past.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], cache: KVCache | None) -> None:
        self.pairs, self.cache = pairs, cache

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix, then what the cache holds, then the new tokens."""
        if self.cache is not None:
            keys, values = self.cache.extend(layer, keys, values)
        first, firsts = (x.to(keys.dtype).expand(len(keys), -1, -1, -1) for x in self.pairs[layer])
        return torch.cat((first, keys), dim=2), torch.cat((firsts, values), dim=2)


class KVCache:
    """A fixed block of memory for the keys and values of ``batch`` sequences.

    Sequences are aligned on the *right*: shorter prompts are padded on the left, so all of them
    write their next token into the same column. ``start`` says where each one begins.

    Args:
        config: Shape of the model.
        start: First real column of each sequence ``(B,)``.
        capacity: Number of columns, prompt and new tokens together.
        dtype: Type of keys and values.

    Attributes:
        length: Columns in use.
    """

    def __init__(
        self, config: ModelConfig, start: Tensor, capacity: int, dtype: torch.dtype
    ) -> None:
        shape = (
            config.num_hidden_layers,
            len(start),
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        self.keys = torch.empty(shape, dtype=dtype, device=start.device)
        self.values = torch.empty(shape, dtype=dtype, device=start.device)
        self.start = start
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many columns there are."""
        return self.keys.shape[3]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new columns of one layer and return all that are in use.

        The caller moves ``length`` on once every layer has stored its columns.

        Args:
            layer: Which block.
            keys: ``(B, KV, T, head_dim)``, already rotated.
            values: ``(B, KV, T, head_dim)``.

        Returns:
            Keys and values ``(B, KV, length + T, head_dim)``, views into the cache.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def rows(self, index: Tensor) -> KVCache:
        """A copy that holds the chosen sequences: repeat a prompt, or drop finished ones."""
        chosen = object.__new__(KVCache)
        # Copies whole rows; indexing would gather element by element.
        chosen.keys = self.keys.index_select(1, index)
        chosen.values = self.values.index_select(1, index)
        chosen.start = self.start[index]
        chosen.length = self.length
        return chosen

    def positions(self, new: int) -> Tensor:
        """Position of each of the next ``new`` columns within its sequence ``(B, new)``."""
        columns = torch.arange(self.length, self.length + new, device=self.start.device)
        return (columns - self.start[:, None]).clamp(min=0)

    def key_positions(self, new: int) -> Tensor:
        """The same of all columns, the next ``new`` ones included ``(B, length + new)``."""
        columns = torch.arange(self.length + new, device=self.start.device)
        return (columns - self.start[:, None]).clamp(min=0)

    def visible(self, new: int) -> Tensor:
        """Which columns each of the next ``new`` tokens may look at ``(B, new, length + new)``."""
        columns = torch.arange(self.length + new, device=self.start.device)
        own = columns[self.length :, None]
        real = columns >= self.start[:, None]
        # Padding sees itself, so that no row of attention weights is 0 / 0.
        return (columns <= own) & real[:, None, :] | (columns == own)
