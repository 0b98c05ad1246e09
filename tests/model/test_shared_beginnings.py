"""Documents that share their beginning in one row, beside the same ones in rows of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from instar.data.batch import Batch
from instar.data.packing import pad_rows, reply_row
from instar.model import CausalLM, ScoreModel
from instar.model.transformer import initialize
from instar.objectives.clipped import ActorCritic, ClippedPolicy
from instar.rollout import folding
from instar.rollout.folding import fold

PROMPTS = [list(range(7, 20)), [*range(7, 19), 20, 21]]


def with_critic(policy: CausalLM) -> ActorCritic:
    critic = ScoreModel(policy.config)
    initialize(critic, policy.config, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(2))
    return ActorCritic(policy, critic)


@pytest.mark.parametrize("most", [2, 3, 4])
@pytest.mark.parametrize("objective_of", [ClippedPolicy, with_critic])
def test_no_loss_and_no_gradient_changes(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, most: int, objective_of: Any
) -> None:
    draw = torch.Generator().manual_seed(1)
    replies = [torch.randint(6, 60, (n,), generator=draw).tolist() for n in (3, 1, 5, 4)]
    batch = pad_rows([reply_row(prompt, reply) for prompt in PROMPTS for reply in replies], 0)
    advantage = torch.randn(batch.mask.shape, generator=draw) * batch.mask
    weight = batch.mask / batch.mask.sum(dim=1, keepdim=True)
    noted = {
        name: torch.randn(batch.mask.shape, generator=draw)
        for name in ("old_logprobs", "old_values", "returns")
    }
    batch = replace(batch, advantage=advantage, weight=weight, **noted)
    cut = folding._cut
    monkeypatch.setattr(folding, "partition", lambda groups, *_: (cut(groups, most), most))
    made, _ = fold(batch, model.config, most)
    assert len(made.input_ids) == 2 * -(-4 // most)
    objective = objective_of(model)

    def learnt(some: Batch) -> tuple[float, float, torch.Tensor]:
        objective.zero_grad()
        loss = objective(some)
        loss.total.backward()
        gradient = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
        return loss.total.item(), objective.count(some).item(), torch.cat(gradient)

    one, other = learnt(batch), learnt(made)
    assert one[:2] == pytest.approx(other[:2], rel=1e-5) and one[1] == 8
    assert torch.allclose(one[2], other[2], atol=1e-5 * float(one[2].abs().max()))
