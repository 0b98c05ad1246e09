import copy
import math

import pytest
import torch

from instar.errors import UserError
from instar.evaluation.comparison import compare
from instar.generation.engine import Completion, Engine
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model.transformer import ScoreModel, initialize
from instar.primer.question import Question
from instar.primer.rubric import to_record
from instar.tokenizer.chat import render

CAPITALS = {"France": "Paris", "Peru": "Lima", "Cuba": "Havana", "Chad": "N'Djamena"}
QUESTIONS = [
    Question(country, city, f"The capital is {city}.", ("Rome",), "en", "knowledge")
    for country, city in CAPITALS.items()
]
RECORDS = [to_record(question) for question in QUESTIONS]


class Scripted:
    """Gives written replies, with a real model behind them for the log-probabilities."""

    def __init__(self, model, tokenizer, texts):
        self.model, self.tokenizer, self.texts = model, tokenizer, texts

    def generate(self, prompts, sampling, stopping, *, seed=0, **_):
        assert sampling == Sampling(temperature=1.0) and len(prompts) == len(self.texts)
        end = self.tokenizer.im_end_id
        return [
            Completion([*self.tokenizer.encode(text), end], [], "stop", text) for text in self.texts
        ]


@pytest.fixture
def judge(config):
    judge = ScoreModel(config)
    initialize(judge, config, torch.Generator().manual_seed(3))
    with torch.no_grad():
        judge.score.weight.normal_(generator=torch.Generator().manual_seed(4))
    return judge


def test_a_model_ties_with_itself(model, tokenizer, judge):
    engine = Engine(model, tokenizer)
    result = compare(engine, engine, judge, RECORDS, max_new_tokens=6)
    assert (result.gold_win_rate, result.gold_stderr, result.n) == (0.5, 0.0, 4)
    assert (result.reward_win_rate, result.kl, result.kl_stderr) == (0.5, 0.0, 0.0)
    assert result.length_mean == result.reference_length_mean <= 6
    assert result == compare(engine, engine, judge, RECORDS, max_new_tokens=6)


def test_wins_by_truth_and_by_reward(model, tokenizer, judge):
    right = [question.sentence for question in QUESTIONS]
    # Better, better, equal, worse: (1 + 1 + 0.5 + 0) / 4.
    good = [right[0], right[1], right[2], "Rome"]
    bad = ["Rome", "Rome", right[2], right[3]]
    result = compare(
        Scripted(model, tokenizer, good), Scripted(model, tokenizer, bad), judge, RECORDS
    )
    assert result.gold_win_rate == 0.625
    assert result.gold_stderr == pytest.approx(math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 12))
    assert result.gold_mean > result.reference_gold_mean

    def reward(question, text):
        turn = [{"role": "user", "content": question.prompt}]
        ids = render(tokenizer, turn, add_generation_prompt=True).ids + tokenizer.encode(text)
        return judge(torch.tensor([[*ids, tokenizer.im_end_id]]))[0, -1].item()

    ours = [reward(q, text) for q, text in zip(QUESTIONS, good, strict=True)]
    theirs = [reward(q, text) for q, text in zip(QUESTIONS, bad, strict=True)]
    wins = [
        0.5 if i == 2 else float(a > b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    assert result.reward_win_rate == sum(wins) / 4
    assert result.reward_mean == pytest.approx(sum(ours) / 4, abs=1e-5)


def test_kl_is_the_mean_log_ratio_of_the_policys_own_replies(model, tokenizer, judge):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) / 20)
    policy, reference = Engine(other, tokenizer), Engine(model, tokenizer)
    result = compare(policy, reference, judge, RECORDS, max_new_tokens=5, seed=7)
    prompts = [
        render(tokenizer, [{"role": "user", "content": q.prompt}], add_generation_prompt=True).ids
        for q in QUESTIONS
    ]
    stopping = Stopping(frozenset({tokenizer.im_end_id}), max_new_tokens=5)
    replies = policy.generate(prompts, Sampling(), stopping, seed=7)
    expected = 0.0
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([prompt + reply.ids])
        logits = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logits[range(len(reply.ids)), reply.ids].sum().item()
        expected += (sum(reply.logprobs) - chosen) / 4
    assert result.kl == pytest.approx(expected, abs=1e-4) and abs(result.kl) > 0.01


def test_one_question_is_not_enough(model, tokenizer, judge):
    engine = Engine(model, tokenizer)
    with pytest.raises(UserError, match="no error bar"):
        compare(engine, engine, judge, RECORDS[:1])
