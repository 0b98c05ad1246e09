from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from instar.data.batch import Batch
from instar.data.packing import pad_rows, reply_row
from instar.generation.engine import Completion
from instar.model import ScoreModel
from instar.objectives.language import batch_logprobs
from instar.objectives.reward import reply_scores
from instar.rollout.judges import Preferred, Verified
from instar.rollout.source import Rollout
from instar.tokenizer.hf import Tokenizer

pytestmark = pytest.mark.usefixtures("_without_gradients")


@pytest.fixture
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def rollout(tokenizer: Tokenizer) -> Rollout:
    """Two prompts, three replies each: 1, 0, 1 are right; of the second none is."""
    task: Any = {"messages": [], "verifier": "integer", "answer": "7"}
    prompt = tokenizer.encode("3+4=")
    replies = [
        ("7", True),
        ("8", True),
        ("It is 7", True),
        ("no", True),
        ("12", True),
        ("7", False),
    ]
    completions, rows = [], []
    for text, ended in replies:
        ids = tokenizer.encode(text) + [tokenizer.im_end_id] * ended
        finish = "stop" if ended else "length"
        completions.append(Completion(ids, [0.0] * len(ids), finish, text))
        rows.append(reply_row(prompt, ids))
    return Rollout([task] * 6, completions, pad_rows(rows, tokenizer.pad_id), 3)


def judge_of(make_model: Callable[..., Any], **changes: Any) -> Preferred:
    parts = {
        "policy": make_model(seed=0),
        "critic": make_model(ScoreModel, seed=1),
        "reward_model": make_model(ScoreModel, seed=2),
        "reference": make_model(seed=3),
        "beta": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "unfinished_penalty": 2.0,
    }
    return Preferred(**parts | changes)


def verified(make_model: Callable[..., Any], **changes: Any) -> Verified:
    parts = {
        "policy": make_model(),
        "reference": None,
        "on_policy": True,
        "skip_decided": False,
        "scale": "none",
        "normalisation": "dapo",
        "max_new_tokens": 10,
    }
    return Verified(**parts | changes)


def test_right_answers_are_better_than_their_group(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    batch, measured = verified(make_model)(rollout)
    assert batch.advantage is not None
    first = batch.advantage[:, 3]  # the last token of the prompt decides the reply's first
    assert first.tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3, 0, 0, 0])
    for row, mask in zip(batch.advantage, batch.mask, strict=True):
        assert row[mask].unique().numel() == 1 and not row[~mask].any()
    # The last reply is right but was cut off: it has not answered.
    assert measured["reward"] == pytest.approx(2 / 6)
    assert measured["undecided_groups"] == 0.5
    assert measured["finished"] == pytest.approx(5 / 6)
    assert measured["length"] == pytest.approx((2 + 2 + 8 + 3 + 3 + 1) / 6)
    assert batch.old_logprobs is batch.reference_logprobs is batch.weight is None


def test_a_group_that_agrees_teaches_nothing_and_may_be_skipped(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    everything, measured = verified(make_model)(rollout)
    taught, as_measured = verified(make_model, skip_decided=True)(rollout)
    assert everything.advantage is not None and taught.advantage is not None
    assert not everything.advantage[3:].any()
    torch.testing.assert_close(taught.input_ids, everything.input_ids[:3])
    torch.testing.assert_close(taught.advantage, everything.advantage[:3])
    assert as_measured == measured


def test_skipping_keeps_every_field_in_step(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    reference = make_model(seed=3)
    judge = verified(
        make_model, skip_decided=True, on_policy=False, reference=reference, normalisation="grpo"
    )
    batch, _ = judge(rollout)
    kept = rollout.batch.rows(slice(0, 3))
    assert batch.weight is not None
    assert batch.weight.sum(dim=1).tolist() == pytest.approx([1.0] * 3)
    torch.testing.assert_close(batch.old_logprobs, batch_logprobs(judge.policy, kept))
    torch.testing.assert_close(batch.reference_logprobs, batch_logprobs(reference, kept))


def test_where_every_group_agrees_all_are_kept(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    wrong: Any = [{**task, "answer": "99"} for task in rollout.tasks]
    batch, measured = verified(make_model, skip_decided=True)(replace(rollout, tasks=wrong))
    assert len(batch.input_ids) == 6 and measured["undecided_groups"] == 0


def test_off_policy_and_with_a_reference(rollout: Rollout, make_model: Callable[..., Any]) -> None:
    reference = make_model(seed=3)
    judge = verified(make_model, on_policy=False, reference=reference, normalisation="grpo")
    batch, _ = judge(rollout)
    assert batch.old_logprobs is not None and batch.reference_logprobs is not None
    torch.testing.assert_close(batch.old_logprobs, batch_logprobs(judge.policy, rollout.batch))
    torch.testing.assert_close(batch.reference_logprobs, batch_logprobs(reference, rollout.batch))
    assert batch.weight is not None
    assert batch.weight.sum(dim=1).tolist() == pytest.approx([1.0] * 6)


def shapes(batch: Batch) -> set[torch.Size]:
    return {tensor.shape for tensor in batch.tensors().values()}


def test_every_annotation_has_the_shape_of_the_batch(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    batch, _ = judge_of(make_model)(rollout)
    assert shapes(batch) == {rollout.batch.input_ids.shape}
    names = {"old_logprobs", "old_values", "reference_logprobs", "advantage", "returns"}
    assert names <= batch.tensors().keys()
    assert torch.equal(batch.targets, rollout.batch.targets)
    assert batch.advantage is not None and batch.returns is not None
    assert not batch.advantage[~batch.mask].any() and not batch.returns[~batch.mask].any()
    learnt = batch.advantage[batch.mask]
    assert learnt.mean().item() == pytest.approx(0, abs=1e-5)
    assert learnt.var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_a_policy_has_not_left_itself(rollout: Rollout, make_model: Callable[..., Any]) -> None:
    _, measured = judge_of(make_model, reference=make_model(seed=0))(rollout)
    assert measured["kl"] == pytest.approx(0, abs=1e-5)
    _, measured = judge_of(make_model)(rollout)
    assert abs(measured["kl"]) > 1e-3


def test_the_score_is_paid_at_the_last_token(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    """Without a critic (values 0), discount and KL, what follows a token is its return."""
    critic = make_model(ScoreModel)
    critic.score.weight.zero_()
    judge = judge_of(make_model, critic=critic, beta=0.0, gamma=0.5, lam=1.0)
    batch, measured = judge(rollout)
    scores = reply_scores(judge.reward_model, rollout.batch)
    scores = scores - 2.0 * torch.tensor([0, 0, 0, 0, 0, 1])
    assert measured["reward"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert batch.returns is not None
    for returns, mask, score in zip(batch.returns, batch.mask, scores.tolist(), strict=True):
        n = int(mask.sum())
        assert returns[mask].tolist() == pytest.approx(
            [score * 0.5 ** (n - 1 - t) for t in range(n)], rel=1e-4
        )


@pytest.mark.parametrize("form", ["mean", "prior"])
def test_reward_models_of_every_form_judge(
    form: str, rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    last = make_model(ScoreModel, seed=2)
    model = ScoreModel(last.config.model_copy(update={"reward_form": form}))
    model.load_state_dict(last.state_dict(), strict=False)
    batch, measured = judge_of(make_model, reward_model=model, critic=model)(rollout)
    scores = reply_scores(model, rollout.batch) - 2.0 * torch.tensor([0, 0, 0, 0, 0, 1])
    assert measured["reward"] == pytest.approx(scores.mean().item(), rel=1e-4)
    assert batch.returns is not None and batch.returns[batch.mask].isfinite().all()


def test_the_price_of_divergence_is_paid_token_by_token(
    rollout: Rollout, make_model: Callable[..., Any]
) -> None:
    critic, reward_model = make_model(ScoreModel), make_model(ScoreModel)
    critic.score.weight.zero_()
    reward_model.score.weight.zero_()
    parts = {"critic": critic, "reward_model": reward_model, "unfinished_penalty": 0.0}
    # With gamma 0 a token's return is its own reward.
    judge = judge_of(make_model, beta=0.3, gamma=0.0, lam=1.0, **parts)
    batch, _ = judge(rollout)
    own = batch_logprobs(judge.policy, rollout.batch)
    other = batch_logprobs(judge.reference, rollout.batch)
    expected = -0.3 * (own - other) * rollout.batch.mask
    torch.testing.assert_close(batch.returns, expected, rtol=1e-4, atol=1e-5)
