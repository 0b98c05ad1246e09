"""The shape of a model, in Hugging Face's words, and what it costs."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt
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


Family = Literal["qwen3", "llama", "qwen2", "mistral", "gpt2", "qwen3_moe"]
"""Hugging Face architectures, by the name that their ``model_type`` has.

- ``qwen3``: queries and keys are normalised.
- ``llama``: they are not; TinyLlama and SmolLM2 are of this kind.
- ``qwen2``: as Llama, with biases on queries, keys and values; Qwen2.5 is of this kind.
- ``mistral``: as Llama, often with a sliding window.
- ``gpt2``: learned positions, LayerNorm, one wide layer instead of a gated one.
- ``qwen3_moe``: as Qwen3, with experts in place of the feed-forward.
"""

LayerType = Literal["full_attention", "sliding_attention"]
"""Whether a block's queries look at every token before them, or at the nearest ones."""


class RopeScaling(Config):
    """How rotary frequencies are slowed down, so that a model reads more than it was trained on."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """`linear` slows all alike, `llama3` and `yarn` the slow ones only."""
    factor: Annotated[float, Gt(0)]
    """By how much: about the new context over the old one."""
    original_max_position_embeddings: Positive | None = None
    """The context of the training before (llama3, yarn)."""
    low_freq_factor: Annotated[float, Gt(0)] = 1.0
    """llama3: what turns fewer times than this within the old context is slowed down whole."""
    high_freq_factor: Annotated[float, Gt(0)] = 4.0
    """llama3: what turns more often than this stays as it is."""
    beta_fast: Annotated[float, Gt(0)] = 32.0
    """yarn: what turns more often than this within the old context stays as it is."""
    beta_slow: Annotated[float, Gt(0)] = 1.0
    """yarn: what turns fewer times than this is slowed down whole."""
    attention_factor: Annotated[float, Gt(0)] | None = None
    """yarn: cosines and sines are multiplied by it; `0.1 ln(factor) + 1` where it is not given."""
    mscale: float | None = None
    """yarn: weight of the logarithm in `attention_factor`, if `mscale_all_dim` is given as well."""
    mscale_all_dim: float | None = None
    """yarn: the same for the number that it is divided by."""
    truncate: bool = True
    """yarn: whether the bounds between fast and slow channels are rounded to whole channels."""

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        if self.rope_type != "linear" and self.original_max_position_embeddings is None:
            raise ValueError(f"{self.rope_type} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be less than high_freq_factor")
        return self


ROTARY: tuple[Family, ...] = ("qwen3", "llama", "qwen2", "mistral", "qwen3_moe")
"""Families whose positions are rotations."""

WINDOWED: tuple[Family, ...] = ("qwen3", "qwen2", "mistral", "qwen3_moe")
"""Families that may have a sliding window."""


class ModelConfig(Config):
    """A decoder of one of the known families, ``Family``.

    All but GPT-2 use RMSNorm before each block, rotary positions, grouped-query attention and a
    SwiGLU feed-forward.
    """

    family: Family = "qwen3"
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
    """Added to the mean square before its root is taken (GPT-2: to the variance)."""
    initializer_range: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    attention_bias: bool = False
    """Whether queries, keys, values and output have biases (llama, qwen3, qwen3_moe). Qwen2 always
    has the first three and GPT-2 all four; Mistral has none."""
    mlp_bias: bool = False
    """Whether the feed-forward has biases (llama); GPT-2's always has."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are slowed down for a longer context; null leaves them as they are."""
    sliding_window: Positive | None = None
    """The nearest tokens that a query sees, itself included; null lets it see all before it."""
    layer_types: tuple[LayerType, ...] | None = None
    """Which blocks keep to the window (qwen2, qwen3); null lets all do so."""
    num_experts: Annotated[int, Ge(0)] = 0
    """Feed-forwards beside one another, of which each token is sent to a few (qwen3_moe)."""
    num_experts_per_tok: Positive = 8
    """To how many."""
    moe_intermediate_size: Positive = 768
    """Width of one expert."""
    norm_topk_prob: bool = False
    """Whether the weights of the chosen experts are made to sum to one."""
    decoder_sparse_step: Positive = 1
    """Every so manieth block has experts."""
    mlp_only_layers: tuple[Annotated[int, Ge(0)], ...] = ()
    """Blocks that have a plain feed-forward nevertheless, counted from 0."""
    reward_form: RewardForm = "last"
    """How a reward model makes a reply's reward of its scores; language models do not use it."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.family == "gpt2":
            same = self.num_key_value_heads == self.num_attention_heads
            if not same or self.num_attention_heads * self.head_dim != self.hidden_size:
                raise ValueError(
                    "gpt2 has as many key heads as query heads, and together they are as wide as "
                    f"the model: num_key_value_heads {self.num_key_value_heads}, "
                    f"num_attention_heads {self.num_attention_heads}, head_dim {self.head_dim}, "
                    f"hidden_size {self.hidden_size}"
                )
        elif self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")
        return self

    @model_validator(mode="after")
    def _family_has(self) -> ModelConfig:
        """Parts that are asked for, and that the family has not."""
        asked = {
            "attention_bias": (self.attention_bias, ("llama", "qwen3", "qwen3_moe")),
            "mlp_bias": (self.mlp_bias, ("llama",)),
            "rope_scaling": (self.rope_scaling is not None, ROTARY),
            "sliding_window": (self.sliding_window is not None, WINDOWED),
            "layer_types": (self.layer_types is not None, ("qwen2", "qwen3")),
            "num_experts": (self.num_experts > 0, ("qwen3_moe",)),
        }
        for name, (present, families) in asked.items():
            if present and self.family not in families:
                raise ValueError(f"{self.family} has no {name}; {', '.join(families)} may have it")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} blocks, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        if self.family == "qwen3_moe" and self.num_experts < self.num_experts_per_tok:
            raise ValueError(
                f"num_experts {self.num_experts} is less than num_experts_per_tok "
                f"{self.num_experts_per_tok}"
            )
        return self

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias or self.family in ("qwen2", "gpt2")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.family in ("qwen3", "qwen3_moe")

    def window(self, layer: int) -> int | None:
        """The sliding window of a block, if it has one."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def is_sparse(self, layer: int) -> bool:
        """Whether a block has experts."""
        left_out = layer in self.mlp_only_layers
        return self.num_experts > 0 and not left_out and (layer + 1) % self.decoder_sparse_step == 0

    def matrix_parameters(self) -> int:
        """Weights that take part in a matrix product for every token (the head included).

        Of experts, those that a token is sent to.
        """
        layers = range(self.num_hidden_layers)
        blocks = sum(self._matrices(layer, self.num_experts_per_tok) for layer in layers)
        return blocks + self.vocab_size * self.hidden_size

    def _matrices(self, layer: int, experts: int) -> int:
        """Weights of the matrices of one block, with so many experts where it has any."""
        d, h = self.hidden_size, self.head_dim
        attention = d * h * 2 * (self.num_attention_heads + self.num_key_value_heads)
        if self.is_sparse(layer):
            return attention + d * self.num_experts + 3 * d * self.moe_intermediate_size * experts
        return attention + (2 if self.family == "gpt2" else 3) * d * self.intermediate_size

    def parameters(self) -> int:
        """All weights of a language model of this shape."""
        layers = range(self.num_hidden_layers)
        blocks = sum(self._matrices(layer, self.num_experts) for layer in layers)
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size
        # A LayerNorm has a bias beside its scale.
        norm = (2 if self.family == "gpt2" else 1) * self.hidden_size
        if self.family == "gpt2":
            tables += self.max_position_embeddings
        vectors = self.num_hidden_layers * (2 * norm + self._vectors()) + norm
        return blocks + tables * self.hidden_size + vectors

    def _vectors(self) -> int:
        """Biases of a block, and what normalises its queries and keys."""
        d, f = self.hidden_size, self.intermediate_size
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        count = self.head_dim * (heads * self.qkv_bias + 2 * self.qk_norm)
        gpt2 = self.family == "gpt2"
        return (
            count + d * (self.attention_bias or gpt2) + (f + d) * gpt2 + (2 * f + d) * self.mlp_bias
        )

    def flops_per_token(self, context: int, backward: bool = True) -> int:
        """Floating-point operations for one token at a mean context length.

        Two per weight forward, four backward (Kaplan et al. 2020, arXiv:2001.08361, table 1),
        and attention's two products over a causal context, which is half full on average
        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). A window of w in a context of c
        tokens leaves ``w - w^2 / 2c`` on average.

        Args:
            context: Length of the sequence the token stands in.
            backward: Whether gradients are computed as well.
        """
        width = self.num_attention_heads * self.head_dim
        forward = 2 * self.matrix_parameters()
        for layer in range(self.num_hidden_layers):
            seen = min(self.window(layer) or context, context)
            forward += 2 * width * seen * (2 * context - seen) // max(context, 1)
        return forward * (3 if backward else 1)
