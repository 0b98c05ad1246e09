from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from instar.generation import Engine
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer

CONFIG = ModelConfig(
    vocab_size=262,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.15,
)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A model with weights that depend on the seed alone."""

    def make(kind: type[Any] = CausalLM, seed: int = 0) -> Any:
        model = kind(CONFIG)
        generator = torch.Generator().manual_seed(seed)
        initialize(model, CONFIG, generator)
        if kind is ScoreModel:
            torch.nn.init.normal_(model.score.weight, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and control tokens, no merges: 262 ids."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, [], 64)
    return Tokenizer.load(directory)


@pytest.fixture
def engine(make_model: Callable[..., Any], tokenizer: Tokenizer) -> Engine:
    """A random policy: most of its replies are cut off, some end by themselves."""
    return Engine(make_model(), tokenizer)
