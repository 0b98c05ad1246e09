"""The baseline of the speedrun: nanoGPT's published CPU recipe, made again from its description.

Characters, four layers of 128, context 64, batches of 12, 2,000 steps of AdamW in float32
(README of github.com/karpathy/nanoGPT, "I only have a macbook"). GPT-2's block: LayerNorm without
bias, GELU, learned positions, one table for input and output. About 0.80M parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """Shape and training of the baseline, as published.

    Attributes:
        layers: Blocks.
        heads: Attention heads a block.
        width: Of the residual stream; the feed-forward is four times as wide.
        context: Characters a row.
        rows: Rows a step.
        steps: Optimizer steps.
        warmup: Steps in which the learning rate rises from zero.
        peak: Highest learning rate.
        final: Learning rate at the end of half a cosine.
        betas: Decay of AdamW's moments.
        weight_decay: Of the matrices.
        clip: Longest gradient.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    rows: int = 12
    steps: int = 2000
    warmup: int = 100
    peak: float = 1e-3
    final: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of the ``step``-th step, counted from zero."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width = recipe.width
        self.heads = recipe.heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.before_feed_forward = nn.LayerNorm(width, bias=False)
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes ``(rows, characters, width)``."""
        rows, length, width = x.shape
        products = self.queries_keys_values(self.before_attention(x))
        by_head = products.view(rows, length, 3 * self.heads, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(*by_head.chunk(3, dim=1), is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.narrow(F.gelu(self.wide(self.before_feed_forward(x))))


class NanoGPT(nn.Module):
    """Character ids to logits.

    Args:
        vocab_size: Distinct characters.
        recipe: Shape.
    """

    def __init__(self, vocab_size: int, recipe: Recipe) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocab_size, recipe.width)
        self.positions = nn.Embedding(recipe.context, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.last = nn.LayerNorm(recipe.width, bias=False)
        residual = 0.02 / math.sqrt(2 * recipe.layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("mixed.weight", "narrow.weight"))
                nn.init.normal_(weight, std=residual if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(rows, characters, vocab_size)`` of the next character at every position."""
        x = self.characters(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.last(x), self.characters.weight)


def train(
    tokens: np.ndarray,
    vocab_size: int,
    seed: int,
    after_step: Callable[[int, nn.Module], None],
    recipe: Recipe | None = None,
) -> NanoGPT:
    """Train as published.

    Args:
        tokens: Character ids ``(N,)``.
        vocab_size: Distinct characters.
        seed: Decides initial weights and windows.
        after_step: Called with the number of steps done and the model.
        recipe: Another one, for tests.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    model = NanoGPT(vocab_size, recipe)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=recipe.betas,
    )
    data = torch.from_numpy(tokens.astype(np.int64))
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        starts = torch.randint(len(data) - recipe.context, (recipe.rows,)).tolist()
        windows = torch.stack([data[start : start + recipe.context + 1] for start in starts])
        logits = model(windows[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        after_step(step + 1, model)
    return model
