from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instar.data.batch import Batch
from instar.data.packing import Row, pad_rows
from instar.data.sources import AnnotatedSource, ExampleSource, PackedSource
from instar.errors import UserError

STREAM = np.arange(1003, dtype=np.uint16)


def packed(**changes: Any) -> PackedSource:
    settings = {"tokens": STREAM, "context": 10, "batch_size": 8, "micro_batch": 4, "seed": 3}
    return PackedSource(**settings | changes)


def examples(n: int) -> list[Row]:
    """Row ``i`` holds the number ``i``, one to nine times."""
    return [Row([i] * (1 + (7 * i) % 9), [True] * (1 + (7 * i) % 9)) for i in range(n)]


def sourced(n: int = 50, **changes: Any) -> ExampleSource[Row]:
    settings = {"batch_size": 8, "micro_tokens": 30, "seed": 3}
    return ExampleSource(examples(n), lambda rows: pad_rows(rows, 999), **settings | changes)


def members(step: list[Batch]) -> list[int]:
    """Which examples, or where each window begins."""
    return [row[0] for batch in step for row in batch.input_ids.tolist()]


MAKERS = [packed, sourced]


@pytest.mark.parametrize("make", MAKERS)
def test_a_function_of_the_seed(make: Callable[..., Any]) -> None:
    one, same, other = make(), make(), make(seed=4)
    draws = [[members(next(s)) for _ in range(20)] for s in (one, same, other)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(make: Callable[..., Any], world_size: int) -> None:
    alone = make()
    ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(30):
        parts = [members(next(rank)) for rank in ranks]
        assert {len(part) for part in parts} == {8 // world_size}
        assert sorted(chain(*parts)) == sorted(members(next(alone)))


def test_an_epoch_rehearses_others_each_time() -> None:
    pools = examples(40)
    source = ExampleSource(
        pools[:10], lambda rows: pad_rows(rows, 999), 1, 9, 3, earlier=[(pools[10:17], 3)]
    )
    epochs = [sorted(chain(*(members(next(source)) for _ in range(13)))) for _ in range(7)]
    assert all(epoch[:10] == list(range(10)) for epoch in epochs)
    rehearsed = [epoch[10:] for epoch in epochs]
    assert all(len(set(some)) == 3 for some in rehearsed)
    assert not set(rehearsed[0]) & set(rehearsed[1])
    assert Counter(chain(*rehearsed)) == dict.fromkeys(range(10, 17), 3), "each had its turn"


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_micro_batches_cut_a_step_and_no_more(micro_batch: int) -> None:
    whole, cut = packed(), packed(micro_batch=micro_batch)
    for _ in range(15):
        step = next(cut)
        assert all(len(batch.input_ids) <= micro_batch for batch in step)
        assert members(step) == members(next(whole))


@pytest.mark.parametrize("micro_tokens", [1, 9, 30, 1000])
def test_micro_batches_of_examples_hold_so_many_tokens(micro_tokens: int) -> None:
    whole, cut = sourced(micro_tokens=1000), sourced(micro_tokens=micro_tokens)
    for _ in range(15):
        step = next(cut)
        for batch in step:
            longest = int((batch.input_ids != 999).sum(dim=1).max())
            assert len(batch.input_ids) == 1 or len(batch.input_ids) * longest <= micro_tokens
        assert members(step) == members(next(whole))


@pytest.mark.parametrize("make", MAKERS)
@given(before=st.integers(0, 40))
def test_goes_on_where_it_stopped(make: Callable[..., Any], before: int) -> None:
    source, fresh = make(), make()
    for _ in range(before):
        next(source)
    fresh.load_state_dict(source.state_dict())
    for _ in range(15):
        assert members(next(fresh)) == members(next(source))


def test_every_window_appears_once_an_epoch_and_covers_the_stream() -> None:
    source = packed(batch_size=9, micro_batch=9)  # 99 windows: eleven steps an epoch
    assert source.windows == 99
    offsets = []
    for _ in range(3):
        starts = [start for _ in range(11) for start in members(next(source))]
        assert len(set(starts)) == 99
        assert {start % 10 for start in starts} == {min(starts)}, "windows do not overlap"
        offsets.append(min(starts))
    assert all(0 <= offset < 10 for offset in offsets) and len(set(offsets)) > 1


def test_targets_are_the_next_tokens() -> None:
    [batch] = next(packed(micro_batch=8))
    assert torch.equal(batch.targets, batch.input_ids + 1)
    assert batch.input_ids.shape == (8, 10) and batch.input_ids.dtype == torch.int64


def test_the_shortest_stream() -> None:
    source = packed(tokens=STREAM[:21], batch_size=3)
    for _ in range(20):
        assert all(0 <= start <= 10 for start in members(next(source)))
    with pytest.raises(UserError, match=r"20 tokens, one window needs 21.*smaller `context`"):
        packed(tokens=STREAM[:20])


@given(n=st.integers(1, 300), batch_size=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_example_appears_once_an_epoch(n: int, batch_size: int, seed: int) -> None:
    source = sourced(n, batch_size=batch_size, seed=seed)
    for _ in range(2):
        seen = Counter(i for _ in range(source.batches) for i in members(next(source)))
        assert set(seen.values()) == {1}
        # What does not fill a last batch sits this epoch out; others will the next time.
        assert len(seen) > n - min(batch_size, n)


def test_nobody_sits_out_every_epoch() -> None:
    source = sourced(15)
    seen = {i for _ in range(12) for i in members(next(source))}
    assert seen == set(range(15))


def test_batches_hold_examples_of_like_length() -> None:
    source = sourced(256, batch_size=16, micro_tokens=1000)
    widths = [next(source)[0].mask.sum(dim=1) for _ in range(source.batches)]
    spread = [int(width.max() - width.min()) for width in widths]
    assert sum(spread) / len(spread) < 2, "nine lengths in sixteen batches"
    order = [int(width.max()) for width in widths]
    assert order != sorted(order), "short batches do not all come first"


def test_annotations_are_made_without_gradients_and_again_after_a_restart() -> None:
    weight = torch.ones(1, requires_grad=True)
    calls: list[bool] = []

    def annotate(batch: Batch) -> Batch:
        calls.append(torch.is_grad_enabled())
        return replace(batch, weight=(batch.input_ids * weight).float())

    source, fresh = (AnnotatedSource(sourced(), annotate) for _ in range(2))
    next(source)
    fresh.load_state_dict(source.state_dict())
    for one, other in zip(next(source), next(fresh), strict=True):
        assert one.weight is not None and not one.weight.requires_grad
        assert other.weight is not None and torch.equal(one.weight, other.weight)
    assert not any(calls) and torch.is_grad_enabled()
    assert source.metrics() == {}
