from __future__ import annotations

import pytest
import torch

from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize


@pytest.fixture(params=["qwen3", "llama"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Grouped queries, and heads whose joint width is not the model's."""
    return ModelConfig(
        family=request.param,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        # Large weights: attention looks somewhere, instead of everywhere alike.
        initializer_range=0.3,
    )


@pytest.fixture
def model(config: ModelConfig) -> CausalLM:
    made = CausalLM(config)
    initialize(made, config, torch.Generator().manual_seed(0))
    return made.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 61, (3, 12), generator=torch.Generator().manual_seed(1))
