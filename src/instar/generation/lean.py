"""A forward pass for writing only: the model's weights in few large matrices, and few operations.

It computes what ``model.transformer`` computes, for rotary families without experts, adapters or
windows; ``native`` is the same in compiled code. Here the residual stream, attention and its cache
are float32 in every format; matrices may be bfloat16 or int8.

Shapes: B rows, T new tokens, H query heads, KV key heads, G = H / KV, E head width, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from instar.generation.products import Product
from instar.model.config import ModelConfig

M = TypeVar("M")
"""A matrix, in whatever form."""


class Layer(NamedTuple, Generic[M]):
    """The weights of a block."""

    into_heads: M
    """Queries, keys and values; scales of the normalisation before it are multiplied in."""
    out_of_heads: M
    widen: M
    """Gate and up; scales likewise."""
    narrow: M
    head_norm: Tensor | None
    """Scales of normalised queries and keys times the root of E ``(H + KV, E)``."""


@dataclass(frozen=True)
class Body(Generic[M]):
    """The weights of a model.

    Attributes:
        config: Its shape.
        layers: First to last.
        embedding: The table of tokens.
        head: Names the next token; scales of the last normalisation are multiplied in.
        cos: Cosines of every position ``(context, 1, E / 2)``.
        sin: Sines.
        eps: Of the normalisations of the residual stream, as ``_normalised`` takes it.
        head_eps: Of those of queries and keys.
    """

    config: ModelConfig
    layers: tuple[Layer[M], ...]
    embedding: Tensor
    head: M
    cos: Tensor
    sin: Tensor
    eps: Tensor
    head_eps: Tensor


class Place(NamedTuple):
    """Where new tokens go, and what they may look at."""

    store: Tensor
    """Keys and values of all rows ``(layers, 2, R, KV, C, E)``."""
    rows: slice | Tensor
    """Which rows are read: a stretch, or numbers."""
    numbers: Tensor
    """Their numbers ``(B,)``."""
    lengths: Tensor
    """How many tokens each holds already ``(B,)``."""
    width: int
    """Columns that are looked at, new ones included."""


def forward(body: Body[Product], ids: Tensor, place: Place, last: Tensor | None) -> Tensor:
    """Logits after the last token of each row ``(B, V)``, float32.

    Args:
        body: The weights.
        ids: New tokens ``(B, T)``.
        place: The rows that they belong to; takes up their keys and values.
        last: Number of the last token of each row ``(B,)``; none where there is one only.
    """
    c, (b, t), device = body.config, ids.shape, ids.device
    places = place.lengths[:, None] + torch.arange(t, device=device)
    cos, sin = body.cos[places], body.sin[places]
    later = torch.arange(place.width, device=device) > places[:, :, None]
    mask = torch.zeros(later.shape, device=device).masked_fill_(later, -math.inf)
    kv, groups = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    mask = mask[:, None, None].expand(b, kv, groups, t, place.width)
    mask = mask.reshape(b * kv, groups * t, place.width)
    x = F.embedding(ids, body.embedding).float()
    for number, layer in enumerate(body.layers):
        heads = _heads(body, layer, x, cos, sin)
        own = place.store[number]
        # Indices on both sides of a slice: rows and tokens come first in the result.
        new = heads[:, :, c.num_attention_heads :].unflatten(2, (2, -1))
        if t == 1:
            own[:, place.numbers, :, place.lengths] = new[:, 0]
        else:
            own[:, place.numbers[:, None], :, places] = new
        mixed = _mixed(c, heads, own[:, place.rows, :, : place.width], mask)
        x = x + layer.out_of_heads(mixed)
        gate, up = layer.widen(_normalised(x, body.eps)).chunk(2, dim=-1)
        x = x + layer.narrow(F.silu(gate) * up)
    ends = x[:, 0] if last is None else x[torch.arange(b, device=device), last]
    return body.head(_normalised(ends, body.eps)).float()


def _normalised(x: Tensor, eps: Tensor) -> Tensor:
    """``x / sqrt(sum x^2 + d eps)``: three operations.

    It is ``1 / sqrt(d)`` of RMSNorm's result; the matrices behind it have the rest multiplied in.

    Args:
        x: Normalised along its last axis, d wide.
        eps: The root of ``d eps``.
    """
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(eps)


def _heads(
    body: Body[Product], layer: Layer[Product], x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Queries, keys and values ``(B, T, H + 2 KV, E)``, the former two rotated."""
    c = body.config
    heads = layer.into_heads(_normalised(x, body.eps)).float()
    heads = heads.unflatten(-1, (-1, c.head_dim))
    turning = heads[:, :, : c.num_attention_heads + c.num_key_value_heads]
    if layer.head_norm is not None:
        norm = torch.linalg.vector_norm(turning, dim=-1, keepdim=True).hypot(body.head_eps)
        turning.mul_(layer.head_norm).div_(norm)
    first, second = turning.chunk(2, dim=-1)
    turned = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return heads


def _mixed(c: ModelConfig, heads: Tensor, cached: Tensor, mask: Tensor) -> Tensor:
    """What attention makes of the new tokens ``(B, T, H E)``."""
    b, t, _, e = heads.shape
    kv = c.num_key_value_heads
    q = heads[:, :, : c.num_attention_heads].unflatten(2, (kv, -1)).permute(0, 2, 3, 1, 4)
    keys, values = cached[0].flatten(0, 1), cached[1].flatten(0, 1)
    q = q.reshape(b * kv, -1, e)
    scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=1 / math.sqrt(e))
    mixed = scores.softmax(dim=-1) @ values
    return mixed.view(b, kv, -1, t, e).permute(0, 3, 1, 2, 4).reshape(b, t, -1)
