from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from instar.model import ModelConfig
from instar.planning import trial
from instar.planning.trial import saved_bytes
from instar.rollout.source import RolloutConfig
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.training.loop import TrainingConfig
from instar.training.optimizer import OptimizerConfig


def test_saved_bytes_of_a_known_layer() -> None:
    linear = nn.Linear(4, 8, bias=False)
    x = torch.randn(10, 4, requires_grad=True)
    # The product keeps its input; its weight is there anyway.
    assert saved_bytes(lambda: linear(x), linear) == 10 * 4 * 4
    # The square root keeps its result as well.
    assert saved_bytes(lambda: linear(x).exp(), linear) == 10 * 4 * 4 + 10 * 8 * 4


def test_what_was_tried_is_not_tried_again(
    shape: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, [], 64)
    tried: list[str] = []

    def counted(name: str) -> None:
        real = getattr(trial, name)
        monkeypatch.setattr(trial, name, lambda *args: tried.append(name) or real(*args))

    for name in ("_try_parts", "_try_update", "_try_decoding"):
        counted(name)
    monkeypatch.setattr(trial, "SHAPES", ((1, 8), (2, 8), (1, 16)))
    machine = trial.Trial(Tokenizer.load(tmp_path))
    state = torch.get_rng_state()
    for name, sampled in (("adamw", False), ("muon", False), ("adamw", True), ("adamw", True)):
        training = TrainingConfig(steps=1, optimizer=OptimizerConfig(name=name))  # type: ignore[arg-type]
        speed = machine.speed(shape, training, RolloutConfig() if sampled else None)
        assert speed.update > 0 and speed.saved(64, 8) > 0 and speed.head_saved(10) > 0
        assert (speed.decode_rest(8, 24) > 0) == sampled
    assert tried == ["_try_parts", "_try_update", "_try_update", "_try_decoding"]
    assert torch.equal(torch.get_rng_state(), state), "training draws what it would have drawn"
    rougher = OptimizerConfig(name="muon", muon_iterations=3)
    machine.speed(shape, TrainingConfig(steps=1, optimizer=rougher), None)
    assert tried.count("_try_update") == 3, "another setting of the same rule"
