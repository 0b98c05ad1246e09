"""What this machine can do, measured on it."""

from __future__ import annotations

import time

import torch

MEASURED_S = 0.2
"""Seconds that one measurement of the products' speed may take, after warming up."""


def product_flops(dtype: torch.dtype, device: torch.device) -> float:
    """How fast ``device`` multiplies matrices: the peak that training is compared with.

    The best of several square products, each large enough for the processor's full speed and
    small enough for its cache; noise of other programs only ever makes a product slower.

    Args:
        dtype: Format of the factors and of the product.
        device: Where.

    Returns:
        Floating-point operations per second, two for each multiplication with its addition.
    """
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    _product_s(a, b)  # choosing a kernel takes time, the first time
    best, end = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < end:
        best = min(best, _product_s(a, b))
    return 2 * size**3 / best


def _product_s(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds that ``a b'`` takes."""
    began = time.perf_counter()
    product = a @ b.T
    product[0, 0].item()  # waits for the device
    return time.perf_counter() - began
