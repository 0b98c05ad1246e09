from __future__ import annotations

from instar.data.packing import pad_rows, reply_row
from instar.model.config import ModelConfig
from instar.planning.workload import (
    Extent,
    Workload,
    cut,
    example_steps,
    gathered,
    rollout_steps,
    rollouts,
)
from instar.rollout.folding import fold
from instar.rollout.source import RolloutConfig
from instar.training.loop import TrainingConfig


def test_a_batch_is_as_wide_as_its_widest_row_padded() -> None:
    batch = gathered([Extent(1, 10, 4), Extent(1, 17, 6), Extent(2, 3, 1)])
    assert batch == Extent(4, 24, 11)
    assert batch.tokens == 96


def test_steps_are_those_of_the_real_source() -> None:
    examples = [Extent(1, 8 * (1 + i % 4), 4) for i in range(64)]
    steps = example_steps(examples, batch_size=8, micro_tokens=100, seed=0, steps=8)
    assert len(steps) == 8
    for step in steps:
        assert sum(extent.rows for extent in step) == 8
        assert all(extent.tokens <= 100 for extent in step)
    # Eight steps are one epoch: every example once.
    assert sum(extent.learnt for step in steps for extent in step) == 64 * 4


def test_ranks_share_rows_and_not_tokens_within_them() -> None:
    step = [Extent(16, 128, 1000)] * 4
    work = Workload(ModelConfig(), TrainingConfig(steps=1), [step])
    assert work.shared(1) is work
    assert work.shared(2).steps == [[Extent(16, 128, 1000)] * 2]
    assert work.shared(8).steps == [[Extent(8, 128, 500)]]


def test_ranks_do_not_share_held_out_data() -> None:
    held_out = [Extent(8, 32, 100)] * 4
    work = Workload(ModelConfig(), TrainingConfig(steps=1), [held_out], validation=held_out)
    assert work.shared(8).validation == held_out


def test_held_out_batches_hold_every_row_once() -> None:
    rows = [Extent(1, 8, 2)] * 5
    assert [extent.rows for extent in cut(rows, 2)] == [2, 2, 1]
    assert [extent.rows for extent in cut(rows, 4, micro_tokens=24)] == [3, 1, 1]


def test_rollouts_are_cut_as_the_source_cuts_them() -> None:
    config = RolloutConfig(
        prompts=4, samples=2, epochs=2, minibatches=2, micro_batch=3, max_new_tokens=5
    )
    made = rollouts([10, 20], [3, 100], config, steps=8, readings=1, scorings=0)
    # Two prompts are all that there are; four steps learn from each rollout.
    assert len(made) == 2 and made[0].steps == 4
    assert sorted(made[0].prompts) == [10, 20]
    assert len(made[0].replies) == 4 and set(made[0].replies) <= {3, 5}
    model = ModelConfig()
    steps = rollout_steps(made, config, 1.0, model)
    assert len(steps) == 8
    taught = [sum(e.learnt for step in steps[i : i + 2] for e in step) for i in (0, 2, 4, 6)]
    assert taught == [sum(made[i].replies) for i in (0, 0, 1, 1)]
    half = rollout_steps(made, config, 0.5, model)
    assert all(sum(e.learnt for e in step) in (3, 5) for step in half), "one prompt, two replies"


def test_replies_to_one_prompt_share_it_as_in_the_source() -> None:
    model = ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2)
    config = RolloutConfig(prompts=4, samples=4, micro_batch=8, max_new_tokens=6)
    made = rollouts([30, 40, 50, 60], [3, 4, 5, 6], config, steps=1, readings=0, scorings=0)
    (step,) = rollout_steps(made, config, 1.0, model)
    lengths = iter(made[0].replies)
    rows = [
        reply_row([number] * prompt, [1] * next(lengths))
        for number, prompt in enumerate(made[0].prompts)
        for _ in range(4)
    ]
    batch, held = fold(pad_rows(rows, 0), model, config.micro_batch)
    batch = batch.rows(batch.row_lengths().argsort(stable=True))
    parts = [batch.rows(slice(i, i + 2)).trimmed() for i in (0, 2)]
    assert held == 4
    assert [len(part.input_ids) for part in parts] == [extent.rows for extent in step]
    assert [int(part.mask.sum()) for part in parts] == [extent.learnt for extent in step]
    assert [part.input_ids.shape[1] for part in parts] == [extent.width for extent in step]
    (alone,) = rollout_steps(made, config, 1.0, model, folds=False)
    assert sum(extent.rows for extent in alone) == 16
