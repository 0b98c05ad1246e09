"""What is measured of the machine."""

from __future__ import annotations

import time

import torch

from instar.machine import product_flops


def test_a_products_speed_is_that_of_products_timed_by_hand() -> None:
    cpu = torch.device("cpu")
    found = product_flops(torch.float32, cpu)
    a = torch.rand(512, 512)
    began = time.perf_counter()
    for _ in range(5):
        a @ a
    by_hand = 5 * 2 * 512**3 / (time.perf_counter() - began)
    # A machine shared with others is noisy; a wrong factor or unit is not within ten.
    assert by_hand / 10 < found < by_hand * 10
