"""One adapter from several: exact where ranks allow it, the nearest one elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instar.adapters import base, vectors
from instar.adapters.combine import combine, factored
from instar.adapters.ia3 import IA3Config
from instar.adapters.lora import LoRAConfig
from instar.errors import UserError
from instar.model import CausalLM


@pytest.fixture
def two(model: CausalLM, shake) -> CausalLM:
    """Adapters of different ranks, scales and layers."""
    first = LoRAConfig(rank=2, alpha=6, targets=["q_proj", "down_proj"])
    second = LoRAConfig(rank=3, alpha=3, targets=["q_proj", "v_proj"], rank_stabilised=True)
    for name, config in {"first": first, "second": second}.items():
        base.add(model, config, name=name)
        shake(model)
    return model


def change(model: CausalLM, path: str, name: str) -> Tensor:
    slot = model.get_submodule(f"model.layers.0.{path}")
    return slot.deltas[name].merged(slot.base)[0] - slot.base.weight


Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"


@torch.no_grad()
def test_a_weighted_sum_is_exact(two: CausalLM, ids: Tensor):
    combine(two, {"first": 0.5, "second": -2.0}, "both")
    config = two.adapters["both"]
    assert config.rank == 5 and set(config.ranks.values()) == {2, 3}
    expected = 0.5 * change(two, Q, "first") - 2.0 * change(two, Q, "second")
    torch.testing.assert_close(change(two, Q, "both"), expected, atol=1e-5, rtol=1e-5)
    for path, name, weight in ((V, "second", -2.0), (DOWN, "first", 0.5)):
        expected = weight * change(two, path, name)
        torch.testing.assert_close(change(two, path, "both"), expected, atol=1e-5, rtol=1e-5)
    adapted = two(ids)
    base.merge(two, "both")
    torch.testing.assert_close(two(ids), adapted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["ties", "dare"])
def test_matrices_are_combined_and_kept_where_the_rank_is_full(how, two: CausalLM):
    combine(two, {"first": 1.0, "second": 0.5}, "both", how, rank=32, density=0.4, seed=3)
    changes = [change(two, Q, "first"), change(two, Q, "second")]
    if how == "ties":
        expected = vectors.ties(changes, [1.0, 0.5], 0.4)
    else:  # the first layer that is combined draws first
        expected = vectors.dare(changes, [1.0, 0.5], 0.4, torch.Generator().manual_seed(3))
    torch.testing.assert_close(change(two, Q, "both"), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_lower_rank_is_the_nearest(two: CausalLM):
    combine(two, {"first": 1.0, "second": 1.0}, "small", rank=2)
    combine(two, {"first": 1.0, "second": 1.0}, "whole")
    whole, small = change(two, Q, "whole"), change(two, Q, "small")
    lost = torch.linalg.svdvals(whole)[2:].norm()
    torch.testing.assert_close((whole - small).norm(), lost, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(small, rtol=1e-4) == 2


def test_factors_of_a_matrix():
    matrix = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    a, b = factored(matrix, 5)
    assert a.shape == (3, 3) and b.shape == (6, 3)
    torch.testing.assert_close(b @ a, matrix)


def test_what_comes_out_learns_and_the_parts_stay(two: CausalLM, ids: Tensor):
    with base.using(two, "first"):
        before = two(ids)
    combine(two, {"first": 1.0, "second": 1.0}, "both", "ties")
    two(ids).sum().backward()
    learnt = {
        n.split(".deltas.")[1].split(".")[0]
        for n, w in two.named_parameters()
        if w.grad is not None
    }
    assert learnt == {"both"}
    with base.using(two, "first"):
        assert torch.equal(two(ids), before)


def test_mistakes_are_explained(two: CausalLM):
    base.add(two, IA3Config(), name="factors")
    with pytest.raises(UserError, match="'factors' is more than LoRA"):
        combine(two, {"first": 1.0, "factors": 1.0}, "both")
    with pytest.raises(UserError, match="no adapter 'third'"):
        combine(two, {"third": 1.0}, "both")
    with pytest.raises(UserError, match="no adapters to combine"):
        combine(two, {}, "both")
    with pytest.raises(UserError, match="density is 0"):
        combine(two, {"first": 1.0}, "both", "ties", density=0.0)
    with pytest.raises(UserError, match="rank is 0"):
        combine(two, {"first": 1.0}, "both", rank=0)
    with pytest.raises(UserError, match=r"how is 'tie'\. Choose one of linear, ties, dare"):
        combine(two, {"first": 1.0}, "both", "tie")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'second' already"):
        combine(two, {"first": 1.0}, "second")
