"""Attention without the half that causal order hides, with its gradient by hand.

Shapes: B sequences, T tokens, H query heads, KV key heads, G = H / KV, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries that share a stretch of keys: fewer save more products, more make each one faster."""

FROM_TOKENS = 256
"""Rows at least this long are worth cutting into blocks."""


def attend_in_blocks(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b kv t e"],
    values: Float[Tensor, "b kv t e"],
) -> Float[Tensor, "b h t e"]:
    """Causal attention, ``BLOCK`` queries at a time, each block with the keys up to its end.

    What is computed is that of ``attend``; what is left out is nearly the half of the scores that
    causal order hides. Measured on a CPU, forward and backward: 1.6 times as fast as whole rows,
    2.3 times as torch's fused kernel (``benchmarks/report.md``).

    Args:
        queries: One row a head, already divided by the root of E; query heads share key heads in
            consecutive groups.
        keys: As many as there are queries.
        values: Their values.
    """
    return _CausalBlocks.apply(queries, keys, values)  # type: ignore[return-value]


class _CausalBlocks(torch.autograd.Function):
    """``A = softmax(Q K'), O = A V``, row block by row block, keeping only ``A``.

    With ``g = dL/dO``: ``dV = A' g``, ``dA = g V'``, ``dS = A (dA - sum(A dA))``, ``dQ = dS K``,
    ``dK = dS' Q`` (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        b, h, t, e = queries.shape
        n, group = b * keys.shape[1], h // keys.shape[1]
        q, k, v = queries.reshape(n, group, t, e), keys.reshape(n, t, e), values.reshape(n, t, e)
        # In memory as what follows wants it: all heads of a token side by side.
        out = q.new_empty(b, t, h, e).transpose(1, 2)
        future = q.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        weights = []
        for start, end in _blocks(t):
            scores = _rows(q, start, end) @ k[:, :end].mT
            own = scores.view(n, group, end - start, end)[..., start:]
            own += future[: end - start, : end - start]
            weights.append(scores.softmax(dim=-1))
            out[:, :, start:end] = (weights[-1] @ v[:, :end]).view(b, h, end - start, e)
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, *weights = ctx.saved_tensors
        b, h, t, e = grad.shape
        grad, to_q, to_k, to_v = grad.reshape(q.shape), torch.empty_like(q), k, v
        # The last block sees every key, so that its products begin the sums.
        for (start, end), a in zip(reversed(_blocks(t)), reversed(weights), strict=True):
            g = _rows(grad, start, end)
            to_scores = torch.ops.aten._softmax_backward_data(g @ v[:, :end].mT, a, -1, a.dtype)
            to_q[:, :, start:end] = (to_scores @ k[:, :end]).view(*q.shape[:2], end - start, e)
            k_part, v_part = to_scores.mT @ _rows(q, start, end), a.mT @ g
            if end == t:
                to_k, to_v = k_part, v_part
            else:
                to_k[:, :end] += k_part
                to_v[:, :end] += v_part
        return to_q.view(b, h, t, e), to_k.view(b, -1, t, e), to_v.view(b, -1, t, e)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """First query, and end, of each block."""
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _rows(x: Float[Tensor, "n g t e"], start: int, end: int) -> Float[Tensor, "n gt e"]:
    """The tokens of a block, all query heads of a group behind one another."""
    return x[:, :, start:end].flatten(1, 2)
