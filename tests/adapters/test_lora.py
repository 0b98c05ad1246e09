"""LoRA: its start, its gradient, what it keeps in memory, and its learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from instar.adapters.base import DEFAULT, AdapterConfig, add, learnt_parts, lr_factors, merge, using
from instar.adapters.dora import DoRA, DoRAConfig
from instar.adapters.lora import LoRA, LoRAConfig, added
from instar.adapters.principal import principal
from instar.errors import UserError
from instar.model import CausalLM

FRESH: list[AdapterConfig] = [
    LoRAConfig(rank=4),
    LoRAConfig(rank=4, start="pissa"),
    LoRAConfig(rank=4, start="pissa", pissa_niter=2),
    DoRAConfig(rank=4),
]
NAMES = ["kaiming", "pissa", "pissa by a sketch", "dora"]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(model: CausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("fresh", FRESH, ids=NAMES)
def test_a_fresh_adapter_changes_nothing(
    fresh: AdapterConfig, model: CausalLM, ids: torch.Tensor
) -> None:
    before = model(ids)
    add(model, fresh)
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-5)
    with using(model, None):
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("fresh", FRESH, ids=NAMES)
def test_a_seed_decides_the_first_weights(fresh: AdapterConfig, model: CausalLM) -> None:
    add(model, fresh, seed=1, name="one")
    first = {n.replace("one", ""): p for n, p in weights(model).items()}
    torch.manual_seed(99)  # torch's own generator has no part in it
    add(model, fresh, seed=1, name="two")
    second = {n.replace("two", ""): p for n, p in weights(model).items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_sum_and_its_gradient() -> None:
    x, a, b = (drawn(*shape, seed=i) for i, shape in enumerate([(2, 3, 5), (2, 5), (4, 2)]))
    y = drawn(2, 3, 4, seed=7)
    expected = y + 0.5 * x @ a.T @ b.T
    inputs = [tensor.requires_grad_() for tensor in (y, x, a, b)]
    torch.testing.assert_close(added(inputs[0] * 1, *inputs[1:], 0.5), expected)
    assert torch.autograd.gradcheck(lambda y, *rest: added(y * 1, *rest, 0.5), inputs)


def test_the_sum_stands_where_the_bases_output_stood() -> None:
    y = torch.zeros(2, 3, 4)
    assert added(y, torch.ones(2, 3, 5), torch.ones(1, 5), torch.ones(4, 1), 1.0) is y
    assert y.unique().tolist() == [5.0]


def test_only_the_input_and_the_narrow_product_are_kept() -> None:
    base = nn.Linear(64, 96, bias=False).requires_grad_(False)
    delta = LoRA(64, 96, 4, 1.0, 0.0)
    x = torch.randn(8, 32, 64, requires_grad=True)
    own = {p.data_ptr() for p in (base.weight, *delta.parameters())}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        delta(x, base)
    assert kept.pop(x.data_ptr()) == x.numel()
    assert list(kept.values()) == [8 * 32 * 4]


def test_half_precision_follows_full(model: CausalLM, ids: torch.Tensor) -> None:
    add(model, LoRAConfig(rank=4))
    for index, weight in enumerate(weights(model).values()):
        weight.add_(drawn(*weight.shape, seed=index, dtype=torch.float32), alpha=0.05)

    def gradient(half: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(ids)
        logits.float().square().mean().backward()
        learning = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learning)
        return torch.cat([p.grad.flatten() for p in learning if p.grad is not None])

    exact = gradient(half=False)
    assert (gradient(half=True) - exact).norm() < 0.05 * exact.norm()


def test_only_the_adapter_learns(model: CausalLM, ids: torch.Tensor) -> None:
    add(model, LoRAConfig(rank=4, targets=["q_proj"]))
    assert set(weights(model)) == {
        f"model.layers.{layer}.self_attn.q_proj.deltas.default.lora_{matrix}.weight"
        for layer in (0, 1)
        for matrix in "AB"
    }
    model(ids).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_recomputed_blocks_give_the_same_gradient(model: CausalLM, ids: torch.Tensor) -> None:
    add(model, LoRAConfig(rank=4))
    gradients = []
    for model.model.recompute in (False, True):
        model.zero_grad()
        model(ids).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_scales(model: CausalLM) -> None:
    assert LoRAConfig(rank=16, alpha=8).at(model, "x") == (16, 0.5)
    assert LoRAConfig(rank=16, alpha=8, rank_stabilised=True).at(model, "x") == (16, 2.0)
    config = LoRAConfig(rank=4, alpha=8, ranks={"q_proj": 2}, alphas={"1.self_attn.q_proj": 1})
    assert config.at(model, "model.layers.0.self_attn.q_proj") == (2, 4.0)
    assert config.at(model, "model.layers.1.self_attn.q_proj") == (2, 0.5)
    assert config.at(model, "model.layers.11.self_attn.q_proj") == (2, 4.0)


def test_b_learns_faster_where_that_is_wanted(model: CausalLM) -> None:
    add(model, LoRAConfig(rank=4, targets=["q_proj"], lr_ratio=16))
    factors = lr_factors(model)
    named = {name: factors.get(p, 1) for name, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 2)[1]: f for n, f in named.items()} == {"lora_A": 1, "lora_B": 16}


def test_dropout_leaves_out_inputs_while_training(model: CausalLM, ids: torch.Tensor) -> None:
    add(model, LoRAConfig(rank=4, dropout=0.5, start="pissa"))
    for weight in weights(model).values():
        weight.mul_(1.5)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("rounds", [0, 3])
def test_the_principal_part_is_the_best_of_its_rank(rounds: int) -> None:
    orthogonal = [torch.linalg.qr(drawn(20, 20, seed=seed)).Q for seed in (1, 2)]
    values = torch.tensor([2.0**-i for i in range(20)], dtype=torch.float64)
    matrix = (orthogonal[0] * values) @ orthogonal[1]
    left, right = principal(matrix, 3, rounds, torch.Generator().manual_seed(0))
    # What is left has the values that were left out (Eckart and Young 1936).
    rest = torch.linalg.svdvals(matrix - left @ right)
    torch.testing.assert_close(rest[:4], values[3:7], rtol=1e-6, atol=0)
    torch.testing.assert_close(left.T @ left, torch.diag(values[:3]), rtol=0, atol=1e-6)
    torch.testing.assert_close(right @ right.T, torch.diag(values[:3]), rtol=0, atol=1e-6)


def test_dora_gives_rows_their_lengths() -> None:
    base = nn.Linear(6, 3)
    delta = DoRA(base, 2, 0.5, 0.0)
    with torch.no_grad():
        delta.lora_A.weight.copy_(drawn(2, 6, seed=1))
        delta.lora_B.weight.copy_(drawn(3, 2, seed=2))
        delta.lora_magnitude_vector.copy_(torch.tensor([1.0, 2.0, 3.0]))
    weight, bias = delta.merged(base)
    torch.testing.assert_close(weight.norm(dim=1), torch.tensor([1.0, 2.0, 3.0]))
    turned = base.weight + 0.5 * delta.lora_B.weight @ delta.lora_A.weight
    cosines = torch.cosine_similarity(weight, turned, dim=1)
    torch.testing.assert_close(cosines, torch.ones(3))
    x = torch.randn(4, 6)
    torch.testing.assert_close(delta(x, base), x @ weight.T + base.bias)
    assert bias is base.bias


@pytest.mark.parametrize("method", [LoRAConfig, DoRAConfig])
def test_biases_stay(method: type[AdapterConfig], model: CausalLM, ids: torch.Tensor) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Linear(32, 64)
    before = model(ids)
    add(model, method(rank=2, targets=["q_proj"]))  # type: ignore[call-arg]
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-5)
    for weight in weights(model).values():
        weight.add_(0.05)
    spoken = model(ids)
    assert (spoken - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(ids), spoken, rtol=0, atol=1e-5)


def test_a_rank_beyond_the_layer_is_refused(model: CausalLM) -> None:
    with pytest.raises(UserError, match="rank is 33"):
        add(model, LoRAConfig(rank=33, start="pissa"))


def test_blocks_that_are_not_there(model: CausalLM) -> None:
    with pytest.raises(UserError, match="no block 2"):
        add(model, LoRAConfig(layers=[0, 2]))
    add(model, LoRAConfig(layers=[1], targets=["up_proj"]))
    assert list(learnt_parts(model, DEFAULT)) == ["model.layers.1.mlp.up_proj"]


def test_kaiming_begins_within_its_bounds(model: CausalLM) -> None:
    add(model, LoRAConfig(rank=4, targets=["q_proj"]))
    [first, _] = learnt_parts(model, DEFAULT).values()
    assert isinstance(first, LoRA)
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < first.lora_A.weight.abs().max() <= bound
    assert first.lora_B.weight.abs().max() == 0


def test_a_token_has_one_row() -> None:
    assert LoRAConfig(trainable_token_indices=[9, 4]).trainable_token_indices == [9, 4]
    with pytest.raises(UserError, match="9 is listed twice"):
        LoRAConfig.parse({"trainable_token_indices": [9, 4, 9]}, "a file")
