import pytest

from instar.data.schema import ExamItem
from instar.evaluation.exams import run_exams, sample_replies, summarise
from instar.generation.engine import Completion, Engine


class Scripted:
    """Answers each prompt from a table; stands in for a model that has learnt something."""

    def __init__(self, tokenizer, replies: dict[str, tuple[str, bool]]):
        self.tokenizer, self.replies = tokenizer, replies

    def generate(self, prompts, sampling, stopping, *, batch_size, progress):
        assert sampling.temperature == 0 and self.tokenizer.im_end_id in stopping.token_ids
        completions = []
        for ids in prompts:
            shown = self.tokenizer.decode(ids, skip_special=False)
            user = shown.split("user\n")[1].split("<|im_end|>")[0]
            assert shown.endswith("<|im_start|>assistant\n")
            text, finished = self.replies[user]
            completions.append(Completion([9], [0.0], "stop" if finished else "length", text))
        return completions


def item(exam: str, prompt: str, answer: str, **tags: str) -> ExamItem:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "verifier": "integer",
        "answer": answer,
        "tags": tags,
        "exam": exam,
    }


def test_marks_are_grouped_by_exam_and_tag(tokenizer):
    items = [
        item("arithmetic", "1+1=?", "2", digits="1", language="en"),
        item("counting", "How many?", "7"),
        item("arithmetic", "12+12=?", "24", digits="2", language="en"),
        item("arithmetic", "2+3=?", "5", digits="1", language="zh"),
    ]
    replies = {
        "1+1=?": ("1 + 1 = 2.", True),
        "How many?": ("7", True),
        "12+12=?": ("23", True),
        "2+3=?": ("5 5 5 5", False),
    }
    results = run_exams(Scripted(tokenizer, replies), tokenizer, items, 16)
    assert list(results) == ["arithmetic", "counting", "ends_properly"]
    arithmetic = results["arithmetic"]
    assert arithmetic.score == pytest.approx(1 / 3)  # one is wrong, one was cut off
    assert arithmetic.stderr == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    assert arithmetic.groups["digits=1"] == {"score": 0.5, "n": 2}
    assert arithmetic.groups["language=en"] == {"score": 0.5, "n": 2}
    assert (results["counting"].score, results["counting"].stderr) == (1.0, 0.0)
    assert (results["ends_properly"].score, results["ends_properly"].n) == (0.75, 4)
    assert results["ends_properly"].groups["exam=arithmetic"]["n"] == 3


def test_no_items_no_results(tokenizer):
    assert run_exams(Scripted(tokenizer, {}), tokenizer, [], 16) == {}
    assert summarise([1.0, 0.0]).groups == {}


def test_progress_counts_replies_up_to_all_of_them(model, tokenizer):
    items = [item("arithmetic", prompt, "2") for prompt in ("1", "the", "2", "3")]
    seen = []
    run_exams(
        Engine(model, tokenizer),
        tokenizer,
        items,
        4,
        batch_size=3,
        progress=lambda *now: seen.append(now),
    )
    assert seen == [(3, 4), (4, 4)]


def test_a_real_engine_answers_in_order(model, tokenizer):
    replies = sample_replies(Engine(model, tokenizer), ["the the the", "1"], max_new_tokens=4)
    alone = sample_replies(Engine(model, tokenizer), ["1"], max_new_tokens=4)
    assert [reply["prompt"] for reply in replies] == ["the the the", "1"]
    assert replies[1] == alone[0]
