"""The learning rates of single weights reach the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from instar.adapters.base import add
from instar.adapters.lora import LoRAConfig
from instar.model import CausalLM, ModelConfig
from instar.objectives.language import NextToken
from instar.stages.preparing import learners
from instar.training.layers import LayersConfig
from instar.training.loop import TrainingConfig
from instar.training.optimizer import OptimizerConfig, Optimizers

PEAKS = {"adamw": 0.01, "muon": 0.3}


def rates(model: nn.Module, optimizers: Optimizers) -> dict[str, float]:
    names = {p: name for name, p in model.named_parameters()}
    groups = [group for optimizer in optimizers.all for group in optimizer.param_groups]
    return {names[p]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("lr_decay", [1.0, 0.5])
def test_b_learns_faster_than_a_and_each_block_more_slowly(name: Any, lr_decay: float) -> None:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = CausalLM(config)
    add(model, LoRAConfig(rank=2, targets=["q_proj"], lr_ratio=16))
    training = TrainingConfig(
        steps=1,
        optimizer=OptimizerConfig(name=name, lr=PEAKS["adamw"], muon_lr=PEAKS["muon"]),
        layers=LayersConfig(lr_decay=lr_decay),
    )
    _, optimizers = learners(NextToken(model), training)
    path = "model.layers.{}.self_attn.q_proj.deltas.default.lora_{}.weight"
    peaks = {
        path.format(block, matrix): PEAKS[name] * ratio * lr_decay**below
        for block, below in ((1, 1), (0, 2))
        for matrix, ratio in (("A", 1), ("B", 16))
    }
    assert rates(model, optimizers) == pytest.approx(peaks)
    optimizers.step(0.5)
    assert rates(model, optimizers) == pytest.approx({n: rate / 2 for n, rate in peaks.items()})
