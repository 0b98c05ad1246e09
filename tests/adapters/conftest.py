from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from instar.model import CausalLM, ModelConfig, ScoreModel
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
        initializer_range=0.3,
    )


@pytest.fixture
def make_model(config: ModelConfig) -> Callable[[], CausalLM]:
    """The same model each time."""

    def made() -> CausalLM:
        model = CausalLM(config)
        initialize(model, config, torch.Generator().manual_seed(0))
        return model.eval()

    return made


@pytest.fixture
def model(make_model: Callable[[], CausalLM]) -> CausalLM:
    return make_model()


@pytest.fixture
def scorer(config: ModelConfig) -> ScoreModel:
    made = ScoreModel(config)
    initialize(made, config, torch.Generator().manual_seed(0))
    return made.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 61, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def shake() -> Callable[[nn.Module], None]:
    """Training that took place: what learns is moved at random."""

    def shaken(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.2 * torch.randn(weight.shape, generator=generator)

    return shaken
