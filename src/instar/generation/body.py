"""The weights of a model, laid out for writing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from instar.generation import lean, native
from instar.generation.lean import Body, Layer, Place
from instar.generation.products import Format, product_of
from instar.model.feedforward import FeedForward
from instar.model.layers import Attention, Block, RMSNorm, rotary_tables
from instar.model.transformer import CausalLM, Decoder

Forward = Callable[[Tensor, Place, Tensor | None], Tensor]
"""``lean.forward`` with the weights of a model."""

M = TypeVar("M")
Make = Callable[[Tensor, Tensor | None], M]
"""Makes a matrix of a float32 weight ``(outputs, inputs)`` and its bias."""


def fits(model: CausalLM) -> bool:
    """Whether ``lean.forward`` does what the model does: a plain decoder, and nothing added."""
    decoder, config = model.model, model.config
    window = config.sliding_window
    if not isinstance(decoder, Decoder) or model.sharding or decoder.prefix is not None:
        return False
    if window is not None and window < config.max_position_embeddings:
        return False
    linear = all(
        type(layer) is nn.Linear
        for block in decoder.layers
        for layer in _linears(block)  # type: ignore[arg-type]
    )
    return (
        linear and type(model.lm_head) is nn.Linear and type(decoder.embed_tokens) is nn.Embedding
    )


def _linears(block: Block) -> list[nn.Module]:
    """The matrices of a block; something that is none stands for what is not known here."""
    attention, mlp = block.self_attn, block.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, FeedForward):
        return [block]
    heads = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*heads, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def is_compiled(model: CausalLM) -> bool:
    """Whether ``fast_forward`` runs compiled code."""
    return native.takes(model.config, model.lm_head.weight.device)


def fast_forward(model: CausalLM, format: Format) -> Forward:
    """The fastest way to compute the model here, with a copy of its matrices.

    Args:
        model: One that ``fits``.
        format: Of the copies.
    """
    if is_compiled(model):
        return native.NativeForward(laid_out(model, partial(native.Panels, format)), format)
    return partial(lean.forward, laid_out(model, partial(product_of, format)))


@torch.no_grad()
def laid_out(model: CausalLM, make: Make[M]) -> Body[M]:
    """A copy of the matrices, joined and in another form; what is no matrix stays the model's."""
    decoder, c = model.model, model.config
    assert isinstance(decoder, Decoder)
    device = decoder.embed_tokens.weight.device
    places = torch.arange(c.max_position_embeddings, device=device)[None]
    cos, sin = rotary_tables(places, c.head_dim, c.rope_theta, torch.float32, c.rope_scaling)
    layers = tuple(_layer(block, model, make) for block in decoder.layers)  # type: ignore[arg-type]
    head = _product([model.lm_head], make, decoder.norm)
    embedding = decoder.embed_tokens.weight
    eps, head_eps = (
        torch.tensor(math.sqrt(width * c.rms_norm_eps), device=device)
        for width in (c.hidden_size, c.head_dim)
    )
    turns = cos[0, 0][:, None], sin[0, 0][:, None]
    return Body(c, layers, embedding, head, *turns, eps, head_eps)


def _layer(block: Block, model: CausalLM, make: Make[M]) -> Layer[M]:
    attention, mlp, c = block.self_attn, block.mlp, model.config
    assert isinstance(mlp, FeedForward)
    head_norm = None
    if c.qk_norm:
        scales = attention.q_norm.weight, attention.k_norm.weight
        times = c.num_attention_heads, c.num_key_value_heads
        rows = [s.float().expand(n, -1) for s, n in zip(scales, times, strict=True)]  # type: ignore[operator]
        head_norm = torch.cat(rows) * math.sqrt(c.head_dim)
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    return Layer(
        _product(heads, make, block.input_layernorm),
        _product([attention.o_proj], make),
        _product([mlp.gate_proj, mlp.up_proj], make, block.post_attention_layernorm),
        _product([mlp.down_proj], make),
        head_norm,
    )


def _product(layers: list[nn.Linear], make: Make[M], norm: RMSNorm | None = None) -> M:
    """One product for several layers with the same input.

    Args:
        layers: Their outputs stand side by side.
        make: Of the matrix.
        norm: What normalises the input: ``W (s x) = (W s) x`` spares to scale each input;
            the root of its width is what a forward pass leaves out.
    """
    parts = [layer.weight.float() for layer in layers]
    if norm is not None:
        scale = norm.weight.float() * math.sqrt(len(norm.weight))
        parts = [part * scale for part in parts]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return make(weight, torch.cat(biases).float() if biases else None)
