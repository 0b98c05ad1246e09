from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from instar.model import CausalLM, ModelConfig
from instar.model import layers as model_layers
from instar.model.layers import Block, rotary_tables
from instar.planning.hardware import ACCELERATORS
from instar.planning.speed import (
    Line,
    fused_block_bytes,
    orthogonalization_flops,
    reckoned,
    saved_bytes,
)
from instar.training.optimizer import OptimizerConfig, orthogonalize


def test_a_line_goes_through_its_points() -> None:
    line = Line(0.5, 0.01, 0.0002)
    points = [(n, w, line(n, w)) for n, w in ((256, 32), (2048, 32), (2048, 256))]
    found = Line.through(points[0], points[1], points[2])
    assert found(1000, 100) == pytest.approx(line(1000, 100))


def test_noise_makes_no_part_negative() -> None:
    line = Line.through((256, 32, 1.0), (2048, 32, 0.9), (2048, 256, 0.8))
    assert line.start >= 0 and line.token == 0 and line.pair == 0


def test_saved_bytes_of_a_known_layer() -> None:
    linear = nn.Linear(4, 8, bias=False)
    x = torch.randn(10, 4, requires_grad=True)
    # The product keeps its input; its weight is there anyway.
    assert saved_bytes(lambda: linear(x), linear) == 10 * 4 * 4
    # The square root keeps its result as well.
    assert saved_bytes(lambda: linear(x).exp(), linear) == 10 * 4 * 4 + 10 * 8 * 4


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
