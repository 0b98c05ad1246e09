from __future__ import annotations

import pytest
import torch

from instar.training.meter import Meter


def pair(total: float, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(count)


def test_divided_once_and_last() -> None:
    meter = Meter()
    meter.add({"loss": pair(10.0, 1), "other": pair(1.0, 4)})
    meter.add({"loss": pair(2.0, 3)})
    # A mean of means would be (10 + 2 / 3) / 2 = 5.33.
    assert meter.means() == pytest.approx({"loss": 3.0, "other": 0.25})
    assert meter.means() == {}, "read once"


def test_what_was_never_counted_has_no_mean() -> None:
    meter = Meter()
    meter.add({"nothing": pair(0.0, 0)})
    assert meter.means() == {}


def test_half_a_row_survives_a_restart() -> None:
    meter, fresh = Meter(), Meter()
    meter.add({"loss": pair(10.0, 1)})
    fresh.load_state_dict(meter.state_dict())
    for one in (meter, fresh):
        one.add({"loss": pair(2.0, 3)})
    assert meter.means() == fresh.means() == {"loss": 3.0}


def test_gradients_are_not_kept() -> None:
    meter = Meter()
    total = (torch.ones(3, requires_grad=True) * 2).sum()
    meter.add({"loss": (total, torch.tensor(3))})
    assert not any(t.requires_grad for t in meter.state_dict()["loss"])
