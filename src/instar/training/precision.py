"""In which number format a machine multiplies fastest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from instar.machine import has_fast_bfloat16

Precision = Literal["auto", "bfloat16", "float32", "float8"]


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """The format of matrix products; weights and their updates stay in float32."""
    if precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if precision == "float8":  # of the blocks' products: see `instar.training.eight_bit`
        return torch.bfloat16
    return getattr(torch, precision)


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Run matrix products in ``dtype``."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # type: ignore[return-value]
