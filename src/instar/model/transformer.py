"""The decoder, with a head that names the next token or one that gives a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from instar.model.cache import KVCache
from instar.model.config import ModelConfig
from instar.model.gpt2 import GPT2Decoder
from instar.model.layers import Block, RMSNorm, rotary_tables
from instar.model.stack import Stack

T = TypeVar("T")


class Decoder(Stack):
    """Rotary positions and RMSNorm: every family but GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def embeddings(self) -> Any:
        """The table of tokens: an ``nn.Embedding``, or what adapters have put in its place."""
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last."""
        return self.layers

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions."""
        c = self.config
        return rotary_tables(positions, c.head_dim, c.rope_theta, dtype, c.rope_scaling)

    def finish(self, x: Tensor) -> Tensor:
        """The last normalisation."""
        return self.norm(x)


def decoder_of(config: ModelConfig) -> Stack:
    """A decoder of the right family, its weights not yet set."""
    return GPT2Decoder(config) if config.family == "gpt2" else Decoder(config)


class Headed(nn.Module):
    """A decoder, ``model``, to which a head belongs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Stack = decoder_of(config)
        self.sharding: str | None = None
        """How its weights are spread over processes, if they are (``instar.model.sharding``)."""
        self.adapters: dict[str, Any] = {}
        """Adapters by name, each with its method's settings (``instar.adapters``)."""

    @property
    def context(self) -> int:
        """The longest text, in tokens: virtual ones in front of it take up their share."""
        virtual = self.model.prefix.longest if self.model.prefix is not None else 0
        return self.config.max_position_embeddings - virtual

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
        self.tie()

    def tie(self) -> None:
        """Make input and output embeddings one matrix, where they are to be."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

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
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() < 2:
                weight.fill_(1.0)
            elif name.endswith("score.weight"):
                weight.zero_()
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
                std = config.initializer_range * (depth_scale if writes else 1.0)
                weight.normal_(0.0, std, generator=generator)
