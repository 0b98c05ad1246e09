from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from instar.adapters.adalora import AdaLoRAConfig
from instar.adapters.base import AdapterConfig, add
from instar.adapters.ia3 import IA3Config
from instar.training import optimizer
from instar.training.optimizer import (
    Muon,
    OptimizerConfig,
    Optimizers,
    orthogonalize,
    sort_parameters,
)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 24), columns=st.integers(40, 64), seed=st.integers(0, 99))
@pytest.mark.parametrize("tall", [False, True])
def test_singular_values_come_near_one(tall: bool, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = 10 ** (seed % 7 - 3) * torch.randn(3, rows, columns, generator=generator)
    matrices = matrices.mT if tall else matrices
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3


def test_singular_vectors_stay() -> None:
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalize(matrix[None])[0] @ vh.T
    off = inner - torch.diag(inner.diagonal())
    assert off.abs().max() < 1e-4 and (inner.diagonal() > 0.6).all()


def test_a_diagonal_matrix_by_hand() -> None:
    """On a diagonal matrix the iteration is a polynomial in each entry."""
    entries = [3.0, 4.0]
    found = orthogonalize(torch.diag(torch.tensor(entries))[None], iterations=2)[0]
    expected = [entry / 5 for entry in entries]  # divided by the Frobenius norm
    for _ in range(2):
        expected = [3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5 for x in expected]
    assert found.diagonal().tolist() == pytest.approx(expected, abs=1e-5)
    assert found[0, 1] == found[1, 0] == 0


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_muon_equals_torchs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch always iterates in bfloat16; the comparison is of momentum, scale and decay.
    monkeypatch.setattr(optimizer, "has_fast_bfloat16", lambda _: True)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    # Theirs scales by 0.2 sqrt(max(rows, columns)) under the name "match_rms_adamw".
    reference = torch.optim.Muon(
        [theirs],
        lr=0.01,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    found = Muon([mine], lr=0.01, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        found.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (mine - theirs).norm() < 0.02 * moved


def test_an_update_has_the_size_of_adamws() -> None:
    weight = nn.Parameter(torch.zeros(64, 32))
    weight.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, momentum=0.95, weight_decay=0.0).step()
    # 32 singular values near one: 0.2 sqrt(64) sqrt(32 / (64 * 32)) = 0.2
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_matrices_of_one_shape_do_not_mix() -> None:
    gradients = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    together = [nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    for weight, gradient in zip(together, gradients, strict=True):
        weight.grad = gradient
    Muon(together, lr=1.0, momentum=0.9, weight_decay=0.0).step()
    for weight, gradient in zip(together, gradients, strict=True):
        alone = nn.Parameter(torch.zeros(8, 8))
        alone.grad = gradient
        Muon([alone], lr=1.0, momentum=0.9, weight_decay=0.0).step()
        torch.testing.assert_close(weight, alone)


@pytest.mark.parametrize("by_columns", [False, True])
def test_blocks_are_orthogonalised_by_themselves(by_columns: bool) -> None:
    gradient = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    whole = nn.Parameter(torch.zeros(10, 12) if by_columns else torch.zeros(12, 10))
    whole.grad = gradient.mT.clone() if by_columns else gradient.clone()
    group = {"params": [whole], "by_columns": by_columns}
    Muon([group], lr=1.0, momentum=0.9, weight_decay=0.0, block=4, iterations=3).step()
    for found, of_block in zip(
        (whole.mT if by_columns else whole).split(4), gradient.split(4), strict=True
    ):
        alone = nn.Parameter(torch.zeros(4, 10))
        alone.grad = of_block.clone()
        Muon([alone], lr=1.0, momentum=0.9, weight_decay=0.0, iterations=3).step()
        torch.testing.assert_close(found, alone)


def test_rows_that_make_no_whole_blocks_stay_together() -> None:
    gradient = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    moved = []
    for block in (0, 4):
        weight = nn.Parameter(torch.zeros(10, 12))
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, momentum=0.9, weight_decay=0.0, block=block).step()
        moved.append(weight)
    assert torch.equal(*moved)


def test_blocks_are_heads_and_neurons(make_model: Callable[..., Any]) -> None:
    model = make_model()
    rule = Optimizers(model, OptimizerConfig(name="muon", muon_block=8)).all[1]
    names = {id(p): n for n, p in model.named_parameters()}
    for group in rule.param_groups:
        for p in group["params"]:
            writes = names[id(p)].endswith(("o_proj.weight", "down_proj.weight"))
            assert group["by_columns"] == writes, names[id(p)]
            assert p.shape[0 if writes else 1] == model.config.hidden_size


def test_gradients_are_left_alone() -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    weight.grad = torch.ones(4, 6)
    Muon([weight], lr=1.0, momentum=0.9, weight_decay=0.0).step()
    assert torch.equal(weight.grad, torch.ones(4, 6))


@pytest.mark.parametrize(("name", "block"), [("adamw", 0), ("muon", 0), ("muon", 8)])
def test_every_weight_has_one_rule(name: Any, block: int, make_model: Callable[..., Any]) -> None:
    model = make_model()
    optimizers = Optimizers(model, OptimizerConfig(name=name, weight_decay=0.1, muon_block=block))
    groups = [group for rule in optimizers.all for group in rule.param_groups]
    moved = [id(p) for group in groups for p in group["params"]]
    assert sorted(moved) == sorted(id(p) for p in model.parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    for rule in optimizers.all:
        for group in rule.param_groups:
            for p in group["params"]:
                assert (group["weight_decay"] == 0) == (p.dim() == 1), names[id(p)]
                inside = p.dim() == 2 and "layers." in names[id(p)]
                assert isinstance(rule, Muon) == (name == "muon" and inside), names[id(p)]


@pytest.mark.parametrize("adapter", [IA3Config(), AdaLoRAConfig()], ids=["ia3", "adalora"])
def test_a_vector_is_one_in_whatever_shape_an_adapter_holds_it(
    adapter: AdapterConfig, make_model: Callable[..., Any]
) -> None:
    """Decay would draw IA3's factors to zero, where keys are silent, and Muon make all one size."""
    model = make_model()
    add(model, adapter)
    matrices, tables, vectors = sort_parameters(model)
    assert not tables and vectors and all(min(p.shape) == 1 for p in vectors)
    assert all(name.endswith(("lora_A", "lora_B")) for name in matrices)


def test_frozen_weights_have_no_rule(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizers = Optimizers(model, OptimizerConfig())
    moved = [p for rule in optimizers.all for g in rule.param_groups for p in g["params"]]
    assert all(p is not model.model.embed_tokens.weight for p in moved)


def test_adamws_first_step_by_hand(make_model: Callable[..., Any]) -> None:
    """After one step the moments are g and g^2: every weight moves by lr against its sign."""
    model = make_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, -3.0)
    optimizers = Optimizers(model, OptimizerConfig(lr=0.01, weight_decay=0.5))
    optimizers.step(0.1)
    assert optimizers.lr == pytest.approx(0.001)
    for n, p in model.named_parameters():
        decay = 1 - 0.001 * 0.5 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p, before[n] * decay + 0.001, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "block"), [("adamw", 0), ("muon", 0), ("muon", 8)])
def test_state_travels(name: Any, block: int, make_model: Callable[..., Any]) -> None:
    config = OptimizerConfig(name=name, muon_block=block)
    one, other = make_model(), make_model()
    rules = Optimizers(one, config)

    def push(model: nn.Module, optimizers: Optimizers, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers.step(1 / (1 + seed))
        optimizers.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    push(one, rules, 0)
    again = Optimizers(other, config)
    other.load_state_dict(one.state_dict())
    # Loading shares tensors; through a file, as in a resumed run, they are copies.
    again.load_state_dict(copy.deepcopy(rules.state_dict()))
    for seed in (1, 2):
        push(one, rules, seed)
        push(other, again, seed)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
