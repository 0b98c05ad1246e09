import random
from pathlib import Path

import pytest
import torch

from instar.model.config import ModelConfig
from instar.model.transformer import CausalLM, initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, [(b"t", b"h"), (b"th", b"e")], 64)
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.3,
    )


@pytest.fixture(scope="session")
def model(config: ModelConfig) -> CausalLM:
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)
