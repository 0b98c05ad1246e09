"""Divide once, last: metrics are pairs of a sum and a count until somebody reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instar.distributed import is_main, sum_over_ranks
from instar.objectives.base import Metrics


class Meter:
    """Adds ``(sum, count)`` pairs over micro-batches and steps."""

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one micro-batch's pairs."""
        for name, (total, count) in metrics.items():
            pair = torch.as_tensor(total).detach().double(), torch.as_tensor(count).double()
            before = self._pairs.get(name)
            if before is None:  # zeros that are made where the pair is need not travel there
                before = torch.zeros_like(pair[0]), torch.zeros_like(pair[1])
            self._pairs[name] = (before[0].to(pair[0]) + pair[0], before[1].to(pair[1]) + pair[1])

    def state_dict(self) -> dict[str, Any]:
        """The pairs that nobody has read yet, summed over ranks; all must ask."""
        names, summed = self._summed()
        return dict(zip(names, zip(summed[::2], summed[1::2], strict=True), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on adding to those: on rank 0, since the others' parts are in them."""
        self._pairs = dict(state)
        if not is_main():
            self._pairs = {
                name: (torch.zeros_like(total), torch.zeros_like(count))
                for name, (total, count) in state.items()
            }

    def means(self) -> dict[str, float]:
        """The means over all ranks; forgets the pairs."""
        names, summed = self._summed()
        self._pairs = {}
        sums, counts = summed[::2], summed[1::2]
        return {
            name: (total / count).item()
            for name, total, count in zip(names, sums, counts, strict=True)
            if count != 0
        }

    def _summed(self) -> tuple[list[str], list[Tensor]]:
        """Names, and their sums and counts in turn."""
        names = sorted(self._pairs)
        if not names:
            return [], []
        return names, sum_over_ranks(*(v for name in names for v in self._pairs[name]))
