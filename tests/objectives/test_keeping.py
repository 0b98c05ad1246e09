"""What holds a model to its start: numbers by hand, and properties."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from instar.data.batch import Batch
from instar.errors import UserError
from instar.model import CausalLM
from instar.model.transformer import initialize
from instar.objectives.base import Loss, Objective
from instar.objectives.functional import top_divergence, top_logprobs
from instar.objectives.keeping import Distilled, Kept, Tie, annotated, fisher
from instar.objectives.language import NextToken


class Line(Objective):
    """``sum_t w x_t`` over the tokens of a batch: gradients that can be done in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch: Batch) -> Loss:
        total = (self.w * batch.input_ids * batch.mask).sum()
        return Loss(total, {"loss": (total.detach(), self.count(batch))})


def rows(*values: list[int]) -> Batch:
    ids = torch.tensor(values)
    return Batch(input_ids=ids, targets=ids)


@pytest.fixture
def other(policy: CausalLM) -> CausalLM:
    model = CausalLM(policy.config)
    initialize(model, policy.config, torch.Generator().manual_seed(7))
    return model


def test_a_tie_costs_nothing_at_the_start_and_half_the_square_away_from_it() -> None:
    line = Line()
    tie = Tie(line, strength=3.0, fisher={"w": torch.tensor([0.5])})
    assert tie(line).item() == 0.0
    with torch.no_grad():
        line.w.add_(4.0)
    # 3 / 2 * 0.5 * 4^2
    assert tie(line).item() == pytest.approx(12.0)
    tie(line).backward()
    assert line.w.grad is not None and line.w.grad.item() == pytest.approx(3.0 * 0.5 * 4.0)
    assert Tie(Line(), 3.0)(line).item() == pytest.approx(3 / 2 * 16)


def test_what_holds_is_neither_trained_nor_saved() -> None:
    kept = Kept(Line(), {"l2_sp": Tie(Line(), 1.0)})
    assert [name for name, _ in kept.named_parameters()] == ["inner.w"]
    assert list(kept.state_dict()) == ["inner.w"]
    assert kept.to("meta").ties["l2_sp"].start_0.is_meta, "but it goes where the model goes"


def test_what_does_not_learn_is_not_held() -> None:
    line = Line()
    line.w.requires_grad_(False)
    line.extra = nn.Parameter(torch.zeros(2))
    assert Tie(line, 1.0).names == ["extra"]


@pytest.mark.parametrize("cut", [[4], [1, 3], [2, 2], [1, 1, 1, 1]], ids=str)
def test_the_penalty_has_weight_one_however_the_step_is_cut(cut: list[int]) -> None:
    """The gradient of a step: the mean over all tokens, and the penalty's own, once."""
    line = Line()
    kept = Kept(line, {"l2_sp": Tie(line, 2.0)})
    with torch.no_grad():
        line.w.add_(5.0)
    whole = rows([1, 2], [3, 4], [5, 6], [7, 9])
    batches, at = [], 0
    for size in cut:
        batches.append(whole.rows(slice(at, at + size)))
        at += size
    count = sum(kept.count(batch) for batch in batches)
    for batch in batches:
        (kept(batch).total / count).backward()
    assert line.w.grad is not None
    # mean(1..7, 9) = 37 / 8; alpha * (w - w0) = 2 * 5
    assert line.w.grad.item() == pytest.approx(37 / 8 + 10)
    paid, units = kept(whole).metrics["l2_sp"]
    assert (paid / units).item() == pytest.approx(2 / 2 * 25)


def test_the_fisher_information_by_hand() -> None:
    """Squares of each example's own gradient, added up, a token: (3^2 + 7^2) / 4, not 10^2 / 4."""
    batch = rows([1, 2], [3, 4])
    line = Line()
    assert fisher(line, [batch])["w"].item() == pytest.approx((9 + 49) / 4)
    halves = [batch.rows(slice(0, 1)), batch.rows(slice(1, 2))]
    assert fisher(line, halves)["w"].item() == pytest.approx((9 + 49) / 4)
    assert line.w.grad is None


def test_the_fisher_information_foretells_what_an_earlier_token_will_cost(
    policy: CausalLM, make_batch: Callable[..., Batch]
) -> None:
    """Where the replies are the model's own, 1/2 F d^2 is the divergence after a small step d."""
    batch = make_batch(16)
    objective = NextToken(policy)
    # Replies of one token each, drawn from the model: then F is the true Fisher information.
    generator = torch.Generator().manual_seed(0)
    ids = batch.input_ids[:, :3].repeat(32, 1)
    with torch.no_grad():
        drawn = torch.multinomial(policy(ids)[:, -1].softmax(-1), 1, generator=generator)
    targets = torch.full_like(ids, -100)
    targets[:, -1:] = drawn
    found = fisher(objective, [Batch(ids, targets)])
    name = "policy.model.norm.weight"
    before = copy.deepcopy(policy)
    size, place = 0.05, 3
    with torch.no_grad():
        policy.model.norm.weight[place] += size
        p, q = before(ids)[:, -1].log_softmax(-1), policy(ids)[:, -1].log_softmax(-1)
        true = (p.exp() * (p - q)).sum(-1).mean()
    foretold = found[name][place] * size**2 / 2
    assert foretold.item() == pytest.approx(true.item(), rel=0.2)


def exact(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def test_the_divergence_is_exact_with_all_classes(
    policy: CausalLM, other: CausalLM, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch(5)
    with torch.no_grad():
        ids, logprobs = annotated(other, batch, k=23)
        assert ids.shape == logprobs.shape == (5, 9, 23)
        hidden = policy.model(batch.input_ids)
        head = policy.lm_head.weight
        found = top_divergence(hidden, head, batch.targets, ids, logprobs, chunk=7)
        p, q = other(batch.input_ids).log_softmax(-1), policy(batch.input_ids).log_softmax(-1)
    assert torch.allclose(found, torch.where(batch.mask, exact(p, q), 0.0), atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 22])
def test_the_others_are_one_class(
    policy: CausalLM, other: CausalLM, make_batch: Callable[..., Batch], k: int
) -> None:
    """The same number from a distribution whose other classes were really put together."""
    batch = make_batch(4)
    with torch.no_grad():
        ids, logprobs = annotated(other, batch, k)
        hidden = policy.model(batch.input_ids)
        found = top_divergence(hidden, policy.lm_head.weight, batch.targets, ids, logprobs)
        p, q = other(batch.input_ids).softmax(-1), policy(batch.input_ids).softmax(-1)

    def merged(probabilities: torch.Tensor) -> torch.Tensor:
        top = probabilities.gather(-1, ids)
        return torch.cat((top, 1 - top.sum(-1, keepdim=True)), -1).clamp(min=1e-12).log()

    expected = exact(merged(p), merged(q))[batch.mask]
    assert torch.allclose(found[batch.mask], expected, atol=1e-5)
    assert (expected <= exact(p.log(), q.log())[batch.mask] + 1e-6).all(), "a lower bound"


def test_the_likeliest_tokens(policy: CausalLM, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(3)
    hidden = policy.model(batch.input_ids)
    ids, logprobs = top_logprobs(hidden, policy.lm_head.weight, batch.targets, 2, chunk=3)
    best = policy(batch.input_ids).log_softmax(-1).topk(2)
    assert torch.equal(ids[batch.mask], best.indices[batch.mask])
    assert torch.allclose(logprobs[batch.mask], best.values[batch.mask], atol=1e-5)


def test_a_model_that_says_the_same_pays_nothing(
    policy: CausalLM, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch(4)
    with torch.no_grad():
        ids, logprobs = annotated(copy.deepcopy(policy), batch, 5)
    known = replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)
    loss = Distilled(policy, beta=2.0)(known)
    plain = NextToken(policy)(batch)
    assert loss.metrics["kl_to_start"][0].item() == pytest.approx(0.0, abs=1e-4)
    assert loss.total.item() == pytest.approx(plain.total.item(), abs=1e-3)
    with pytest.raises(UserError, match="teacher_logprobs"):
        Distilled(policy, beta=2.0)(batch)


def test_the_loss_is_both(
    policy: CausalLM, other: CausalLM, make_batch: Callable[..., Batch]
) -> None:
    """Total and gradient are those of the parts; rows may be dealt out in any way."""
    batch = make_batch(6)
    with torch.no_grad():
        ids, logprobs = annotated(other, batch, 5)
    batch = replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)
    objective = Distilled(policy, beta=0.3)
    whole = objective(batch)
    assert whole.total.item() == pytest.approx(
        whole.metrics["loss"][0].item() + 0.3 * whole.metrics["kl_to_start"][0].item(), rel=1e-5
    )
    parts = [objective(batch.rows(slice(i, i + 2)).trimmed()).total.item() for i in (0, 2, 4)]
    assert sum(parts) == pytest.approx(whole.total.item(), rel=1e-4)
    assert objective(batch.rows(slice(0, 0))).total.item() == 0.0
