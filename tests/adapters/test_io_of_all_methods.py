"""Every method's directory is read back as it was, also those that PEFT has no word for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instar.adapters import base
from instar.adapters.bitfit import BitFitConfig
from instar.adapters.bottleneck import BottleneckConfig
from instar.adapters.ia3 import IA3Config
from instar.adapters.io import load_adapter, save_adapter
from instar.adapters.methods import described, understood
from instar.adapters.prefix import PrefixConfig
from instar.adapters.prompt import PromptConfig
from instar.checkpoint import load_causal_lm, save_model
from instar.errors import UserError
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize

METHODS = [
    IA3Config(),
    BitFitConfig(targets=["q_proj", "up_proj"]),
    BottleneckConfig(placement="pfeiffer", width=5, activation="relu"),
    PrefixConfig(num_virtual_tokens=5),
    PrefixConfig(num_virtual_tokens=5, projection=True),
    PromptConfig(num_virtual_tokens=5),
]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_directory_is_read_back(method, make_model, ids: Tensor, shake, tmp_path: Path):
    save_model(make_model(), tmp_path / "base")
    model, other = make_model(), make_model()
    base.add(model, method)
    shake(model)
    save_adapter(model, "default", tmp_path / "adapter", tmp_path / "base")
    load_adapter(other, tmp_path / "adapter", "again", tmp_path / "base")
    torch.testing.assert_close(other(ids), model(ids), atol=1e-6, rtol=1e-6)
    assert type(other.adapters["again"]) is type(method)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (PrefixConfig(), {"num_virtual_tokens": None}),
        (PromptConfig(), {"num_virtual_tokens": -1}),
        (PromptConfig(), {"modules_to_save": "norm"}),
        (IA3Config(), {"target_modules": [1]}),
        (IA3Config(), {"feedforward_modules": 3}),
        (IA3Config(), {"peft_type": ["IA3"]}),
    ],
    ids=str,
)
def test_a_record_that_is_no_record_is_refused(method, changes: dict[str, Any]):
    values = described(method) | changes
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        understood({name: value for name, value in values.items() if value is not None})


@torch.no_grad()
def test_gpt2s_ia3_is_read_back(shake, tmp_path: Path):
    """Its layers have other paths in files than here."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = ModelConfig(
        family="gpt2", vocab_size=61, hidden_size=16, intermediate_size=24, head_dim=8, **shape
    )
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "base")
    base.add(model, IA3Config())
    shake(model)
    save_adapter(model, "default", tmp_path / "adapter", tmp_path / "base")
    other, ids = load_causal_lm(tmp_path / "base"), torch.arange(20)[None]
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(ids), model(ids))


def test_virtual_tokens_of_another_base_are_refused(make_model, config, tmp_path: Path):
    save_model(make_model(), tmp_path / "base")
    model = make_model()
    base.add(model, PrefixConfig(num_virtual_tokens=5))
    save_adapter(model, "default", tmp_path / "adapter", tmp_path / "base")
    deeper = CausalLM(config.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="does not fit this base: prompt_embeddings"):
        load_adapter(deeper, tmp_path / "adapter")
    assert not deeper.adapters
