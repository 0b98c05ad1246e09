"""Llama 3's stretched rotary frequencies: four settings for some, a list of factors for others.

Llama 3.1 leaves fast frequencies as they are, divides slow ones by ``factor``, and blends between
the two. ``config.json`` holds the four settings, a GGUF file the factor of every frequency, so
one must be computed from the other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from instar.errors import UserError

CLOSE = 1e-3
"""How far, relatively, recomputed factors may lie from those of the file."""


def llama3_factors(rope: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """By what each frequency is divided.

    A frequency has the wave length ``w = 2 pi theta^(2i/d)``, in tokens. Its share
    ``s = (n / w - low) / (high - low)``, held within 0 and 1, stays; the rest is divided by
    ``factor``.

    Args:
        rope: ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings`` (``n`` above), as in ``config.json``.
        head_dim: Width of a head, ``d``.
        theta: Base of the frequencies.

    Returns:
        (d / 2,) float32.
    """
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = rope["original_max_position_embeddings"] / _wave_lengths(head_dim, theta)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / rope["factor"] + share)).astype(np.float32)


def llama3_settings(factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """The settings that give ``factors``.

    ``s`` is linear in ``1 / w``: its slope and offset come from any two blended frequencies. They
    leave one scale open (twice ``n``, ``low`` and ``high`` give the same factors), which is chosen
    so that ``low`` is 1, as Meta has it.

    Raises:
        UserError: No such settings do.
    """
    factors = factors.astype(np.float64)
    factor = float(factors.max())
    blended = (factors > 1.0 + CLOSE) & (factors < factor * (1 - CLOSE))
    settings = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings["original_max_position_embeddings"] = 8192
    if factor > 1.0 and blended.sum() >= 2:
        share = (1.0 / factors[blended] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(1.0 / _wave_lengths(head_dim, theta)[blended], share, 1)
        if slope > 0 > offset:
            settings["high_freq_factor"] = round(1.0 - 1.0 / offset, 3)
            settings["original_max_position_embeddings"] = round(-slope / offset)
    found = llama3_factors(settings, head_dim, theta)
    if found.shape != factors.shape or not np.allclose(found, factors, rtol=CLOSE):
        raise UserError(
            "the file's rope_freqs.weight are not the factors of Llama 3",
            "instar knows no other settings that stretch single frequencies.",
        )
    return settings


def _wave_lengths(head_dim: int, theta: float) -> np.ndarray:
    """How many tokens one turn of each frequency takes; (head_dim / 2,)."""
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
