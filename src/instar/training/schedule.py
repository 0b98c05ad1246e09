"""The learning rate over time, as a factor of its peak."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from instar.config import Config

Share = Annotated[float, Ge(0), Le(1)]


class ScheduleConfig(Config):
    """Warm up, hold, and come down."""

    shape: Literal["cosine", "linear", "constant"] = "linear"
    """How the rate falls: half a cosine, a straight line, or not at all."""
    warmup: Share = 0.02
    """Share of the steps in which the rate rises from zero."""
    decay: Share = 0.6
    """Share of the steps in which it falls; between the two it stays at its peak."""
    final: Share = 0.0
    """What is left at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.shape != "constant" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} together are more than the whole run"
            )
        return self


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor for the ``step``-th of ``steps`` optimizer steps, counted from zero.

    A held peak with a fall at the end follows Hägele et al. 2024 (arXiv:2405.18392); with
    ``decay = 1 - warmup`` it is the classic one-cycle shape.
    """
    warmup = config.warmup * steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    if config.shape == "constant":
        return 1.0
    fall = config.decay * steps
    progress = (step - (steps - fall)) / fall if fall else 0.0
    progress = min(max(progress, 0.0), 1.0)
    left = 1 - progress if config.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final + (1 - config.final) * left
