from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instar.checkpoint import save_model
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import save_tokenizer

CONTEXT = 128


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two stages: random models that know bytes and control tokens."""
    run = tmp_path_factory.mktemp("run")
    config = ModelConfig(
        vocab_size=262,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    for seed, stage in enumerate(("sft", "rlvr")):
        model = CausalLM(config)
        initialize(model, config, torch.Generator().manual_seed(seed))
        save_model(model, run / stage)
        save_tokenizer(run / stage, [], CONTEXT)
    return run
