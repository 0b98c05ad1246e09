"""How a run computes: the format of its products, and whether its code is compiled."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch
from torch import nn

from instar.data.sources import PackedSource, Source
from instar.distributed import default_device
from instar.machine import product_flops, remembered
from instar.training.precision import Precision, resolve

Compile = Literal["auto", "on", "off"]

EAGER_SHARE = 0.4
"""Share of the products' peak that training reaches without compiling (benchmarks/report.md)."""

SAVED_SHARE = 0.1
"""Share of the time that compiling saves, at the least (the same)."""

COMPILE_S = 60.0
"""Seconds that compiling takes, at the most."""


def compiles(choice: Compile, objective: nn.Module, source: Source, steps: int) -> bool:
    """Whether a run of ``steps`` steps is to be compiled.

    ``auto`` does so where it pays: one process, micro-batches of one shape, and a run so long
    that what compiling saves is more than what it costs. That depends on the run's settings and on
    the machine alone, so a run that goes on computes as it did before.
    """
    if choice == "off" or not can_compile():
        return False
    if choice == "on":
        return True
    if not isinstance(source, PackedSource) or source.world_size > 1:
        return False
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad and p.dim() > 1)
    tokens = steps * source.batch_size * source.context
    device = next(objective.parameters()).device
    dtype = resolve("auto", device)
    flops = remembered(f"{dtype} on {device.type}", lambda: product_flops(dtype, device))
    return 6 * parameters * tokens / (EAGER_SHARE * flops) * SAVED_SHARE > COMPILE_S


def can_compile() -> bool:
    """Whether there is a compiler that works for this device; tried once on a machine."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return False
    device = default_device()
    question = "compiles" if device.type == "cpu" else f"compiles on {device.type}"
    return remembered(question, lambda: _try_to_compile(device))


def _try_to_compile(device: torch.device) -> bool:
    try:
        found = torch.compile(lambda x: x.exp() + 1)(torch.zeros(64, device=device))
        return bool((found == 2).all())
    except Exception:  # whatever a compiler that is not whole may come up with
        return False


def arithmetic(
    objective: nn.Module, source: Source, precision: Precision, choice: Compile, steps: int
) -> dict[str, str]:
    """What was chosen, in words, for the log and for ``lineage.json``."""
    dtype = resolve(precision, next(objective.parameters()).device)
    products = precision if precision == "float8" else str(dtype).removeprefix("torch.")
    compiled = compiles(choice, objective, source, steps)
    code = "compiled" if compiled else "not compiled"
    if choice == "on" and not compiled:
        code += ": no compiler that works"
    return {"products": products, "code": code}
