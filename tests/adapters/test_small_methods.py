"""IA3, BitFit and bottleneck adapters: where they sit, what they compute, how they are merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters import base
from instar.adapters.bitfit import BitFitConfig
from instar.adapters.bottleneck import BottleneckConfig
from instar.adapters.ia3 import IA3, IA3Config
from instar.errors import UserError
from instar.model import CausalLM

METHODS = [IA3Config(), BitFitConfig(), BottleneckConfig(width=5)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_a_fresh_one_changes_nothing_and_all_of_it_learns(method, model: CausalLM, ids: Tensor):
    before = model(ids)
    base.add(model, method)
    assert torch.equal(model(ids), before)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for name, weight in model.named_parameters():
        learns = ".deltas." in name
        assert (weight.grad is not None) == learns, name
        # Behind a way up of zeros, the way down learns from the second step on.
        if learns and ".down." not in name:
            assert weight.grad.abs().max() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("method", [IA3Config(), BitFitConfig()], ids=lambda m: m.method)
def test_merged_is_the_same(method, model: CausalLM, ids: Tensor, shake):
    before = model(ids)
    base.add(model, method)
    shake(model)
    adapted = model(ids)
    assert (adapted - before).abs().max() > 0.01
    base.merge(model)
    assert not base.slots(model)
    torch.testing.assert_close(model(ids), adapted, atol=1e-5, rtol=1e-5)


def test_ia3_sits_where_the_paper_puts_it(model: CausalLM):
    base.add(model, IA3Config())
    found = {p.rsplit(".", 1)[1]: s for p, s in base.slots(model).items() if ".layers.0." in p}
    assert set(found) == {"k_proj", "v_proj", "down_proj"}
    shapes = {name: tuple(slot.deltas["default"].ia3_l.shape) for name, slot in found.items()}
    assert shapes == {"k_proj": (32, 1), "v_proj": (32, 1), "down_proj": (1, 48)}


@torch.no_grad()
@pytest.mark.parametrize("scales_input", [True, False])
def test_ia3_by_hand(scales_input: bool):
    layer = nn.Linear(2, 2)
    layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    layer.bias.copy_(torch.tensor([10.0, 20.0]))
    delta = IA3(2, 2, scales_input)
    delta.ia3_l.copy_(torch.tensor([2.0, 3.0]).view_as(delta.ia3_l))
    expected = [[18.0, 38.0]] if scales_input else [[26.0, 81.0]]
    assert delta(torch.ones(1, 2), layer).tolist() == expected
    weight, bias = delta.merged(layer)
    assert F.linear(torch.ones(1, 2), weight, bias).tolist() == expected


def test_ia3_in_half_precision_keeps_small_changes(ids: Tensor):
    layer, delta = nn.Linear(1, 1, bias=False).bfloat16(), IA3(1, 1, False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        delta.ia3_l.fill_(1.003)  # 1.0 in bfloat16
    x = torch.full((1, 1), 255.0, dtype=torch.bfloat16)
    assert delta(x, layer).item() == 256.0 and delta(x, layer).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(),
        IA3Config(targets=["up_proj", "v_proj"], feedforward_targets=["up_proj"]),
        IA3Config(targets=["down_proj"], feedforward_targets=[], modules_to_save=["norm"]),
    ],
)
def test_ia3_travels_as_peft_writes_it(config: IA3Config):
    assert IA3Config.from_peft(config.to_peft()) == config


@pytest.mark.parametrize("change", [{"target_modules": None}, {"exclude_modules": ["q_proj"]}])
def test_ia3_whose_layers_are_not_named_is_refused(change: dict[str, object]):
    with pytest.raises(UserError, match=next(iter(change))):
        IA3Config.from_peft(IA3Config().to_peft() | change)


def test_targets_without_feedforward_scale_outputs(model: CausalLM):
    base.add(model, IA3Config(targets=["down_proj"], feedforward_targets=[]))
    assert model.model.layers[0].mlp.down_proj.deltas["default"].ia3_l.shape == (32, 1)


@torch.no_grad()
def test_bitfit_adds_to_the_bias_that_is_there(model: CausalLM, ids: Tensor, shake):
    layer = model.model.layers[1].self_attn.q_proj
    layer.bias = nn.Parameter(torch.full((64,), 0.5))
    base.add(model, BitFitConfig(targets=["q_proj"]))
    shake(model)
    moved = model.model.layers[1].self_attn.q_proj.deltas["default"].bias
    adapted = model(ids)
    base.merge(model)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.bias, 0.5 + moved)
    torch.testing.assert_close(model(ids), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("placement", "places"), [("houlsby", ["down_proj", "o_proj"]), ("pfeiffer", ["down_proj"])]
)
def test_bottlenecks_stand_behind_the_halves(placement, places, model: CausalLM):
    base.add(model, BottleneckConfig(placement=placement))
    found = {path.rsplit(".", 1)[1] for path in base.slots(model)}
    assert sorted(found) == places
    assert len(base.slots(model)) == 2 * len(places)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_bottleneck_is_written_out(activation, model: CausalLM, shake):
    base.add(model, BottleneckConfig(width=5, activation=activation))
    shake(model)
    slot = model.model.layers[0].mlp.down_proj
    w = dict(slot.deltas["default"].named_parameters())
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(3))
    h = x @ slot.base.weight.T
    bent = getattr(F, activation)(h @ w["down.weight"].T + w["down.bias"])
    expected = h + bent @ w["up.weight"].T + w["up.bias"]
    torch.testing.assert_close(slot(x), expected, atol=1e-5, rtol=1e-5)


def test_a_bottleneck_cannot_be_merged(model: CausalLM):
    base.add(model, BottleneckConfig())
    with pytest.raises(UserError, match="more than a change of weights"):
        base.merge(model)
    with pytest.raises(UserError, match="no method 'bottleneck'"):
        model.adapters["default"].to_peft()


def test_the_seed_decides_the_start(make_model):
    def down(seed: int) -> Tensor:
        model = make_model()
        base.add(model, BottleneckConfig(), seed)
        return model.model.layers[0].mlp.down_proj.deltas["default"].down.weight

    assert torch.equal(down(1), down(1)) and not torch.equal(down(1), down(2))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_half_precision_bases_and_autocast(method, model: CausalLM, ids: Tensor, shake):
    base.add(model, method)
    shake(model)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(ids)
    model.bfloat16()
    for name, weight in model.named_parameters():  # the adapter stays exact
        if weight.requires_grad:
            weight.data = weight.data.float()
            assert ".deltas." in name
    logits = model(ids)
    assert logits.dtype == torch.bfloat16
    spread = exact.std()
    assert (logits - exact).abs().mean() < 0.1 * spread
    assert (cast - exact).abs().mean() < 0.1 * spread
    logits.float().sum().backward()
