"""A running average of the weights: steadier than they are, and nearer to the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from instar.model.sharding import reshard


class Average(torch.optim.Optimizer):
    """Exponential moving average of what learns: ``a <- d a + (1 - d) w`` after every step.

    Training goes on with the raw weights; the average stands beside them, is what validation
    measures, and becomes the product (Polyak & Juditsky 1992; as used by Tarvainen & Valpola 2017,
    arXiv:1703.01780). It begins with the weights of the start, and forgets them faster at first:
    step t decays by ``min(decay, t / (t + 9))``.

    It is an optimizer that moves nothing: so it is spread, saved and loaded as the others are.

    Args:
        model: Whose trainable parameters are averaged.
        decay: How much of the average a step leaves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, {"lr": 0.0, "decay": decay, "steps": 0})
        for p in params:
            self.state[p]["average"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take in the weights as they are now."""
        for group in self.param_groups:
            group["steps"] += 1
            decay = min(group["decay"], group["steps"] / (group["steps"] + 9))
            for p in group["params"]:
                self.state[p]["average"].lerp_(p, 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """The average where the weights were, and the weights where the average was."""
        reshard(self.model)
        for p, average in self._pairs():
            raw = p.detach().clone()
            p.copy_(average)
            average.copy_(raw)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model as its average; afterwards it is what it was, to the last bit."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def _pairs(self) -> list[tuple[Any, Tensor]]:
        params = [p for group in self.param_groups for p in group["params"]]
        return [(p, self.state[p]["average"]) for p in params]
