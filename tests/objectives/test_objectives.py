"""What every objective promises: sums, no matter how the batch is cut."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from instar.data.batch import IGNORE, Batch
from instar.errors import UserError
from instar.model import CausalLM, ScoreModel
from instar.model.transformer import initialize
from instar.objectives.base import Metrics, Objective
from instar.objectives.clipped import ActorCritic, ClippedPolicy
from instar.objectives.language import NextToken, batch_logprobs
from instar.objectives.preference import DPO, IPO, ORPO, PairLoss, Pairwise, Replies, SimPO
from instar.objectives.reward import BradleyTerry, reply_scores
from instar.rollout.advantages import token_weights

MakeBatch = Callable[..., Batch]


@pytest.fixture(
    params=["next", "reward", "dpo", "orpo", "ppo", "weighted", "on_policy"],
)
def objective_and_batch(
    request: pytest.FixtureRequest, policy: CausalLM, scorer: ScoreModel, make_batch: MakeBatch
) -> tuple[Objective, Batch]:
    batch = make_batch(8)
    weight = token_weights(batch.mask, "grpo", 9)
    return {
        "next": (NextToken(policy), batch),
        "reward": (BradleyTerry(scorer), batch),
        "dpo": (Pairwise(policy, DPO()), batch),
        "orpo": (Pairwise(policy, ORPO()), batch),
        "ppo": (ActorCritic(policy, scorer, entropy_weight=0.1), batch),
        "weighted": (ClippedPolicy(policy, kl_weight=0.1), replace(batch, weight=weight)),
        "on_policy": (ClippedPolicy(policy), replace(batch, old_logprobs=None)),
    }[request.param]


def run(objective: Objective, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], Metrics]:
    """Gradient and metrics of one step: add everything, divide by the whole count last."""
    objective.zero_grad()
    metrics: Metrics = {}
    count = sum(objective.count(batch) for batch in batches)
    for batch in batches:
        loss = objective(batch)
        (loss.total / count).backward()
        for name, (value, number) in loss.metrics.items():
            assert not value.requires_grad and not number.requires_grad
            old = metrics.get(name, (torch.tensor(0.0), torch.tensor(0.0)))
            metrics[name] = (old[0] + value, old[1] + number)
    gradients = {k: p.grad.clone() for k, p in objective.named_parameters() if p.grad is not None}
    return gradients, metrics


def test_the_cut_into_micro_batches_does_not_matter(objective_and_batch: tuple[Objective, Batch]):
    objective, batch = objective_and_batch
    if objective.unit == "pair":
        pieces = [torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5, 6, 7])]
    else:
        pieces = [torch.tensor([0]), torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 7])]
    whole, metrics = run(objective, [batch])
    cut, cut_metrics = run(objective, [batch.rows(piece) for piece in pieces])
    assert whole and all(g.abs().sum() > 0 for g in whole.values())
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-4)
    for name, (value, number) in metrics.items():
        if name == "explained_variance":
            continue  # its mean is that of the micro-batch
        torch.testing.assert_close(cut_metrics[name], (value, number), atol=1e-4, rtol=1e-4)


def test_padding_and_what_is_ignored_do_not_matter(objective_and_batch: tuple[Objective, Batch]):
    objective, batch = objective_and_batch
    rubbish = {
        name: torch.where(batch.mask, value, 1e3)
        for name, value in batch.tensors().items()
        if name not in {"input_ids", "targets", "reference_logprobs"}
    }
    longer = {
        name: F.pad(value, (0, 3), value=IGNORE if name == "targets" else 0)
        for name, value in replace(batch, **rubbish).tensors().items()
    }
    if objective.unit == "pair":
        clean = torch.where(batch.mask, batch.reference_logprobs, 0.0)  # pyright: ignore
        batch = replace(batch, reference_logprobs=clean)
        longer["reference_logprobs"] = F.pad(clean, (0, 3))
    torch.testing.assert_close(
        objective(Batch(**longer)).total, objective(batch).total, atol=1e-4, rtol=1e-5
    )


def test_next_token_is_cross_entropy(policy: CausalLM, make_batch: MakeBatch):
    batch = make_batch(3)
    loss = NextToken(policy)(batch)
    logits = policy(batch.input_ids)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    assert loss.metrics["loss"][1] == batch.mask.sum()


def test_bradley_terry_by_hand(scorer: ScoreModel, make_batch: MakeBatch):
    batch = make_batch(4)
    rewards = scorer(batch.input_ids)[torch.arange(4), batch.row_lengths() - 1].tolist()
    expected = right = 0.0
    for better, worse in zip(rewards[:2], rewards[2:], strict=True):
        expected += math.log1p(math.exp(worse - better)) + 0.5 * (better + worse) ** 2
        right += better > worse
    loss = BradleyTerry(scorer, center=0.5)(batch)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert (loss.metrics["accuracy"][0].item(), loss.metrics["accuracy"][1].item()) == (right, 2)


@pytest.mark.parametrize("form", ["mean", "prior"])
def test_rewards_of_whole_replies_by_hand(
    form: Literal["mean", "prior"], policy: CausalLM, scorer: ScoreModel, make_batch: MakeBatch
):
    config = scorer.config.model_copy(update={"reward_form": form})
    model = ScoreModel(config)
    initialize(model, config, torch.Generator().manual_seed(2))
    model.model.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(scorer.score.weight)
    batch = make_batch(4)
    scores, logps = model(batch.input_ids), policy(batch.input_ids).log_softmax(dim=-1)
    for row, reward in enumerate(reply_scores(model, batch).tolist()):
        predicted = [t for t, known in enumerate(batch.mask[row].tolist()) if known]
        expected = sum(scores[row, t + 1].item() for t in predicted)
        if form == "prior":
            expected += sum(logps[row, t, batch.targets[row, t]].item() for t in predicted)
        assert reward == pytest.approx(expected / len(predicted), rel=1e-4)
    BradleyTerry(model)(batch).total.backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert ("prior_weight" in learnt) == (form == "prior")


def replies(logprob: float, length: int, reference: float) -> Replies:
    return Replies(*(torch.tensor([float(x)]) for x in (logprob, length, reference)))


# log pi, length, log pi_ref. Log-ratios: 2 - 0 over 4 and 5 tokens.
CHOSEN, REJECTED = replies(-4, 4, -6), replies(-10, 5, -10)
PAIR_LOSSES = [
    # h = 2, margin 0.5 * 2 = 1: ln(1 + e^-1)
    (DPO(beta=0.5), math.log1p(math.exp(-1))),
    # one label in ten is wrong: 0.9 ln(1 + e^-1) + 0.1 ln(1 + e)
    (DPO(0.5, 0.1), 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.e)),
    # the chosen reply's mean NLL is 4 / 4
    (DPO(0.5, nll_weight=0.3), math.log1p(math.exp(-1)) + 0.3),
    # mean log-ratios 2/4 - 0/5 = 0.5; the target is 1 / (2 * 0.25) = 2: (0.5 - 2)^2
    (IPO(beta=0.25), 2.25),
    # mean log-probs -1 and -2: margin 2 (-1 + 2) - 0.5 = 1.5
    (SimPO(beta=2.0, gamma=0.5), math.log1p(math.exp(-1.5))),
    # odds e^-1 / (1 - e^-1) = 1 / (e - 1) and 1 / (e^2 - 1); their ratio is e + 1,
    # -log sigmoid(log(e + 1)) = ln(1 + 1 / (e + 1)); the NLL of the chosen is 1
    (ORPO(lambda_=0.2), 1 + 0.2 * math.log1p(1 / (math.e + 1))),
]


@pytest.mark.parametrize(("loss", "expected"), PAIR_LOSSES)
def test_pair_losses_by_hand(loss: PairLoss, expected: float):
    assert loss.loss(CHOSEN, REJECTED).item() == pytest.approx(expected, rel=1e-5)
    assert loss.reward(CHOSEN) > loss.reward(REJECTED)


def test_orpo_survives_a_certain_reply():
    logprob = torch.zeros(1, requires_grad=True)
    certain = Replies(logprob, torch.ones(1), torch.zeros(1))
    loss = ORPO().loss(certain, REJECTED)
    loss.backward()
    assert loss.isfinite().all() and logprob.grad is not None and logprob.grad.isfinite().all()


def test_dpo_at_the_reference_knows_nothing(policy: CausalLM, make_batch: MakeBatch):
    batch = make_batch(6)
    with torch.no_grad():
        batch = replace(batch, reference_logprobs=batch_logprobs(policy, batch))
    loss = Pairwise(policy, DPO())(batch)
    assert loss.total.item() == pytest.approx(3 * math.log(2), rel=1e-5)


def test_missing_annotations_are_named(policy: CausalLM, make_batch: MakeBatch):
    batch = make_batch(2)
    bare = Batch(input_ids=batch.input_ids, targets=batch.targets)
    with pytest.raises(UserError, match="reference_logprobs"):
        Pairwise(policy, DPO())(bare)
    Pairwise(policy, SimPO())(bare)
    with pytest.raises(UserError, match="advantage"):
        ClippedPolicy(policy)(bare)
    with pytest.raises(UserError, match="reference_logprobs"):
        ClippedPolicy(policy, kl_weight=0.1)(replace(batch, reference_logprobs=None))


def test_on_policy_is_the_policy_gradient(policy: CausalLM, make_batch: MakeBatch):
    # With old = now the ratio is 1, and the gradient is -sum A grad log pi (Williams 1992).
    batch = replace(make_batch(4), old_logprobs=None, reference_logprobs=None)
    assert batch.advantage is not None
    parameters = list(policy.parameters())
    reinforce = -(batch_logprobs(policy, batch) * batch.advantage).sum()
    expected = torch.autograd.grad(reinforce, parameters)
    loss = ClippedPolicy(policy)(batch)
    torch.testing.assert_close(torch.autograd.grad(loss.total, parameters), expected)
    assert loss.metrics["approx_kl"][0] == loss.metrics["clip_fraction"][0] == 0
    assert loss.metrics["ratio"][0] == loss.metrics["ratio"][1]


def test_the_entropy_bonus_raises_entropy(policy: CausalLM, make_batch: MakeBatch):
    batch = replace(make_batch(4), old_logprobs=None, advantage=torch.zeros(4, 9))
    objective = ClippedPolicy(policy, entropy_weight=1.0)
    before = objective(batch)
    (before.total / objective.count(batch)).backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 0.01 * p.grad if p.grad is not None else 0
    assert objective(batch).metrics["entropy"][0] > before.metrics["entropy"][0]


def test_actor_critic_adds_the_value_loss(
    policy: CausalLM, scorer: ScoreModel, make_batch: MakeBatch
):
    batch = make_batch(4)
    actor = ClippedPolicy(policy)(batch)
    # A clip that never binds leaves half the squared error.
    both = ActorCritic(policy, scorer, value_weight=0.7, value_clip=1e9)(batch)
    assert batch.returns is not None
    error = (scorer(batch.input_ids) - batch.returns)[batch.mask]
    expected = actor.total + 0.7 * error.square().sum() / 2
    torch.testing.assert_close(both.total, expected)
    assert both.metrics["value_loss"][1] == batch.mask.sum()
