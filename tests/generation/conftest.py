from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from instar.adapters.base import activate, add
from instar.adapters.lora import LoRAConfig
from instar.generation import Engine, native
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer

CONTEXT = 48


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and control tokens, no merges: 262 ids."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, [], CONTEXT)
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def engine(tokenizer: Tokenizer) -> Engine:
    """A random model, with weights large enough that its preferences are clear."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    return Engine(model, tokenizer)


@pytest.fixture
def add_speakers() -> Callable[[CausalLM], None]:
    """Gives a model two adapters that change much, poet and clerk, and lets neither speak."""

    def give(model: CausalLM) -> None:
        for seed, name in enumerate(("poet", "clerk")):
            add(model, LoRAConfig(rank=4), seed, name)
            with torch.no_grad():
                for path, weight in model.named_parameters():
                    if name in path:
                        weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        activate(model, None)

    return give


@pytest.fixture
def compiler() -> None:
    """There is one: then what it cannot build is a mistake of ours."""
    command = shlex.split(os.environ.get("CXX") or "g++")[0]
    if not shutil.which(command):
        pytest.skip(f"there is no C++ compiler ({command})")
    assert native.library() is not None, "forward.cpp cannot be built"


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute the forward pass for writing."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        request.getfixturevalue("compiler")
    return request.param
