from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from instar.data.batch import Batch
from instar.errors import UserError
from instar.objectives.language import NextToken
from instar.training import eight_bit
from instar.training.optimizer import OptimizerConfig, Optimizers


def test_what_is_missing_is_named(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"torchao.*\.\[gpu\]"):
        Optimizers(make_model(), OptimizerConfig(name="adamw8bit"))


def test_a_rate_that_is_kept_as_a_tensor_can_be_written_down(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_torchao_does(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(groups, **settings, fused=True)
        for group in made.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        return made

    monkeypatch.setattr(eight_bit, "adamw", as_torchao_does)
    optimizers = Optimizers(make_model(), OptimizerConfig(name="adamw8bit", lr=0.5))
    optimizers.step(0.5)
    assert json.dumps({"lr": optimizers.lr}) == '{"lr": 0.25}'


def test_float8_says_what_it_needs(make_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="GPU of the Ada or Hopper"):
        eight_bit.float8_products(make_model())


def test_odd_sides_stay_as_they_are() -> None:
    assert eight_bit._fits(torch.nn.Linear(64, 32), "")
    assert not eight_bit._fits(torch.nn.Linear(64, 24), "")
    assert not eight_bit._fits(torch.nn.Embedding(64, 32), "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_eight_bit_adamw_learns_and_goes_on(make_model: Callable[..., Any]) -> None:
    pytest.importorskip("torchao", reason="torchao is an extra")
    ids = torch.randint(6, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    batch, losses = Batch(ids[:, :-1], ids[:, 1:]), []
    objective = NextToken(make_model())
    optimizers = Optimizers(objective, OptimizerConfig(name="adamw8bit", lr=1e-2))
    for step in range(20):
        if step == 10:
            kept = optimizers.state_dict()
            optimizers = Optimizers(objective, OptimizerConfig(name="adamw8bit", lr=1e-2))
            optimizers.load_state_dict(kept)
        loss = objective(batch).total / 46
        loss.backward()
        optimizers.step(1.0)
        optimizers.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
