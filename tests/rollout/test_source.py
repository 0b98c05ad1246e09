from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from instar.data.batch import Batch
from instar.errors import UserError
from instar.generation import Engine
from instar.rollout.source import Rollout, RolloutConfig, RolloutSource

TASKS: Any = [
    {"messages": [{"role": "user", "content": c * (1 + i)}], "verifier": "integer", "answer": "1"}
    for i, c in enumerate("abcdefgh")
]


def numbered(rollout: Rollout) -> tuple[Batch, dict[str, float]]:
    """A judge that gives every reply its number."""
    rows, columns = rollout.batch.input_ids.shape
    number = torch.arange(1.0, rows + 1)[:, None].expand(rows, columns)
    assert not torch.is_grad_enabled()
    return replace(rollout.batch, advantage=number), {"reward": float(rows)}


def sourced(engine: Engine, seed: int = 0, judge: Any = numbered, **changes: Any) -> RolloutSource:
    settings = {"prompts": 3, "samples": 4, "max_new_tokens": 6, "micro_batch": 5}
    return RolloutSource(TASKS, engine, judge, RolloutConfig(**settings | changes), seed)


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = [(a.tensors(), b.tensors()) for a, b in zip(one, other, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_a_function_of_seed_and_policy(engine: Engine, make_model: Callable[..., Any]) -> None:
    one, again, seeded = sourced(engine), sourced(engine), sourced(engine, seed=1)
    moved = sourced(Engine(make_model(seed=7), engine.tokenizer))
    first = one.collect()
    assert [c.ids for c in first.completions] == [c.ids for c in again.collect().completions]
    assert [c.ids for c in first.completions] != [c.ids for c in seeded.collect().completions]
    assert first.tasks == moved.collect().tasks, "the prompts do not depend on the policy"
    assert [c.ids for c in first.completions] != [c.ids for c in moved.collect().completions]
    torch.manual_seed(5)  # the global generator plays no part
    assert same(next(one), next(again))
    assert one.collect().tasks != first.tasks, "the next rollout asks something else"


def test_rows_hold_prompt_and_reply(engine: Engine) -> None:
    rollout = sourced(engine).collect()
    batch = rollout.batch
    assert len(rollout.tasks) == len(rollout.completions) == len(batch.input_ids) == 12
    for i, (task, reply) in enumerate(zip(rollout.tasks, rollout.completions, strict=True)):
        assert task is rollout.tasks[i - i % 4], "the replies to one prompt stand together"
        assert batch.targets[i][batch.mask[i]].tolist() == reply.ids
        ids = batch.input_ids[i].tolist()
        end = int(batch.mask[i].nonzero().max()) + 2
        text = engine.tokenizer.decode(ids[: end - len(reply.ids)], skip_special=False)
        question = task["messages"][0]["content"]
        assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert ids[end - len(reply.ids) : end] == reply.ids
        assert rollout.finished[i] == (reply.ids[-1] == engine.tokenizer.im_end_id)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 2), (3, 5)])
def test_every_reply_is_learnt_from_once_an_epoch(
    engine: Engine, epochs: int, minibatches: int
) -> None:
    source = sourced(engine, epochs=epochs, minibatches=minibatches)
    orders = []
    for _ in range(epochs):
        seen: list[float] = []
        for _ in range(minibatches):
            step = next(source)
            for batch in step:
                assert 0 < batch.documents <= 5 and batch.advantage is not None
                seen += batch.advantage[batch.mask].unique_consecutive().tolist()
        assert Counter(seen) == Counter(range(1, 13))
        orders.append(seen)
    assert source.metrics() == {"reward": 12.0}
    assert not source.state_dict()["pending"]
    assert len({tuple(order) for order in orders}) == epochs, "each epoch in an order of its own"


def test_replies_to_one_prompt_share_it_where_that_saves_time(engine: Engine) -> None:
    source = sourced(engine, max_new_tokens=2, micro_batch=8)
    whole = source.collect().batch
    step = next(source)
    assert sum(len(batch.input_ids) for batch in step) == 3, "one row a prompt"
    narrow = next(sourced(engine, max_new_tokens=2, micro_batch=2))
    assert all(batch.documents <= 2 for batch in narrow), "never more than may be"
    assert [int(batch.documents) for batch in step] == [8, 4]
    targets = torch.cat([batch.targets[batch.mask] for batch in step])
    assert Counter(targets.tolist()) == Counter(whole.targets[whole.mask].tolist())


def test_rows_of_like_length_share_a_micro_batch_and_no_target_is_lost(engine: Engine) -> None:
    source = sourced(engine, minibatches=2)
    whole = source.collect().batch
    steps = [next(source), next(source)]
    for step in steps:
        lengths = [n for batch in step for n in batch.row_lengths().tolist()]
        assert lengths == sorted(lengths)
        assert all(batch.input_ids.shape[1] - batch.row_lengths().max() < 8 for batch in step)
    batches = [batch for step in steps for batch in step]
    assert sum(int(batch.mask.sum()) for batch in batches) == int(whole.mask.sum())


@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 4, 5])
def test_goes_on_in_the_middle_of_a_rollout(engine: Engine, drawn: int) -> None:
    source, fresh = (sourced(engine, epochs=2, minibatches=2) for _ in range(2))
    for _ in range(drawn):
        next(source)
    state = source.state_dict()
    fresh.load_state_dict(state)
    assert fresh.metrics() == source.metrics()
    for _ in range(5):
        assert same(next(source), next(fresh))


def test_more_prompts_than_tasks(engine: Engine) -> None:
    rollout = sourced(engine, prompts=100, samples=1).collect()
    assert len(rollout.tasks) == len(TASKS)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "user", "content": "x" * 60}], "prompt 2 has .* the context has 64"),
        ([{"role": "robot", "content": "x"}], "prompt 2: .*'robot'"),
        ([], "prompt 2: messages is empty"),
    ],
)
def test_broken_prompts_are_named_at_the_door(engine: Engine, messages: Any, told: str) -> None:
    tasks: Any = [TASKS[0], {"messages": messages}]
    with pytest.raises(UserError, match=told):
        RolloutSource(tasks, engine, numbered, RolloutConfig(), 0)


def test_more_minibatches_than_replies(engine: Engine) -> None:
    with pytest.raises(UserError, match=r"rollout\.minibatches is 13, a rollout has 12 replies"):
        sourced(engine, minibatches=13)


def test_a_judge_may_leave_fewer_replies_than_minibatches(engine: Engine) -> None:
    def two_left(rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        batch, measured = numbered(rollout)
        return batch.rows(slice(0, 2)), measured

    source = sourced(engine, judge=two_left, minibatches=5)
    steps = [next(source) for _ in range(2)]
    assert [sum(len(batch.input_ids) for batch in step) for step in steps] == [1, 1]
    assert source.state_dict()["number"] == 1
    next(source)
    assert source.state_dict()["number"] == 2, "the next rollout"


def test_what_was_sampled_is_counted_once_and_also_where_it_is_not_learnt_from(
    engine: Engine,
) -> None:
    source = sourced(engine, epochs=2, judge=lambda r: (r.batch.rows(slice(0, 3)), {}))
    expected = sourced(engine).collect().batch.input_ids.numel()
    next(source)
    next(source)
    assert source.sampled == expected
    other = sourced(engine)
    other.load_state_dict(source.state_dict())
    assert other.sampled == expected


def test_a_policy_writes_in_the_format_of_its_training_unless_told() -> None:
    assert RolloutConfig().written_in(torch.float32) == "float32"
    assert RolloutConfig().written_in(torch.bfloat16) == "bfloat16"
    assert RolloutConfig(precision="int8").written_in(torch.float32) == "int8"
