from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from instar.model import CausalLM, ModelConfig
from instar.model import layers as model_layers
from instar.model.layers import Block, rotary_tables
from instar.planning.hardware import ACCELERATORS
from instar.planning.reckoned import fused_block_bytes, orthogonalization_flops, reckoned
from instar.planning.trial import saved_bytes
from instar.training.optimizer import OptimizerConfig, orthogonalize


def test_parameters_are_those_of_the_model(shape: ModelConfig) -> None:
    for form in (shape, shape.model_copy(update={"tie_word_embeddings": False, "family": "llama"})):
        assert form.parameters() == sum(p.numel() for p in CausalLM(form).parameters())


def test_fused_activations_are_counted_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count for accelerators against what autograd keeps, torch's own kernels in place."""
    shape = ModelConfig(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
    )  # fmt: skip

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(model_layers, "attend", fused)
    block = Block(shape, 0)
    x = torch.randn(8, 64, 128, requires_grad=True)
    rotary = rotary_tables(torch.arange(64)[None], 32, 1e4, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: block(x, rotary, None, None), block)
    weights = 2 * sum(p.numel() for p in block.parameters())  # casts, kept by the block once
    # The normalisation by hand, which CPUs take, keeps two bytes where torch's kernel keeps four.
    normalised = 2 * 128 + (4 + 2) * 32
    expected = fused_block_bytes(shape) - 2 * normalised
    assert (kept - weights) / (8 * 64) == pytest.approx(expected, rel=0.1)


def test_orthogonalization_is_counted_as_it_is_done(shape: ModelConfig) -> None:
    matrices = [p for n, p in CausalLM(shape).named_parameters() if p.dim() == 2 and "layers." in n]
    with FlopCounterMode(display=False) as counter:
        for matrix in matrices:
            orthogonalize(matrix.detach()[None])
    assert counter.get_total_flops() == orthogonalization_flops(shape)


def test_reckoned_seconds_are_the_field_s_formula(shape: ModelConfig) -> None:
    hardware = ACCELERATORS["H100"]
    speed = reckoned(shape, OptimizerConfig(), hardware)
    tokens, width = 64 * 64, 64
    layers = shape.num_hidden_layers * (speed.block(tokens, width) - speed.block.start)
    spent = layers + speed.head(tokens)
    flops = tokens * shape.flops_per_token(width)
    assert spent == pytest.approx(flops / (0.4 * hardware.flops))
