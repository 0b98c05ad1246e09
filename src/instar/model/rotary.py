"""Rotary frequencies that are slowed down, so that a model reads on where its training ended."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from instar.model.config import RopeScaling


def scaled(
    frequencies: Float[Tensor, " half"], theta: float, scaling: RopeScaling
) -> tuple[Float[Tensor, " half"], float]:
    """Frequencies after scaling, and what cosines and sines are multiplied by.

    Args:
        frequencies: ``theta^(-2i/E)`` of each pair of channels, in radians a token.
        theta: The base.
        scaling: By which rule.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, theta, scaling), attention_factor(scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """What turns rarely within the old context is slowed down, with a ramp up to what turns often.

    The rule of Llama 3.1, which its paper does not write out (Grattafiori et al. 2024,
    arXiv:2407.21783, section 3.4.2); facts as in transformers' documentation of `llama3`.
    """
    assert scaling.original_max_position_embeddings is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """NTK by parts (Peng et al. 2023, arXiv:2309.00071, definition 2).

    The ramp is linear in the channel's number, as in the authors' code; the paper has it linear in
    the number of turns.
    """
    half = len(frequencies)
    original = scaling.original_max_position_embeddings
    assert original is not None

    def channel(turns: float) -> float:
        """Which pair of channels turns so often within the old context."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 0.001  # so that the ramp has a width
    channels = torch.arange(half, dtype=torch.float32, device=frequencies.device)
    slowed = ((channels - first) / (last - first)).clamp(0, 1)
    return slowed * frequencies / scaling.factor + (1 - slowed) * frequencies


def attention_factor(scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by: the root of YaRN's ``1/t`` (the same, eq. 22)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def root(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return root(scaling.mscale) / root(scaling.mscale_all_dim)
    return root(1.0)
