"""The parts of a block: normalisation, rotary positions, attention.

Shapes: B sequences, T tokens, S keys, H query heads, KV key heads, D width, E head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from instar.compilation import compilable
from instar.model.attention import FROM_TOKENS, attend_in_blocks
from instar.model.cache import Past
from instar.model.config import ModelConfig, RopeScaling
from instar.model.experts import Experts
from instar.model.feedforward import FeedForward
from instar.model.rotary import scaled

STRETCH = 64
"""Rows that compiled code sums at a time."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The format in which matrix products take ``x``: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """Divides by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Normalise the last axis in float32, as transformers does, then scale.

        The result has the format of the products that follow, so that it is cast only once.
        """
        out = product_dtype(x)
        # On GPUs torch has a fused kernel; on a CPU the gradient by hand is what is fast.
        if torch.is_grad_enabled() and not x.is_cuda:
            return _Normalised.apply(x, self.weight, self.eps, out)  # type: ignore[return-value]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, self.weight.shape, eps=self.eps).to(out) * self.weight.to(out)


class _Normalised(torch.autograd.Function):
    """``y = w n, n = x / rms(x)``, with its gradient by hand.

    ``dL/dx = (g - n mean(g n)) / rms(x)`` with ``g = w dL/dy``, and ``dL/dw = sum(n dL/dy)``.
    Autograd would keep every step between ``x`` and ``y``, in float32; here only ``n`` is kept,
    in the products' format.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out: torch.dtype) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normalised = (x * inverse).to(out)
        ctx.save_for_backward(normalised, inverse, weight)
        ctx.dtype = x.dtype
        return normalised * weight.to(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n, inverse, weight = ctx.saved_tensors
        to_weight = _over_rows(grad * n, weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along = (grad * n).mean(-1, keepdim=True)
        to_x = torch.addcmul(grad, n, along, value=-1).mul_(inverse)
        return to_x.to(ctx.dtype), to_weight, None, None


def _over_rows(x: Float[Tensor, "... d"], dtype: torch.dtype) -> Float[Tensor, " d"]:
    """The sum over all but the last axis."""
    rows = x.flatten(0, -2)
    if torch.compiler.is_compiling() and len(rows) % STRETCH == 0:
        # Compiled, a sum over all rows is slow; over stretches of rows it is not.
        rows = rows.unflatten(0, (-1, STRETCH)).sum(1, dtype=dtype)
    return rows.sum(0, dtype=dtype)


def rotary_tables(
    positions: Int[Tensor, "b t"],
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Tensor, "b 1 t half"], Float[Tensor, "b 1 t half"]]:
    """Cosines and sines of the rotary angles (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        angles = positions[:, None, :, None].float() * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)
    frequencies, factor = scaled(frequencies, theta, scaling)
    angles = positions[:, None, :, None].float() * frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(
    x: Float[Tensor, "b h t e"],
    cos: Float[Tensor, "#b 1 t half"],
    sin: Float[Tensor, "#b 1 t half"],
) -> Float[Tensor, "b h t e"]:
    """Turn each pair of channels (i, i + E/2), Hugging Face's order, by its position's angle."""
    return _Rotated.apply(x, cos, sin)  # type: ignore[return-value]


class _Rotated(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which makes one pass of what is written plainly
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    # Whole rows at a time are three times as fast as halves.
    swapped = torch.cat((second, first), dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return (x * cos).addcmul_(swapped, sin)


def attend(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b kv s e"],
    values: Float[Tensor, "b kv s e"],
    visible: Bool[Tensor, "b t s"] | None,
) -> Float[Tensor, "b h t e"]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    On a CPU the two batched products are written out: measured there, they are faster than the
    fused kernel, which pays off on GPUs.

    Args:
        queries: One row a head; query heads share key heads in consecutive groups.
        keys: The keys that exist so far.
        values: Their values.
        visible: Which keys each query may look at; plain causal order when absent, in which the
            last query sees every key.
    """
    if queries.is_cuda:
        t, s = queries.shape[2], keys.shape[2]
        if visible is None and t < s:  # the kernel's own causal order would begin at the first key
            visible = torch.ones(1, t, s, dtype=torch.bool, device=queries.device).tril(s - t)
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=visible is None, enable_gqa=True
        )
    b, h, t, e = queries.shape
    kv, s = keys.shape[1], keys.shape[2]
    scaled = queries * (1 / math.sqrt(e))
    if visible is None and t == s >= FROM_TOKENS:
        return attend_in_blocks(scaled, keys, values)
    grouped = scaled.reshape(b, kv, h // kv * t, e)
    scores = (grouped @ keys.transpose(-1, -2)).view(b, h, t, s)
    if visible is None:
        hidden = torch.ones(t, s, dtype=torch.bool, device=scores.device).triu(s - t + 1)
    else:
        hidden = ~visible[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights.reshape(b, kv, h // kv * t, s) @ values).view(b, h, t, e)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, e, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.layer, self.head_dim = layer, e
        self.q_proj = nn.Linear(d, config.num_attention_heads * e, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * e, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * e, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * e, d, bias=config.attention_bias)
        if config.qk_norm:
            # Normalised queries and keys keep the scores small (Henry et al. 2020, 2010.04245).
            self.q_norm = RMSNorm(e, config.rms_norm_eps)
            self.k_norm = RMSNorm(e, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotary: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "b t s"] | None,
        cache: Past | None,
    ) -> Float[Tensor, "b t d"]:
        """Mix each token with those before it."""
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed = attend(q, k, v, visible)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        if config.is_sparse(layer):
            self.mlp = Experts(config)
        else:
            d, f = config.hidden_size, config.intermediate_size
            self.mlp = FeedForward(d, f, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @compilable
    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotary: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "b t s"] | None,
        cache: Past | None,
    ) -> Float[Tensor, "b t d"]:
        """One layer of thought."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
