"""Comparison: two models answer the same prompts, and two judges say who did better.

The *gold rubric* knows the truth; the *reward model* is what training could see. A policy that
wins by the reward model but not by the rubric has learnt to please the judge, not to be good
(Gao et al. 2022, arXiv:2210.10760). How far it has moved to get there is its KL divergence from
the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from instar.data.batch import Batch
from instar.data.packing import pad_rows, reply_row
from instar.data.schema import Message
from instar.errors import UserError
from instar.objectives.language import batch_logprobs
from instar.objectives.reward import reply_scores
from instar.primer.rubric import from_record, score
from instar.tokenizer.chat import prompt_ids

if TYPE_CHECKING:
    from instar.generation.engine import Engine
    from instar.generation.reply import Completion
    from instar.model.transformer import CausalLM, ScoreModel
    from instar.primer.question import Question

ROWS = 64
"""Sequences scored at once."""


@dataclass(frozen=True)
class Comparison:
    """A policy against a reference on the same prompts.

    Attributes:
        gold_win_rate: Share of prompts on which the rubric prefers the policy's reply; a tie
            counts one half, so two equal models score 0.5.
        gold_stderr: Its standard error over prompts.
        reward_win_rate: The same by the reward model.
        reward_stderr: Its standard error over prompts.
        kl: Divergence of the policy from the reference, nats a reply, estimated from the
            policy's own replies: the mean of ``sum_t log pi(y_t) - log pi_ref(y_t)``.
        kl_stderr: Its standard error over prompts.
        n: Number of prompts.
        gold_mean: Mean gold score of the policy's replies, 0 to 1.
        reference_gold_mean: Mean gold score of the reference's replies.
        reward_mean: Mean reward of the policy's replies.
        reference_reward_mean: Mean reward of the reference's replies.
        length_mean: Mean length of the policy's replies, tokens.
        reference_length_mean: Mean length of the reference's replies, tokens.
    """

    gold_win_rate: float
    gold_stderr: float
    reward_win_rate: float
    reward_stderr: float
    kl: float
    kl_stderr: float
    n: int
    gold_mean: float
    reference_gold_mean: float
    reward_mean: float
    reference_reward_mean: float
    length_mean: float
    reference_length_mean: float


def compare(
    policy: Engine,
    reference: Engine,
    reward_model: ScoreModel,
    questions: Sequence[Mapping[str, Any]],
    max_new_tokens: int = 96,
    seed: int = 0,
) -> Comparison:
    """Let both models answer every question once, and judge the replies.

    Replies are sampled at temperature 1, because that is the distribution that training shaped
    and that the KL divergence is about. Both models draw with the same random numbers: equal
    models then give equal replies, and differences show with less noise.

    Args:
        policy: The model in question.
        reference: What it is compared with, usually the SFT model; the same tokenizer.
        reward_model: Says what a reply is worth.
        questions: Held-out questions as records (``primer.rubric.to_record``).
        max_new_tokens: Longest reply, in tokens.
        seed: Seeds the replies.

    Raises:
        UserError: Fewer than two questions, which give no standard error.
    """
    if len(questions) < 2:
        raise UserError(
            f"a comparison of {len(questions)} question(s) has no error bar", "Give two or more."
        )
    asked = [from_record(dict(question)) for question in questions]
    prompts = [_prompt(policy, question.prompt) for question in asked]
    ours = _sample(policy, prompts, max_new_tokens, seed)
    theirs = _sample(reference, prompts, max_new_tokens, seed)
    gold, reference_gold = _gold(asked, ours), _gold(asked, theirs)
    reward = _rewards(reward_model, prompts, ours)
    reference_reward = _rewards(reward_model, prompts, theirs)
    # Both models score the replies in the same way; so rounding cancels, and KL(p, p) is zero.
    own = _reply_logprobs(policy.model, prompts, ours)
    other = _reply_logprobs(reference.model, prompts, ours)
    gold_wins, gold_stderr = _mean(_wins(gold, reference_gold))
    reward_wins, reward_stderr = _mean(_wins(reward, reference_reward))
    kl, kl_stderr = _mean([a - b for a, b in zip(own, other, strict=True)])
    return Comparison(
        gold_win_rate=gold_wins,
        gold_stderr=gold_stderr,
        reward_win_rate=reward_wins,
        reward_stderr=reward_stderr,
        kl=kl,
        kl_stderr=kl_stderr,
        n=len(asked),
        gold_mean=_mean(gold)[0],
        reference_gold_mean=_mean(reference_gold)[0],
        reward_mean=_mean(reward)[0],
        reference_reward_mean=_mean(reference_reward)[0],
        length_mean=_mean([len(c.ids) for c in ours])[0],
        reference_length_mean=_mean([len(c.ids) for c in theirs])[0],
    )


def _prompt(engine: Engine, text: str) -> list[int]:
    turns: list[Message] = [{"role": "user", "content": text}]
    return prompt_ids(engine.tokenizer, turns)


def _sample(
    engine: Engine, prompts: list[list[int]], max_new_tokens: int, seed: int
) -> list[Completion]:
    from instar.generation.sampling import Sampling
    from instar.generation.stopping import Stopping

    stopping = Stopping(engine.tokenizer.turn_end_ids, max_new_tokens=max_new_tokens)
    return engine.generate(prompts, Sampling(temperature=1.0), stopping, seed=seed)


def _gold(questions: list[Question], replies: list[Completion]) -> list[float]:
    return [score(q, reply.text).total for q, reply in zip(questions, replies, strict=True)]


def _wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where ours is better, 0 where theirs is, 1/2 where they tie but for rounding."""
    pairs = zip(ours, theirs, strict=True)
    return [0.5 if math.isclose(a, b, abs_tol=1e-5) else float(a > b) for a, b in pairs]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def _batches(
    prompts: list[list[int]], replies: list[Completion], device: torch.device
) -> Iterator[Batch]:
    """Prompts and replies as rows, some at a time."""
    rows = [reply_row(p, reply.ids) for p, reply in zip(prompts, replies, strict=True)]
    for start in range(0, len(rows), ROWS):
        yield pad_rows(rows[start : start + ROWS], pad_id=0).to(device)


@torch.no_grad()
def _rewards(model: ScoreModel, prompts: list[list[int]], replies: list[Completion]) -> list[float]:
    """What the reward model thinks each reply is worth."""
    batches = _batches(prompts, replies, model.score.weight.device)
    return [reward for batch in batches for reward in reply_scores(model, batch).tolist()]


@torch.no_grad()
def _reply_logprobs(
    model: CausalLM, prompts: list[list[int]], replies: list[Completion]
) -> list[float]:
    """Log-probability of each whole reply, its end of turn included."""
    batches = _batches(prompts, replies, model.lm_head.weight.device)
    return [total for b in batches for total in batch_logprobs(model, b).sum(dim=1).tolist()]
