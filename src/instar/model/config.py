"""The shape of a model, in Hugging Face's words, and what it costs."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt
from pydantic import model_validator

from instar.config import Config

Positive = Annotated[int, Gt(0)]

RewardForm = Literal["last", "mean", "prior"]
"""What a reply is worth to a reward model:

- ``last``: the score of its last token. The only form that transformers knows.
- ``mean``: the mean score of its tokens. A shallow model finds a flaw only where it stands; so it
  need not carry what it found to the end.
- ``prior``: the mean score, plus the mean log-likelihood of its tokens times a learned weight
  that begins at 1. The language model's own opinion comes first (it is SimPO's reward: Meng et
  al. 2024, arXiv:2405.14734, eq. 4), and the scores learn what to correct.
"""


class ModelConfig(Config):
    """A dense decoder: Qwen3 (normalised queries and keys) or Llama (plain).

    Both use RMSNorm before each block, rotary positions, grouped-query attention and a SwiGLU
    feed-forward, without biases.
    """

    family: Literal["qwen3", "llama"] = "qwen3"
    """Which Hugging Face architecture the checkpoint is: `qwen3` has QK-norm, `llama` has not."""
    vocab_size: Positive = 2048
    """Rows of the embedding; the tokenizer decides it when a model is made from scratch."""
    hidden_size: Positive = 256
    """Width of the residual stream."""
    intermediate_size: Positive = 704
    """Width of the feed-forward."""
    num_hidden_layers: Positive = 4
    """Number of blocks."""
    num_attention_heads: Positive = 4
    """Number of query heads."""
    num_key_value_heads: Positive = 4
    """Number of key and value heads; fewer than query heads saves cache (grouped queries)."""
    head_dim: Positive = 64
    """Width of one head."""
    max_position_embeddings: Positive = 512
    """The longest context, in tokens."""
    rope_theta: Annotated[float, Gt(0)] = 10_000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the mean square before its root is taken."""
    initializer_range: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    reward_form: RewardForm = "last"
    """How a reward model makes a reply's reward of its scores; language models do not use it."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")
        return self

    def matrix_parameters(self) -> int:
        """Weights that take part in a matrix product for every token (the head included)."""
        d, h = self.hidden_size, self.head_dim
        attention = d * h * 2 * (self.num_attention_heads + self.num_key_value_heads)
        block = attention + 3 * d * self.intermediate_size
        return self.num_hidden_layers * block + self.vocab_size * d

    def parameters(self) -> int:
        """All weights of a language model of this shape."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.family == "qwen3" else 0)
        untied = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        vectors = self.num_hidden_layers * norms + self.hidden_size
        return self.matrix_parameters() + untied + vectors

    def flops_per_token(self, context: int, backward: bool = True) -> int:
        """Floating-point operations for one token at a mean context length.

        Two per weight forward, four backward (Kaplan et al. 2020, arXiv:2001.08361, table 1),
        and attention's two products over a causal context, which is half full on average
        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

        Args:
            context: Length of the sequence the token stands in.
            backward: Whether gradients are computed as well.
        """
        width = self.num_attention_heads * self.head_dim
        forward = 2 * self.matrix_parameters() + self.num_hidden_layers * 2 * context * width
        return forward * (3 if backward else 1)
