"""In which number format a machine multiplies fastest."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Literal

import torch

from instar.machine import fastest, product_flops

Precision = Literal["auto", "bfloat16", "float32", "float8"]


@functools.cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 faster than float32.

    A GPU is asked; a processor is asked too, and believed unless its products, measured once,
    clearly say otherwise: not every kind of hardware support is known by name.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    told = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))

    def speeds() -> dict[str, float]:
        formats = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        return {name: product_flops(dtype, device) for name, dtype in formats.items()}

    return fastest("products", speeds, "bfloat16" if told else "float32") == "bfloat16"


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
