"""AdaLoRA's schedule and its choice of ranks, by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from instar.adapters.adalora import AdaLoRA, AdaLoRAConfig, _allot
from instar.adapters.base import DEFAULT, add, learnt_parts
from instar.errors import UserError
from instar.model import CausalLM

CONFIG = AdaLoRAConfig(rank=4, target_rank=2, targets=["q_proj", "v_proj"], initial_steps=2)


def test_the_budget_declines_as_a_cube() -> None:
    config = AdaLoRAConfig(rank=12, target_rank=4, initial_steps=10, final_steps=10)
    budgets = [config.budget(step, 100, 1) for step in (1, 10, 50, 90, 100)]
    # 4 + 8 (1 - (50 - 10) / 80)^3 = 5
    assert budgets == [12, 12, 5, 4, 4]


def two_layers() -> list[AdaLoRA]:
    deltas = [AdaLoRA(3, 2, 2, 1.0, 0.0) for _ in range(2)]
    for delta, values in zip(deltas, ([1.0, 4.0], [3.0, 2.0]), strict=True):
        with torch.no_grad():
            delta.lora_E.fill_(1.0)
        delta.sensitivity_lora_E.copy_(torch.tensor(values)[:, None])
        delta.uncertainty_lora_E.fill_(1.0)
    return deltas


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4, [[1, 1], [1, 1]]),
        (3, [[0, 1], [1, 1]]),
        (2, [[0, 1], [1, 0]]),
        (1, [[0, 1], [0, 0]]),
    ],
)
def test_layers_compete_for_ranks(budget: int, expected: list[list[int]]) -> None:
    deltas = two_layers()
    _allot(deltas, budget)
    assert [delta.lora_E[:, 0].tolist() for delta in deltas] == expected
    assert [delta.kept.int().tolist() for delta in deltas] == expected


def test_importance_by_hand() -> None:
    delta = AdaLoRA(2, 3, 1, 1.0, 0.0)
    with torch.no_grad():
        delta.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        delta.lora_B.fill_(1.0)
        delta.lora_E.fill_(3.0)
    for weight in delta.parameters():
        weight.grad = torch.full_like(weight, -2.0)
    delta.sense(0.5, 0.75)
    # Of A: |w g| = 2, 4; half of it 1, 2; a quarter of the rest 0.25, 0.5; products 0.25, 1.
    # Of B: 2; 1; 0.25; 0.25. Of E: 6; 3; 0.75; 2.25.
    torch.testing.assert_close(delta.importance(), torch.tensor([2.25 + 0.625 + 0.25]))


def train(model: CausalLM, ids: torch.Tensor, first: int, last: int) -> None:
    learning = [p for p in model.parameters() if p.requires_grad]
    for step in range(first, last + 1):
        model.zero_grad()
        model(ids).log_softmax(-1)[..., 7].sum().neg().backward()
        with torch.no_grad():
            for p in learning:
                p.sub_(p.grad, alpha=0.01)
        CONFIG.stepped(model, DEFAULT, step, 8)


def test_what_is_kept_in_buffers_is_enough_to_go_on(model: CausalLM, ids: torch.Tensor) -> None:
    add(model, CONFIG)
    other = copy.deepcopy(model)
    train(model, ids, 1, 4)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    train(model, ids, 5, 8)
    train(other, ids, 5, 8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    parts = learnt_parts(model, DEFAULT).values()
    assert sum(int(part.kept.sum()) for part in parts) == 2 * 4


def test_a_twin_that_does_not_learn_is_left_alone(model: CausalLM) -> None:
    add(model, CONFIG)
    before = copy.deepcopy(model.state_dict())
    CONFIG.stepped(model, DEFAULT, 5, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_ranks_that_would_grow_are_refused() -> None:
    with pytest.raises(UserError, match="target_rank is 8, more than rank, the 4 of the start"):
        AdaLoRAConfig.parse({"rank": 4}, "a file")
    theirs = AdaLoRAConfig(rank=8, target_rank=8).to_peft() | {"init_r": 4}
    assert AdaLoRAConfig.from_peft(theirs).target_rank == 4, "PEFT never takes one away"


@pytest.mark.parametrize("steps", [3, 8, 9])
def test_some_steps_of_a_longer_run_can_be_tried(
    steps: int, model: CausalLM, ids: torch.Tensor
) -> None:
    """As `instar profile` does: the schedule is that of the whole run."""
    config = CONFIG.model_copy(update={"initial_steps": 5, "final_steps": 3})
    add(model, config)
    model(ids).sum().backward()
    for step in range(1, steps + 1):
        config.stepped(model, DEFAULT, step, steps)


def test_the_penalty_is_nothing_for_orthogonal_vectors(model: CausalLM) -> None:
    add(model, CONFIG)
    assert CONFIG.penalty(model, DEFAULT) > 0.5
    with torch.no_grad():
        for part in learnt_parts(model, DEFAULT).values():
            part.lora_A.copy_(torch.eye(*part.lora_A.shape))
            part.lora_B.copy_(torch.eye(*part.lora_B.shape))
    assert CONFIG.penalty(model, DEFAULT).item() == pytest.approx(0)
