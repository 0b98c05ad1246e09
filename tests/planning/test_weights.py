from __future__ import annotations

import pytest
import torch

from instar.adapters.adalora import AdaLoRAConfig
from instar.adapters.base import AdapterConfig, add
from instar.adapters.bitfit import BitFitConfig
from instar.adapters.bottleneck import BottleneckConfig
from instar.adapters.dora import DoRAConfig
from instar.adapters.ia3 import IA3Config
from instar.adapters.lora import LoRAConfig
from instar.adapters.nf4 import quantize
from instar.adapters.prefix import PrefixConfig
from instar.adapters.prompt import PromptConfig
from instar.adapters.relora import ReLoRAConfig
from instar.errors import UserError
from instar.model import CausalLM, ModelConfig
from instar.objectives.keeping import Tie
from instar.planning.trial import saved_bytes
from instar.planning.weights import weigh

METHODS: list[AdapterConfig] = [
    LoRAConfig(),
    LoRAConfig(start="pissa", trainable_token_indices=[1, 2, 3]),
    LoRAConfig(modules_to_save=["norm"]),
    DoRAConfig(),
    ReLoRAConfig(),
    AdaLoRAConfig(),
    IA3Config(),
    BitFitConfig(),
    BottleneckConfig(),
    PrefixConfig(),
    PrefixConfig(projection=True),
    PromptConfig(),
]


@pytest.mark.parametrize("bits", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_an_adapter_is_counted_as_it_is_built(
    shape: ModelConfig, method: AdapterConfig, bits: str | None
) -> None:
    model = CausalLM(shape)
    if bits:
        quantize(model)
    add(model, method)
    found = weigh(shape, method, bits, [])  # type: ignore[arg-type]
    assert found.learnt == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.numbers == sum(p.numel() for p in model.parameters())
    assert found.adapted and bool(found.packed_bytes) == bool(bits)
    buffers = dict(model.named_buffers())
    beside = sum(b.numel() for name, b in buffers.items() if ".deltas." in name)
    pissa = getattr(method, "start", "") == "pissa"  # its first A and B are not reckoned
    assert found.beside < beside if pissa else found.beside == beside
    if method.method == "relora":
        assert found.beside > 32 * 32, "what is settled"
    others = sum(b.numel() * b.element_size() for b in buffers.values())
    assert found.packed_bytes <= others


def test_a_whole_model_learns_all_that_its_shape_says(shape: ModelConfig) -> None:
    for form in (shape, shape.model_copy(update={"tie_word_embeddings": False})):
        found = weigh(form, None, None, [])
        assert found.learnt == found.numbers == found.started == form.parameters()
        assert found.learnt_matrices == form.matrix_parameters() - form.vocab_size * 32
        assert found.outside == found.learnt_outside
        assert not found.adapted and found.packed_bytes == found.frozen == 0


def test_every_expert_is_held(shape: ModelConfig) -> None:
    experts = {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    sparse = shape.model_copy(update=experts | {"moe_intermediate_size": 16})
    found = weigh(sparse, None, None, [])
    assert found.numbers == sparse.parameters()
    assert found.learnt_matrices > sparse.matrix_parameters() - sparse.vocab_size * 32


def test_what_is_frozen_has_no_part_in_learning(shape: ModelConfig) -> None:
    found = weigh(shape, None, None, ["embed_tokens", "layers.0", "critic"])
    block = (found.numbers - 300 * 32 - 32) // 3
    assert found.learnt == 2 * block + 32
    assert found.started == found.numbers and found.learnt_outside == 32
    assert found.frozen_layers == 0, "only an adapter's base is kept in half precision"


def test_four_bits_cannot_learn(shape: ModelConfig) -> None:
    with pytest.raises(UserError, match="cannot learn"):
        weigh(shape, None, "nf4", [])


@pytest.mark.parametrize(("copies", "important"), [(2, False), (3, True)])
def test_a_tie_holds_so_many_copies(shape: ModelConfig, copies: int, important: bool) -> None:
    """What ``KeepConfig.needs`` says of L2-SP and of EWC."""
    model = CausalLM(shape)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    tie = Tie(model, 1.0, ones if important else None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    # Its buffers are there anyway; the way from the start is kept for the backward pass.
    held = 4 * sum(b.numel() for b in tie.buffers())
    kept = saved_bytes(lambda: tie(model), model) - (held // 2 if important else 0)
    assert held + kept == pytest.approx(copies * 4 * shape.parameters(), rel=0.01)
