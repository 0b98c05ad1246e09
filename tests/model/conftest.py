from __future__ import annotations

from typing import Any

import pytest
import torch

from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {},
    "qwen2": {"sliding_window": 5, "layer_types": ("full_attention", "sliding_attention")},
    "mistral": {"sliding_window": 5},
    "gpt2": {"num_key_value_heads": 4, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Grouped queries, and heads whose joint width is not the model's, where a family allows it."""
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        # Large weights: attention looks somewhere, instead of everywhere alike.
        "initializer_range": 0.3,
    }
    return ModelConfig(family=request.param, **shape | FAMILIES[request.param])


@pytest.fixture
def model(config: ModelConfig) -> CausalLM:
    made = CausalLM(config)
    initialize(made, config, torch.Generator().manual_seed(0))
    return made.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 61, (3, 12), generator=torch.Generator().manual_seed(1))
