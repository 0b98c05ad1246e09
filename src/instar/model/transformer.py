"""The decoder, with a head that names the next token or one that gives a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instar.model.cache import KVCache
from instar.model.config import ModelConfig
from instar.model.layers import Block, RMSNorm, product_dtype, rotary_tables

T = TypeVar("T")


class Decoder(nn.Module):
    """Token ids to hidden states: embedding, blocks, a last normalisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False
        """Whether the backward pass computes each block anew instead of keeping what was inside:
        activation checkpointing (Chen et al. 2016, arXiv:1604.06174), memory for a third more work.
        """

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Hidden states after the last normalisation.

        Without a cache, rows are padded on the right, so plain causal order is enough; packed
        documents are told apart by ``segment_ids``. With a cache, rows are aligned on the right
        and the new tokens are appended to it.
        """
        t = input_ids.shape[1]
        visible: Bool[Tensor, "b t s"] | None = None
        if cache is not None:
            positions, visible = cache.positions(t), cache.visible(t)
        elif segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            visible = same & torch.ones(t, t, dtype=torch.bool, device=same.device).tril()
        if positions is None:
            positions = torch.arange(t, device=input_ids.device)[None]
        x = self.embed_tokens(input_ids)
        rotary = rotary_tables(
            positions, self.config.head_dim, self.config.rope_theta, product_dtype(x)
        )
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for block in self.layers:
            if recompute:
                x = checkpoint(block, x, rotary, visible, None, use_reentrant=False)
            else:
                x = block(x, rotary, visible, cache)
        if cache is not None:
            cache.length += t
        return self.norm(x)


class Headed(nn.Module):
    """A decoder, ``model``, to which a head belongs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.sharding: str | None = None
        """How its weights are spread over processes, if they are (``instar.model.sharding``)."""

    def read(
        self,
        make: Callable[[Float[Tensor, "b t d"]], T],
        input_ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> T:
        """What ``make`` makes of the hidden states.

        Who needs the head, but not at every position, comes this way: weights that are spread
        over processes are whole only while one of the model's own methods runs.
        """
        return make(self.model(input_ids, positions, segment_ids, cache))


class CausalLM(Headed):
    """A language model: ``model`` thinks, ``lm_head`` names the next token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the next token at every position."""
        return self.read(self.lm_head, input_ids, positions, segment_ids, cache)


class ScoreModel(Headed):
    """A decoder with one number a token: a reward model or a critic."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        if config.reward_form == "prior":
            self.prior_weight = nn.Parameter(torch.ones(1))

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """A score at every position; see ``reply_scores`` for a reply's reward."""
        return self.read(self.scores, input_ids, positions, segment_ids)

    def scores(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t"]:
        """The head alone, for those who need the hidden states as well."""
        return self.score(hidden).squeeze(-1).float()


def initialize(model: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Fill a fresh model with random weights.

    Normal with ``initializer_range``; the matrices that write into the residual stream are
    scaled by one over the root of their number (Radford et al. 2019, GPT-2, section 2.3).
    A score head starts at zero, so that a critic begins by knowing nothing.
    """
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0)
            elif name.endswith("score.weight"):
                weight.zero_()
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = config.initializer_range * (depth_scale if writes else 1.0)
                weight.normal_(0.0, std, generator=generator)
