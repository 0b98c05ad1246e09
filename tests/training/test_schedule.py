from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.errors import UserError
from instar.training.schedule import ScheduleConfig, factor


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    warmup = draw(st.floats(0, 0.5))
    decay = draw(st.floats(0, 0.5))
    shape = draw(st.sampled_from(["cosine", "linear", "constant"]))
    final = draw(st.floats(0, 1))
    config = ScheduleConfig(shape=shape, warmup=warmup, decay=decay, final=final)
    return config, draw(st.integers(1, 400))


@given(schedules())
def test_up_then_flat_then_down(drawn: tuple[ScheduleConfig, int]) -> None:
    config, steps = drawn
    factors = [factor(config, step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors[:1]), "the first step moves something"
    assert all(0 <= f <= 1 for f in factors)
    assert max(factors) > 0.49
    rise = max(i for i, f in enumerate(factors) if f == max(factors))
    first = factors.index(max(factors))
    assert factors[: first + 1] == sorted(factors[: first + 1])
    assert factors[rise:] == sorted(factors[rise:], reverse=True)
    assert set(factors[first : rise + 1]) == {max(factors)}


@given(schedules())
def test_never_below_the_final_share_after_warming_up(drawn: tuple[ScheduleConfig, int]) -> None:
    config, steps = drawn
    after = [factor(config, s, steps) for s in range(math.ceil(config.warmup * steps), steps)]
    assert all(f >= config.final - 1e-12 for f in after)


def test_linear_by_hand() -> None:
    config = ScheduleConfig(shape="linear", warmup=0.2, decay=0.4, final=0.0)
    found = [factor(config, step, 10) for step in range(10)]
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4]
    assert found == pytest.approx(expected)


def test_cosine_by_hand() -> None:
    config = ScheduleConfig(shape="cosine", warmup=0.0, decay=1.0, final=0.1)
    assert factor(config, 0, 4) == 1
    assert factor(config, 2, 4) == pytest.approx(0.1 + 0.9 / 2)
    # cos(pi / 4) = 0.70711: (1 + 0.70711) / 2 = 0.85355
    assert factor(config, 1, 4) == pytest.approx(0.1 + 0.9 * 0.85355, abs=1e-5)
    assert factor(config, 4, 4) == pytest.approx(0.1)


def test_constant_never_falls() -> None:
    config = ScheduleConfig(shape="constant", warmup=0.1, decay=0.6)
    assert [factor(config, step, 20) for step in range(2, 20)] == [1.0] * 18


def test_a_single_step_is_taken() -> None:
    assert factor(ScheduleConfig(), 0, 1) > 0


@pytest.mark.parametrize("values", [{"warmup": -0.1}, {"decay": 1.5}, {"shape": "square"}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        ScheduleConfig.parse(values, "test")
