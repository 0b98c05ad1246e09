"""A running average of the weights, and the run that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from instar.data.sources import PackedSource
from instar.lineage import Stopwatch
from instar.objectives.language import NextToken
from instar.stages.base import Job
from instar.stages.running import _train
from instar.tokenizer.hf import Tokenizer
from instar.training.average import Average
from instar.training.display import Display
from instar.training.loop import TrainingConfig
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.state import WorkDirectory


def test_an_average_by_hand() -> None:
    """Decays of 1/10, 2/11, then the one that was asked for."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = Average(model, decay=0.15)
    kept = 0.0
    for step, weight in enumerate((1.0, 2.0, 4.0), start=1):
        model.weight.data.fill_(weight)
        average.step()
        decay = min(0.15, step / (step + 9))
        kept = decay * kept + (1 - decay) * weight
        assert average.state[model.weight]["average"].item() == pytest.approx(kept)
    assert model.weight.item() == 4.0, "training goes on with the raw weights"
    with average.in_place():
        assert model.weight.item() == pytest.approx(kept)
    assert model.weight.item() == 4.0


def test_what_does_not_learn_has_no_average() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert len(Average(model, 0.9).state) == 2


def test_it_is_saved_and_loaded_with_the_optimizers() -> None:
    def fresh() -> tuple[nn.Module, Optimizers]:
        model = nn.Linear(3, 2)
        torch.nn.init.ones_(model.weight)
        return model, Optimizers(model, OptimizerConfig(), ema=0.9)

    model, optimizers = fresh()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(1.0)
    other, others = fresh()
    others.load_state_dict(optimizers.state_dict())
    assert others.average is not None and others.average.param_groups[0]["steps"] == 1
    optimizers.average.exchange()  # type: ignore[union-attr]
    others.average.exchange()
    assert torch.equal(other.weight, model.weight)


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_killed_run_ends_with_the_same_average(
    make_model: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path, keep_best: bool
) -> None:
    def run(out: Path, stop_at: int = 99, ema: float = 0.8) -> tuple[dict[str, Any], list[float]]:
        model, measured = make_model(), []
        tokens = np.random.default_rng(0).integers(6, 262, 700).astype(np.uint16)

        class Stopping(PackedSource):
            def __next__(self) -> Any:
                if self.step == stop_at:
                    raise Killed
                return super().__next__()

        def validate() -> dict[str, float]:
            measured.append(sum(p.detach().square().sum().item() for p in model.parameters()))
            return {"loss": measured[-1]}

        source = Stopping(tokens, context=16, batch_size=6, micro_batch=4, seed=1)
        job = Job(NextToken(model), source, model, tokenizer, int, validate)
        settings = TrainingConfig(
            steps=9, ema=ema, save_every=2, validate_every=3, keep_best=keep_best
        )
        with Display() as display:
            _train(job, settings, WorkDirectory(out, "mark"), Stopwatch(), display)
        return job.objective.state_dict(), measured

    whole, measured = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "out", stop_at=6)
    again, _ = run(tmp_path / "out")
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    raw, measured_raw = run(tmp_path / "raw", ema=0.0)
    assert any(not torch.equal(weight, raw[name]) for name, weight in whole.items())
    assert measured[-1] != measured_raw[-1]
    if not keep_best:
        norm = sum(w.square().sum().item() for n, w in whole.items() if "lm_head" not in n)
        assert norm == pytest.approx(measured[-1]), "what was validated is what is kept"
