"""Llama 3's factors equal those of transformers, and the settings are found again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from instar.errors import UserError
from instar.exchange.rope_factors import llama3_factors, llama3_settings

SETTINGS = [
    (8.0, 1.0, 4.0, 8192, 500_000.0, 128),
    (32.0, 1.0, 4.0, 8192, 500_000.0, 64),
    (4.0, 1.0, 3.0, 2048, 10_000.0, 64),
]


def settings(values: tuple[float, ...]) -> tuple[dict[str, Any], int, float]:
    factor, low, high, length, theta, width = values
    rope = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return rope | {"original_max_position_embeddings": int(length)}, int(width), theta


@pytest.mark.parametrize("values", SETTINGS)
def test_factors_are_those_of_transformers(values: tuple[float, ...]) -> None:
    rope, width, theta = settings(values)
    config = LlamaConfig(
        head_dim=width,
        hidden_size=4 * width,
        num_attention_heads=4,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **rope},
    )
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(np.arange(0, width, 2) / width)
    np.testing.assert_allclose(
        llama3_factors(rope, width, theta), plain / stretched.numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("values", SETTINGS)
def test_settings_are_found_again(values: tuple[float, ...]) -> None:
    rope, width, theta = settings(values)
    assert llama3_settings(llama3_factors(rope, width, theta), width, theta) == pytest.approx(rope)


def test_other_factors_are_refused() -> None:
    with pytest.raises(UserError, match="not the factors of Llama 3"):
        llama3_settings(np.linspace(1, 3, 32, dtype=np.float32), 64, 10_000.0)
