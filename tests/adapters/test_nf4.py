"""A base in four bits: levels, errors, memory, gradients, and adapters over it."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters import base
from instar.adapters.base import put_in
from instar.adapters.ia3 import IA3Config
from instar.adapters.lora import LoRAConfig
from instar.adapters.nf4 import BLOCK, NF4Linear, levels, quantize, stored_bytes
from instar.adapters.prompt import PromptConfig
from instar.adapters.slots import Delta, matrix, plain, sizes
from instar.adapters.targets import linear_layers, targeted
from instar.model import CausalLM, ModelConfig
from instar.model.gpt2 import Conv1D
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.training.parallel import Learner

PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Appendix E of arXiv:2305.14314."""


def normal(*shape: int, std: float = 0.02) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Thin(Delta):
    """A low-rank change, as LoRA has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.a = nn.Parameter(0.1 * torch.randn(3, inputs, generator=g))
        self.b = nn.Parameter(0.1 * torch.randn(outputs, 3, generator=g))

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        return base(x) + x @ self.a.T @ self.b.T

    def merged(self, base: nn.Module) -> tuple[Tensor, Tensor | None]:
        return matrix(base) + self.b @ self.a, base.bias  # type: ignore[return-value]


def test_levels_are_the_papers():
    assert levels() == pytest.approx(PAPER, abs=1e-6)
    assert levels()[7] == 0.0


def test_what_lies_on_a_level_comes_back():
    weight = torch.tensor(PAPER * 8).view(2, BLOCK) * 3
    torch.testing.assert_close(NF4Linear(weight, None).weight, weight, atol=1e-5, rtol=0)


def test_errors_stay_within_half_the_widest_gap():
    weight = normal(96, 128)
    packed = NF4Linear(weight, None).weight
    blocks, errors = weight.view(-1, BLOCK), (packed - weight).view(-1, BLOCK).abs()
    largest = blocks.abs().amax(dim=1, keepdim=True)
    gaps = torch.tensor(PAPER).diff()
    # Scales are off by at most half a 255th of the logarithm of the widest ratio.
    rounding = (largest.max() / largest.min()) ** (0.5 / 255) - 1
    assert (errors <= (gaps.max() / 2 + 2 * rounding) * largest).all()
    # Of normal weights, about 9% of the root mean square is lost.
    assert ((packed - weight).norm() / weight.norm()).item() == pytest.approx(0.092, abs=0.004)


def test_zeros_stay_zeros_and_odd_sizes_fit():
    assert torch.equal(NF4Linear(torch.zeros(3, 5), None).weight, torch.zeros(3, 5))
    weight = normal(7, 13)
    packed = NF4Linear(weight, None)
    assert packed.weight.shape == weight.shape
    assert (packed.weight - weight).norm() < 0.15 * weight.norm()


def test_a_weight_far_out_spoils_its_own_block_alone():
    weight = normal(96, 128)
    beside = weight.clone()
    beside[3, 5] = 5.0
    errors = [(NF4Linear(w, None).weight - w).view(-1, BLOCK)[10:].norm() for w in (weight, beside)]
    assert errors[1] < 1.05 * errors[0]


def test_half_a_byte_and_a_little_more():
    layer = NF4Linear(normal(256, 256), None)
    assert stored_bytes(layer) / 256**2 == pytest.approx(0.516, abs=0.001)


def test_encoding_again_changes_little():
    """Decoded weights lie on levels; only the scales' own rounding can move them."""
    once = NF4Linear(normal(64, 64), None).weight
    twice = NF4Linear(once, None).weight
    assert (twice - once).norm() < 0.01 * once.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_decoded_layer(bias: bool, autocast: bool):
    layer = nn.Linear(48, 40, bias)
    packed = NF4Linear(layer.weight, layer.bias)
    twin = plain(packed.weight, packed.bias)
    xs = [normal(2, 5, 48, std=1.0).requires_grad_() for _ in range(2)]
    outs = []
    for x, module in zip(xs, (packed, twin), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        outs.append(y)
        (y.float() * normal(*y.shape, std=1.0)).sum().backward()
    assert outs[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    close = {"atol": 0.02, "rtol": 0.02} if autocast else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(outs[0], outs[1], **close)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, **close)


def test_nothing_of_the_weight_is_kept_for_the_gradient():
    packed = NF4Linear(normal(64, 64), None)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.ones(2, 64, requires_grad=True))
    assert not kept


def test_other_float_types_leave_the_codes_alone():
    packed = NF4Linear(normal(64, 64), torch.zeros(64))
    exact = packed.unpacked(torch.float32)
    packed.bfloat16()
    assert torch.equal(packed.unpacked(torch.float32), exact)
    x = normal(2, 64).bfloat16()
    assert packed(x).dtype == packed.weight.dtype == torch.bfloat16


def test_states_travel():
    packed, other = NF4Linear(normal(8, 64), None), NF4Linear(normal(8, 64, std=3.0), None)
    other.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(other.weight, packed.weight)


def with_thin(model: CausalLM) -> None:
    for path in targeted(model, ["q_proj", "down_proj"]):
        put_in(model, path, "thin", Thin(*sizes(model.get_submodule(path))))
    model.adapters["thin"] = IA3Config()
    base.activate(model, "thin")
    base.teach(model, "thin")


def test_low_rank_learning_over_it_equals_that_over_the_decoded_base(make_model, ids: Tensor):
    packed, twin = make_model(), make_model()
    quantize(packed)
    for path, layer in linear_layers(packed).items():
        assert isinstance(layer, NF4Linear), path
        twin.get_submodule(path).weight.data = layer.weight
    logits = []
    for model in (packed, twin):
        with_thin(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            logits.append(model(ids))
            optimizer.zero_grad()
            F.cross_entropy(logits[-1].flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
    assert (logits[2] - logits[0]).abs().max() > 1e-3
    for ours, theirs in zip(logits[:3], logits[3:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merging_gives_the_decoded_weight_and_the_change(model: CausalLM, ids: Tensor):
    quantize(model)
    with_thin(model)
    slot = model.model.layers[0].self_attn.q_proj
    delta = slot.deltas["thin"]
    expected = slot.base.weight + delta.b @ delta.a
    adapted = model(ids)
    base.merge(model, "thin")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)
    # Layers that no adapter sits at are plain again as well.
    assert all(type(layer) is nn.Linear for layer in linear_layers(model).values())
    torch.testing.assert_close(model(ids), adapted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gpt2_is_itself_again_after_merging(ids: Tensor):
    config = ModelConfig(family="gpt2", vocab_size=300, hidden_size=32, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                         head_dim=8, max_position_embeddings=64)  # fmt: skip
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    layout = {name: weight.shape for name, weight in model.state_dict().items()}
    quantize(model)
    base.add(model, LoRAConfig(rank=2, targets=["c_attn"]))
    adapted = model(ids)
    base.merge(model)
    assert {name: weight.shape for name, weight in model.state_dict().items()} == layout
    assert all(isinstance(layer, Conv1D) for layer in linear_layers(model).values())
    torch.testing.assert_close(model(ids), adapted, atol=1e-5, rtol=1e-5)


def test_reference_models_share_the_packed_base(model: CausalLM, ids: Tensor, shake):
    quantize(model)
    base.add(model, IA3Config())
    twin = base.frozen_twin(model)
    ours, theirs = model.model.layers[0].mlp.up_proj, twin.model.layers[0].mlp.up_proj
    assert ours is not theirs and ours.codes.data_ptr() == theirs.codes.data_ptr()
    before = model(ids)
    shake(model)
    assert torch.equal(twin(ids), before) and not torch.equal(model(ids), before)


def test_virtual_tokens_learn_through_it(model: CausalLM, ids: Tensor):
    quantize(model)
    base.add(model, PromptConfig(num_virtual_tokens=3))
    model(ids).sum().backward()
    assert model.model.prefix.deltas["default"].prompt_embeddings.grad.abs().max() > 0


def test_the_state_of_a_run_leaves_the_packed_base_out(model: CausalLM):
    quantize(model)
    base.add(model, LoRAConfig(rank=2))
    learner = Learner(NextToken(model))
    state = learner.state_dict()
    assert state and all("lora" in name.lower() for name in state)
    learner.load_state_dict(state)


def test_routers_heads_and_embeddings_stay(model: CausalLM):
    model.model.layers[0].mlp.gate = nn.Linear(32, 4)  # as a mixture of experts has one
    quantize(model)
    assert type(model.model.layers[0].mlp.gate) is nn.Linear
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14


def test_it_is_too_late_once_there_are_adapters(model: CausalLM):
    base.add(model, IA3Config())
    with pytest.raises(ValueError, match="before adapters"):
        quantize(model)


def test_as_good_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(128, 256)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    theirs = functional.dequantize_4bit(codes, state)
    ours = NF4Linear(weight, None).weight
    assert (ours - weight).norm() < 1.005 * (theirs - weight).norm()
    # Only weights near a border between two levels may differ.
    assert (ours - theirs).norm() < 0.03 * weight.norm()
