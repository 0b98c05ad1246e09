"""GPT-2: learned positions, LayerNorm, and a feed-forward without a gate (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from instar.compilation import compilable
from instar.model.cache import Past
from instar.model.config import ModelConfig
from instar.model.layers import attend, product_dtype
from instar.model.stack import Stack


class Conv1D(nn.Module):
    """A linear layer whose matrix is stored the other way round: ``y = x W + b``.

    GPT-2 was first written with convolutions of width one, and its files still hold what those
    held; hence the name, which is Hugging Face's.

    Args:
        in_features: Rows of ``weight``.
        out_features: Its columns.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Multiply and shift."""
        y = torch.addmm(self.bias, x.reshape(-1, self.in_features), self.weight)
        return y.view(*x.shape[:-1], self.out_features)


class LayerNorm(nn.Module):
    """Subtracts the mean, divides by the deviation (Ba et al. 2016, arXiv:1607.06450, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Normalise and scale in float32; the result has the format of the products that follow."""
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        return F.layer_norm(x.to(exact), weight.shape, weight, bias, self.eps).to(product_dtype(x))


class GPT2Attention(nn.Module):
    """Causal self-attention; one matrix makes queries, keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.layer, self.head_dim = layer, config.head_dim
        self.c_attn = Conv1D(d, 3 * d)
        self.c_proj = Conv1D(d, d)

    def forward(
        self, x: Float[Tensor, "b t d"], visible: Bool[Tensor, "b t s"] | None, past: Past | None
    ) -> Float[Tensor, "b t d"]:
        """Mix each token with those before it."""
        parts = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if past is not None:
            k, v = past.extend(self.layer, k, v)
        return self.c_proj(attend(q, k, v, visible).transpose(1, 2).flatten(2))


class GPT2FeedForward(nn.Module):
    """Widen, bend, narrow; GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.hidden_size, config.intermediate_size)
        self.c_proj = Conv1D(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Each token by itself."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GPT2FeedForward(config)

    @compilable
    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotary: None,
        visible: Bool[Tensor, "b t s"] | None,
        cache: Past | None,
    ) -> Float[Tensor, "b t d"]:
        """One layer of thought; ``rotary`` is what blocks of other families get."""
        x = x + self.attn(self.ln_1(x), visible, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Decoder(Stack):
    """GPT-2's body, under Hugging Face's names: ``wte``, ``wpe``, ``h``, ``ln_f``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, d)
        self.wpe = nn.Embedding(config.max_position_embeddings, d)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(d, config.rms_norm_eps)

    @property
    def embeddings(self) -> Any:
        """The table of tokens: an ``nn.Embedding``, or what adapters have put in its place."""
        return self.wte

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last."""
        return self.h

    def begin(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "#b t"]) -> Tensor:
        """Tokens and where they stand, added."""
        return x + self.wpe(positions)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> None:
        """Nothing is rotated."""
        return None

    def finish(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The last normalisation."""
        return self.ln_f(x)
