"""What is said of the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from instar.training import display
from instar.training.display import Display


class Clock:
    """Stands for the module ``time``: moved by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(display, "time", made)
    return made


def said(clock: Clock, steps: list[int], total: int, seconds: float) -> list[str]:
    """The lines of a sitting without a terminal: half a minute to get ready, then the steps."""
    out = io.StringIO()
    with Display(Console(file=out, width=200)) as shown:
        shown.stage("pretrain")
        clock.now += 30
        for step in steps:
            clock.now += seconds
            shown.step(step, total)
    return [line for line in out.getvalue().splitlines() if line]


def test_a_resumed_run_counts_its_own_steps_only(clock: Clock) -> None:
    """Twenty seconds a step; what the first one took is not known apart from getting ready."""
    lines = said(clock, [901, 902, 903], 1000, 20.0)
    assert [line.rpartition(", ")[2] for line in lines[1:]] == ["1960 s left", "1940 s left"]


def test_a_run_from_the_beginning(clock: Clock) -> None:
    lines = said(clock, [1, 2, 3], 100, 20.0)
    assert "left" not in lines[0], "one step says nothing about the next"
    assert lines[1].endswith(", 1960 s left") and lines[2].endswith(", 1940 s left")


def test_a_gpus_memory_is_shown_beside_the_machines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "GPU" not in said(clock, [1], 100, 20.0)[-1]
    monkeypatch.setattr(display, "peak_gpu_bytes", lambda: 3 * 2**29)
    assert "GiB · GPU 1.5 GiB" in said(clock, [1], 100, 20.0)[-1]


def test_a_run_that_went_back_counts_from_there(clock: Clock) -> None:
    lines = said(clock, [50, 40, 41], 100, 20.0)
    assert lines[-1].endswith(", 1180 s left")


def test_the_bar_of_a_resumed_run_counts_its_own_steps_only(clock: Clock) -> None:
    """Rich leaves its first sample out, which here holds the steps of all earlier sittings."""
    with Display(Console(file=io.StringIO(), force_terminal=True)) as shown:
        shown._bar.get_time = clock.perf_counter
        shown.stage("pretrain")
        shown._bar.tasks[0]._get_time = clock.perf_counter
        for step in (901, 902, 903):
            clock.now += 20
            shown.step(step, 1000)
        assert shown._bar.tasks[0].time_remaining == 97 * 20
