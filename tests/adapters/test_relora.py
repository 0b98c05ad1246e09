"""ReLoRA: what is settled, what begins anew, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from instar.adapters.base import DEFAULT, add, frozen_twin, learnt_parts, merge, stepped
from instar.adapters.io import load_adapter, save_adapter
from instar.adapters.lora import LoRA, LoRAConfig
from instar.adapters.relora import ReLoRA, ReLoRAConfig
from instar.checkpoint import save_model
from instar.model import CausalLM
from instar.training.optimizer import OptimizerConfig, Optimizers

CONFIG = ReLoRAConfig(rank=3, targets=["q_proj", "down_proj"], restart_every=2)
Shake = Callable[[nn.Module], None]


def links(model: CausalLM) -> dict[str, ReLoRA]:
    return learnt_parts(model, DEFAULT)  # type: ignore[return-value]


@pytest.fixture
def learnt(model: CausalLM, shake: Shake) -> CausalLM:
    """A model with an adapter that has been at it for a while, and has restarted twice."""
    add(model, CONFIG)
    for step in (1, 2, 3, 4, 5):
        for link in links(model).values():
            shake(link.lora_A)
            shake(link.lora_B)
        stepped(model, step, 10)
    return model


def test_nothing_changes_at_a_restart_but_what_learns(
    model: CausalLM, ids: torch.Tensor, shake: Shake
) -> None:
    add(model, CONFIG)
    for link in links(model).values():
        shake(link.lora_B)
    before, first = model(ids), {p: d.lora_A.weight.clone() for p, d in links(model).items()}
    assert stepped(model, 1, 10) == []
    anew = stepped(model, 2, 10)
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-5)
    assert {id(p) for p in anew} == {id(p) for d in links(model).values() for p in d.parameters()}
    for path, link in links(model).items():
        assert not link.lora_B.weight.any() and link.settled.any()
        assert not torch.equal(link.lora_A.weight, first[path])
    assert stepped(model, 10, 10) == [], "nothing could learn any more"


def test_a_restart_whose_step_was_refused_comes_with_the_next(model: CausalLM) -> None:
    add(model, CONFIG)
    assert stepped(model, 1, 10) == []
    assert stepped(model, 3, 10) and stepped(model, 4, 10), "as if there had been a second one"
    assert stepped(model, 5, 10) == []


def test_what_is_unfrozen_late_begins_anew_with_the_others(model: CausalLM) -> None:
    add(model, CONFIG)
    late = next(iter(links(model).values()))
    late.requires_grad_(False)
    assert stepped(model, 2, 10) and stepped(model, 4, 10)
    late.requires_grad_(True)
    assert stepped(model, 5, 10) == [], "it owes no restart to the time when it did not learn"
    assert late.lora_A.weight in set(stepped(model, 6, 10))
    assert stepped(model, 7, 10) == []


def test_the_optimizer_forgets_what_begins_anew(model: CausalLM, ids: torch.Tensor) -> None:
    add(model, ReLoRAConfig(rank=2, restart_every=1, trainable_token_indices=[5]))
    optimizers = Optimizers(model, OptimizerConfig(name="muon"))
    model(ids).square().sum().backward()
    optimizers.step(1.0)
    known = {p for optimizer in optimizers.all for p in optimizer.state}
    assert known == {p for p in model.parameters() if p.requires_grad}
    optimizers.forget(stepped(model, 1, 10))
    left = [p for optimizer in optimizers.all for p in optimizer.state]
    assert [tuple(p.shape) for p in left] == [(1, model.config.hidden_size)], "the token's row"


def test_a_change_of_any_rank_is_written_as_a_lora(
    learnt: CausalLM, make_model: Callable[[], CausalLM], ids: torch.Tensor, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(make_model(), base)
    save_adapter(learnt, DEFAULT, tmp_path / "adapter", base)
    again = make_model()
    config = load_adapter(again, tmp_path / "adapter", base=base)
    assert isinstance(config, LoRAConfig) and config.rank == 9, "three links of rank 3"
    torch.testing.assert_close(again(ids), learnt(ids), atol=1e-4, rtol=1e-4)
    parts = learnt_parts(again, DEFAULT).values()
    assert all(isinstance(part, LoRA) and part.scale == 1 for part in parts)
    merge(learnt)
    torch.testing.assert_close(learnt(ids), again(ids), atol=1e-4, rtol=1e-4)


def test_no_rank_is_higher_than_the_layer(model: CausalLM, shake: Shake) -> None:
    add(model, ReLoRAConfig(rank=20, restart_every=1))
    for step in (1, 2):
        for link in links(model).values():
            shake(link.lora_B)
        stepped(model, step, 9)
    for link in links(model).values():
        assert link.whole_rank == min(60, *link.settled.shape)
        a, b = (link.stored()[f"lora_{side}.weight"] for side in "AB")
        assert len(a) == link.whole_rank and link.settled.any()
        torch.testing.assert_close(b @ a, link.change(), atol=1e-5, rtol=1e-4)


def test_the_seed_decides_every_beginning(make_model: Callable[[], CausalLM]) -> None:
    def later(seed: int) -> list[torch.Tensor]:
        model = make_model()
        add(model, CONFIG, seed)
        stepped(model, 2, 10)
        stepped(model, 4, 10)
        return [link.lora_A.weight.detach() for link in links(model).values()]

    first, same, other = later(3), later(3), later(4)
    for a, b, c in zip(first, same, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    alike = [(a, b) for a in first for b in first if a is not b and a.shape == b.shape]
    assert alike and not any(torch.equal(a, b) for a, b in alike), "each layer has its own"


def test_the_base_and_a_frozen_twin_stay(
    model: CausalLM, make_model: Callable[[], CausalLM], ids: torch.Tensor, shake: Shake
) -> None:
    add(model, CONFIG)
    twin = frozen_twin(model)
    for link in links(model).values():
        shake(link.lora_B)
    stepped(nn.ModuleList([model, twin]), 2, 10)
    torch.testing.assert_close(twin(ids), make_model()(ids))
    assert not torch.equal(model(ids), twin(ids))
