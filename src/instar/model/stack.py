"""What every decoder is: blocks on top of embeddings, and a past that they may look back at."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instar.model.cache import KVCache, Past, Prefix, Prefixed
from instar.model.config import ModelConfig
from instar.model.layers import product_dtype

SHARED = -1
"""Segment of the tokens that every document of their row begins with."""


class Stack(nn.Module):
    """Token ids to hidden states: embedding, blocks, a last normalisation.

    Families differ in the five things that they say of themselves below.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether the backward pass computes each block anew instead of keeping what was inside:
        activation checkpointing (Chen et al. 2016, arXiv:1604.06174), memory for a third more work.
        """
        self.prefix: Prefix | None = None
        """Virtual tokens before every sequence (prefix and prompt tuning)."""

    @property
    def embeddings(self) -> Any:
        """The table of tokens: an ``nn.Embedding``, or what adapters have put in its place."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last."""
        raise NotImplementedError

    def begin(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "#b t"]) -> Tensor:
        """What enters the first block; rotary positions come later."""
        return x

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the positions, for families that rotate."""
        raise NotImplementedError

    def finish(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The last normalisation."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Hidden states after the last normalisation.

        Without a cache, rows are padded on the right, so plain causal order is enough; packed
        documents are told apart by ``segment_ids``, and may begin with tokens that they share
        (``SHARED``). With a cache, rows are aligned on the right and the new tokens are appended
        to it.
        """
        t = input_ids.shape[1]
        visible: Bool[Tensor, "b t s"] | None = None
        windowed, places = self.config.sliding_window is not None, None
        if cache is not None:
            positions, visible = cache.positions(t), cache.visible(t)
            places = cache.key_positions(t) if windowed else None
        elif segment_ids is not None:
            keys = segment_ids[:, None, :]
            seen = (segment_ids[:, :, None] == keys) | (keys == SHARED)
            visible = seen & torch.ones(t, t, dtype=torch.bool, device=seen.device).tril()
        if positions is None:
            positions = torch.arange(t, device=input_ids.device)[None]
        x = self.embeddings(input_ids)
        past: Past | None = cache
        if self.prefix is not None and self.prefix.length:
            past = Prefixed(self.prefix.keys_values(self), cache)
            n = self.prefix.length
            if windowed:
                behind = (positions if places is None else places) + n
                first = torch.arange(n, device=positions.device).expand(len(behind), n)
                places = torch.cat((first, behind), dim=1)
            positions = positions + n
            if visible is not None:
                visible = nn.functional.pad(visible, (n, 0), value=True)
        x = self.run(x, positions, visible, past, places)
        if cache is not None:
            cache.length += t
        return x

    def run(
        self,
        x: Float[Tensor, "b t d"],
        positions: Int[Tensor, "#b t"],
        visible: Bool[Tensor, "b t s"] | None = None,
        past: Past | None = None,
        places: Int[Tensor, "#b s"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Embeddings through all blocks.

        Args:
            x: What the tokens are, without their positions.
            positions: Where each stands in its sequence.
            visible: Which keys each query may look at; plain causal order when absent.
            past: Keys and values in front of the tokens' own; is told those.
            places: Positions of all keys, where they are not those of the tokens; only windows
                ask for them.
        """
        x = self.begin(x, positions)
        rotary = self.rotary(positions, product_dtype(x))
        near = self._near(len(x), positions, visible, positions if places is None else places)
        # What is written down as it is computed must not be computed twice.
        forgets = past is None or (isinstance(past, Prefixed) and past.cache is None)
        recompute = self.recompute and forgets and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            mask = visible if near is None or self.config.window(layer) is None else near
            if recompute:
                x = checkpoint(block, x, rotary, mask, past, use_reentrant=False)
            else:
                x = block(x, rotary, mask, past)
        return self.finish(x)

    def _near(
        self, rows: int, positions: Tensor, visible: Tensor | None, places: Tensor
    ) -> Tensor | None:
        """What queries may look at through the sliding window; none where it hides nothing."""
        window, t, s = self.config.sliding_window, positions.shape[1], places.shape[1]
        if window is None or s <= window:
            return None
        near = positions[:, :, None] - places[:, None, :] < window
        if visible is None:
            visible = torch.ones(t, s, dtype=torch.bool, device=near.device).tril(s - t)
        return (near & visible).expand(rows, t, s)
