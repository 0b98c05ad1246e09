"""Which runs are compiled, and in which format they multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from instar import machine as machine_module
from instar.data.sources import PackedSource
from instar.training import arithmetic, precision
from instar.training.arithmetic import compiles


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of 100 GFLOP/s with a compiler."""
    monkeypatch.setattr(arithmetic, "can_compile", lambda: True)
    monkeypatch.setattr(arithmetic, "remembered", lambda *_: 1e11)
    precision.has_fast_bfloat16.cache_clear()
    yield
    precision.has_fast_bfloat16.cache_clear()


def packed(context: int = 128) -> PackedSource:
    return PackedSource(np.zeros(1000, np.uint16), context, batch_size=16, micro_batch=16, seed=0)


def model(parameters: int = 10_000) -> nn.Module:
    return nn.Linear(100, parameters // 100)


def test_only_long_runs_are_compiled() -> None:
    # 6 * 10,000 * 2,048 operations a step are 3 ms at 40% of the peak; ten minutes are enough.
    assert not compiles("auto", model(), packed(), steps=100_000)
    assert compiles("auto", model(), packed(), steps=300_000)


def test_several_processes_are_not_compiled_unasked() -> None:
    source = packed()
    source.world_size = 4
    assert not compiles("auto", model(), source, steps=300_000)


def test_rows_of_changing_width_are_not_compiled_unasked() -> None:
    source = iter(())  # anything but packed rows
    assert not compiles("auto", model(), source, steps=10**9)  # type: ignore[arg-type]
    assert compiles("on", model(), source, steps=1)  # type: ignore[arg-type]


def test_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiles("off", model(), packed(), steps=10**9)
    assert compiles("on", model(), packed(), steps=1)
    monkeypatch.setattr(arithmetic, "can_compile", lambda: False)
    assert not compiles("on", model(), packed(), steps=1)
    told = arithmetic.arithmetic(model(), packed(), "float32", "on", 1)
    assert told == {"products": "float32", "code": "not compiled: no compiler that works"}


def test_without_a_compiler_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    monkeypatch.setattr(arithmetic, "remembered", lambda *_: pytest.fail("tried"))
    assert not arithmetic.can_compile()


def test_the_compiler_is_tried_on_the_device_that_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(arithmetic.shutil, "which", lambda name: name)

    def whole_on_a_processor_only(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "cpu":
                raise RuntimeError("no kernel")
            return function(x)

        return call

    monkeypatch.setattr(torch, "compile", whole_on_a_processor_only)
    for device, works in (("cpu", True), ("meta", False), ("cpu", True)):
        monkeypatch.setattr(
            arithmetic, "default_device", lambda device=device: torch.device(device)
        )
        assert arithmetic.can_compile() is works


@pytest.mark.parametrize(
    ("told", "ratio", "expected"),
    [
        (True, 2.0, True),
        (True, 0.95, True),
        (True, 0.5, False),
        (False, 1.05, False),
        (False, 2.0, True),
    ],
)
def test_a_format_is_as_fast_as_it_measures(
    told: bool, ratio: float, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": told})
    speed = {torch.bfloat16: ratio, torch.float32: 1.0}
    monkeypatch.setattr(machine_module, "product_flops", lambda dtype, _: speed[dtype])
    assert precision.has_fast_bfloat16(torch.device("cpu")) is expected
