from __future__ import annotations

import pytest
import torch

from instar.model import CausalLM, KVCache, ModelConfig


def cache_for(model: CausalLM, start: list[int], capacity: int) -> KVCache:
    return KVCache(model.config, torch.tensor(start), capacity, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 1, 5], [11, 1]])
def test_any_cut_equals_one_forward_pass(
    model: CausalLM, ids: torch.Tensor, cuts: list[int]
) -> None:
    cache = cache_for(model, [0, 0, 0], 12)
    pieces = [model(part, cache=cache) for part in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=3e-5)
    assert cache.length == cache.capacity == 12


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: CausalLM, ids: torch.Tensor) -> None:
    start = [0, 3, 7]
    rows = ids.clone()
    for row, begin in zip(rows, start, strict=True):
        row[:begin] = 0
    cache = cache_for(model, start, 12)
    pieces = [model(part, cache=cache) for part in rows.split([8, 1, 3], dim=1)]
    together = torch.cat(pieces, dim=1)
    assert together.isfinite().all(), "padding rows must not become 0 / 0"
    for i, begin in enumerate(start):
        alone = model(ids[i : i + 1, begin:])
        torch.testing.assert_close(together[i : i + 1, begin:], alone, rtol=0, atol=3e-5)


@torch.no_grad()
def test_rows_can_be_repeated_and_dropped(model: CausalLM, ids: torch.Tensor) -> None:
    cache = cache_for(model, [0, 2, 4], 12)
    model(ids[:, :8], cache=cache)
    index = torch.tensor([2, 2, 0])
    some = cache.rows(index)
    assert some.length == 8
    expected = model(ids[:, 8:], cache=cache)[[2, 0]]
    found = model(ids[index, 8:], cache=some)
    torch.testing.assert_close(found[[0, 2]], expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_visibility_by_hand(config: ModelConfig) -> None:
    cache = KVCache(config, torch.tensor([0, 2]), 4, torch.float32)
    assert cache.visible(3).int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],  # two columns of padding, each sees itself
    ]
    assert cache.positions(3).tolist() == [[0, 1, 2], [0, 0, 0]]
    cache.length = 3
    assert cache.visible(1).int().tolist() == [[[1, 1, 1, 1]], [[0, 0, 1, 1]]]
    assert cache.positions(1).tolist() == [[3], [1]]
