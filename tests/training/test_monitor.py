from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from instar.training import monitor
from instar.training.monitor import Monitor


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_busy_process_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    with Monitor(path, period_s=0.1):
        held = bytearray(b"x") * (1 << 27)
        until = time.perf_counter() + 0.7
        while time.perf_counter() < until:
            pass
    seen = rows(path)
    assert len(seen) >= 3
    assert max(row["cpu_percent"] for row in seen) > 10  # others may be busy as well
    assert max(row["rss_bytes"] for row in seen) > len(held)
    times = [row["elapsed_s"] for row in seen]
    assert times == sorted(times) and times[0] > 0
    assert all(0 < row["memory_percent"] <= 100 for row in seen)


def test_it_stops_with_the_run_and_the_next_sitting_adds_to_it(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    for _ in range(2):
        with Monitor(path, period_s=0.05):
            time.sleep(0.2)
    count = len(rows(path))
    assert count >= 4
    time.sleep(0.2)
    assert len(rows(path)) == count


def test_half_a_row_of_an_earlier_sitting_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    path.write_text('{"elapsed_s": 2.0}\n{"elapsed_s": 4.0, "cpu_pe', encoding="utf-8")
    with Monitor(path, period_s=0.05):
        time.sleep(0.3)
    first, second, *_ = rows(path)
    assert first == {"elapsed_s": 2.0} and "cpu_percent" in second


def test_a_sample_is_cheap(tmp_path: Path) -> None:
    watch = Monitor(tmp_path / "resources.jsonl")
    began = time.process_time()
    for _ in range(20):
        watch.sample()
    assert (time.process_time() - began) / 20 < 0.01 * monitor.PERIOD_S


def test_gpus_and_energy_where_the_machine_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=70),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5 << 30),
        nvmlDeviceGetPowerUsage=lambda handle: 250_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", gpu)
    counter = tmp_path / "energy_uj"
    counter.write_text("1000000\n")
    monkeypatch.setattr(monitor, "ENERGY", counter)
    watch = Monitor(tmp_path / "resources.jsonl")
    counter.write_text("4500000\n")
    row = watch.sample()
    assert (row["gpu0_percent"], row["gpu0_bytes"], row["gpu0_watts"]) == (70, 5 << 30, 250)
    assert row["joules"] == pytest.approx(3.5)


def test_without_them_there_are_no_such_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(monitor, "ENERGY", tmp_path / "nowhere")
    row = Monitor(tmp_path / "resources.jsonl").sample()
    assert set(row) == {"elapsed_s", "cpu_percent", "rss_bytes", "memory_percent"}
