"""Held-out data: the same objective, on what training never sees."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from instar.data.batch import Batch
from instar.objectives.base import Objective
from instar.training.meter import Meter


@torch.no_grad()
def held_out(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """The objective's metrics, each averaged over all that the batches hold."""
    meter = Meter()
    for batch in batches:
        meter.add(objective(batch).metrics)
    return meter.means()
