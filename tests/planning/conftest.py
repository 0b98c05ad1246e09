from __future__ import annotations

import pytest

from instar.model.config import ModelConfig


@pytest.fixture
def shape() -> ModelConfig:
    return ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
