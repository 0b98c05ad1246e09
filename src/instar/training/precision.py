"""In which number format a machine multiplies fastest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32", "float8"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Emulated bfloat16 is slower than float32, so ask the processor itself.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


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
