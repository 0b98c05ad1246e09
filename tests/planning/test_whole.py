from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from instar.model.config import ModelConfig
from instar.planning import whole
from instar.planning.hardware import ACCELERATORS
from instar.planning.prediction import predict
from instar.planning.speed import Line, Speed
from instar.planning.whole import batch_of, shortened, tried, typical
from instar.planning.workload import Extent, Workload
from instar.training.loop import TrainingConfig

NOTHING = Line()
SPEED = Speed(*[NOTHING] * 7, update=2.0, saved=NOTHING, head_saved=NOTHING)


def work_of(shape: ModelConfig, *steps: list[Extent]) -> Workload:
    return Workload(shape, TrainingConfig(steps=10), list(steps))


def test_typical_steps_are_small_and_large_ones() -> None:
    steps = [[Extent(1, width, width)] for width in range(100, 0, -1)]
    assert [step[0].width for step in typical(steps)] == [13, 38, 63, 88]
    assert typical(steps[:2]) == [steps[1], steps[0]]


def test_of_a_large_step_some_micro_batches_are_tried() -> None:
    large, small = Extent(64, 256, 1), Extent(8, 128, 1)
    assert shortened([large, small]) == [large]
    assert shortened([small] * 20) == [small] * 8


def test_what_would_take_long_is_not_tried(shape: ModelConfig) -> None:
    slow = replace(SPEED, update=whole.MOST_S + 1)
    assert tried(work_of(shape, [Extent(4, 8, 4)]), slow) is slow


def test_rows_may_be_wider_than_the_context(shape: ModelConfig) -> None:
    learned = shape.model_copy(update={"family": "gpt2", "num_key_value_heads": 4})
    assert tried(work_of(learned, [Extent(2, 80, 4)]), SPEED).whole > 0


def test_a_batch_has_the_size_and_the_targets_that_were_asked_for(shape: ModelConfig) -> None:
    batch = batch_of(Extent(3, 10, 12), shape)
    assert batch.input_ids.shape == (3, 10) and int(batch.input_ids.max()) < 300
    assert batch.mask.sum(dim=1).tolist() == [4, 4, 4]
    assert batch.mask[:, -4:].all(), "a row's last tokens"
    assert not batch_of(Extent(3, 10, 0), shape).mask.any()


@pytest.mark.parametrize("learnt", [20, 0])
def test_whole_steps_are_held_against_the_sum_of_their_parts(
    shape: ModelConfig, monkeypatch: pytest.MonkeyPatch, learnt: int
) -> None:
    clock = iter(range(0, 1000, 3))  # whatever is timed takes three seconds
    monkeypatch.setattr(whole.time, "perf_counter", lambda: float(next(clock)))
    work = work_of(shape, [Extent(4, 8, learnt)], [Extent(2, 16, learnt)])
    state = torch.get_rng_state()
    speed = tried(work, SPEED)
    assert speed.whole == pytest.approx(3 / 2), "the optimizer's two seconds are all the parts"
    assert speed.kernel == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    seconds = predict(work, speed, ACCELERATORS["H100"]).seconds
    assert seconds["optimizer"] == pytest.approx(10 * 3)


def test_what_the_first_time_takes_longer_is_choosing_kernels(
    shape: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter([9.0, 5.0, 3.0, 3.0, 3.0])  # warming up; each step twice
    now = [0.0]

    def clock() -> float:
        before = now[0]
        now[0] += next(spent) if clock.ends else 0.0  # type: ignore[attr-defined]
        clock.ends = not clock.ends  # type: ignore[attr-defined]
        return now[0] if not clock.ends else before  # type: ignore[attr-defined]

    clock.ends = False  # type: ignore[attr-defined]
    monkeypatch.setattr(whole.time, "perf_counter", clock)
    work = work_of(shape, [Extent(4, 8, 4)], [Extent(2, 32, 4)])
    assert tried(work, replace(SPEED, kernel=7.0)).kernel == pytest.approx(2.0)
