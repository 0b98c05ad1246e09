"""What is measured of the machine, and what is chosen by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from instar import lineage, machine
from instar.machine import best_s, fastest, product_flops, remembered


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "instar" / "machine.json"


def test_a_products_speed_is_its_operations_by_its_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = list[int]()

    def quarter_of_a_second(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
        return 0.25

    monkeypatch.setattr(machine, "best_s", quarter_of_a_second)
    found = product_flops(torch.float32, torch.device("cpu"))
    assert len(counted) == 1 and counted[0] > 0
    assert found == 4 * counted[0]


def test_the_fastest_call_counts_but_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = [0.0], iter([0.5, 3.0, 1.0, 2.0, 0.1])

    def call() -> None:
        now[0] += next(seconds)

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(machine, "MEASURED_S", 5.0)
    assert best_s(call) == 1.0
    assert next(seconds) == 0.1, "there was no room for one more"


def test_a_question_is_asked_once() -> None:
    answers = iter([1.5, 2.5])
    assert remembered("speed", lambda: next(answers)) == 1.5
    assert remembered("speed", lambda: next(answers)) == 1.5
    assert remembered("other", lambda: next(answers)) == 2.5


def test_another_machine_asks_for_itself(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert remembered("speed", lambda: 1) == 1
    monkeypatch.setattr(machine, "identity", lambda: "another")
    assert remembered("speed", lambda: 2) == 2
    monkeypatch.undo()
    kept = json.loads(cache.read_text())
    assert sorted(answers["speed"] for answers in kept.values()) == [1, 2]


def test_another_gpu_asks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert remembered("speed", lambda: 1) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, speed in (("H100", 2), ("A10", 3)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert remembered("speed", lambda speed=speed: speed) == speed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert remembered("speed", lambda: 4) == 1


def test_a_gpu_that_was_at_work_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert "gpu" not in lineage.environment()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    assert lineage.environment()["gpu"] == "H100"


@pytest.mark.parametrize(("told", "expected"), [("4096\n", 4096), ("max\n", 2**40), ("", 2**40)])
def test_a_containers_memory_is_what_it_may_take(
    told: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(told)
    limits = (tmp_path / "missing", tmp_path / "limit")
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", limits)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40))
    assert machine.memory_bytes(torch.device("cpu")) == expected
    assert machine.cache_bytes(torch.device("cpu")) == expected // 4


def test_keys_and_values_get_a_third_of_what_models_leave_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [2**30]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(2**32))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 2**36))
    assert machine.cache_bytes(torch.device("cuda")) == 2**32 // 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": '])
def test_a_damaged_file_is_measured_again(damage: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(damage)
    assert remembered("speed", lambda: 3) == 3
    assert remembered("speed", lambda: 4) == 3


@pytest.mark.parametrize("home", ["a file", "nobody's"])
def test_where_nothing_can_be_written_it_is_measured_once_in_a_process(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if home == "a file" else "")
    monkeypatch.setattr(Path, "home", nobody)
    answers = iter([1, 2])
    assert remembered("speed", lambda: next(answers)) == 1
    assert remembered("speed", lambda: next(answers)) == 1
    machine._for_now().cleanup()  # which the end of a process does
    machine._for_now.cache_clear()
    assert remembered("speed", lambda: next(answers)) == 2
    machine._for_now().cleanup()
    machine._for_now.cache_clear()


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"usual": 1.0, "other": 1.05}, "usual"),  # that may be noise
        ({"usual": 1.0, "other": 1.5}, "other"),
        ({"usual": 2.0, "other": 1.0}, "usual"),
    ],
)
def test_only_what_is_clearly_faster_takes_the_defaults_place(
    speeds: dict[str, float], chosen: str
) -> None:
    assert fastest("way", lambda: speeds, "usual") == chosen
