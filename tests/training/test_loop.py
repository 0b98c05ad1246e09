from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instar.adapters.base import DEFAULT, add, learnt_parts
from instar.adapters.lora import LoRAConfig
from instar.data.batch import Batch
from instar.data.packing import Row, pad_rows
from instar.data.sources import StepSource
from instar.lineage import Stopwatch
from instar.objectives.base import Loss, Objective
from instar.objectives.language import NextToken
from instar.training import loop
from instar.training.display import Display
from instar.training.hooks import Log, MetricsFile, Validate, due
from instar.training.interrupt import Interruptible
from instar.training.loop import Divergence, TrainingConfig, accumulate, fit
from instar.training.meter import Meter
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner
from instar.training.schedule import ScheduleConfig
from instar.training.state import Progress, WorkDirectory

CONSTANT = ScheduleConfig(shape="constant", warmup=0.0)
FLOAT32 = torch.float32


def rows(n: int) -> list[Row]:
    """Rows of very unequal numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(n):
        length = 4 + 5 * (i % 4)
        ids = torch.randint(6, 262, (length,), generator=generator).tolist()
        made.append(Row(ids, [j > 1 + i % 3 for j in range(length)]))
    return made


def gradients(model: nn.Module, micro_batches: list[Batch], clip: float = 1e9) -> list[Any]:
    model.zero_grad(set_to_none=True)
    accumulate(Learner(NextToken(model)), micro_batches, Meter(), clip, FLOAT32)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def test_dropout_hangs_by_the_step_and_is_not_measured(make_model: Callable[..., Any]) -> None:
    model, batch = make_model(), pad_rows(rows(3), 0)
    add(model, LoRAConfig(rank=2, dropout=0.5))
    for part in learnt_parts(model, DEFAULT).values():
        part.get_parameter("lora_B.weight").fill_(0.1)
    learner = Learner(NextToken(model))

    def loss(step: int) -> float:
        learner.prepare(step)
        return learner(batch).total.item()

    first = loss(0)
    assert first != loss(1) and first == loss(0)
    with learner.measuring():
        measured = learner(batch).total
        assert torch.equal(measured, learner(batch).total)
    model.eval()
    assert torch.equal(measured, NextToken(model)(batch).total)


@pytest.mark.parametrize("cuts", [[8], [4, 4], [1] * 8, [5, 2, 1]])
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(
    make_model: Callable[..., Any], cuts: list[int]
) -> None:
    model, made = make_model(), rows(8)
    parts = iter(made)
    cut = [pad_rows([next(parts) for _ in range(n)], 0) for n in cuts]
    # The reference: one mean over every target of the step, by torch's own cross-entropy.
    logits, targets = [], []
    for row in made:
        batch = pad_rows([row], 0)
        logits.append(model(batch.input_ids)[0])
        targets.append(batch.targets[0])
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for one, other in zip(gradients(model, cut), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_micro_batch_without_rows_changes_nothing(make_model: Callable[..., Any]) -> None:
    """Ranks with less to do make up their number with such."""
    model, batch, meter = make_model(), pad_rows(rows(4), 0), Meter()
    expected = gradients(model, [batch])
    empty = batch.rows(slice(0, 0))
    for one, other in zip(gradients(model, [batch, empty, empty]), expected, strict=True):
        assert torch.equal(one, other)
    accumulate(Learner(NextToken(model)), [empty], meter, 1.0, FLOAT32)
    assert meter.means() == {}


def test_a_mean_of_means_would_be_another_gradient(make_model: Callable[..., Any]) -> None:
    """The trap exists: the test above could fail."""
    model, made = make_model(), rows(8)
    right = gradients(model, [pad_rows(made, 0)])
    parts = [gradients(model, [pad_rows([row], 0)]) for row in made]
    wrong = [torch.stack(several).mean(dim=0) for several in zip(*parts, strict=True)]
    assert max((a - b).abs().max().item() for a, b in zip(right, wrong, strict=True)) > 1e-4


def test_the_metered_loss_is_the_mean_over_tokens(make_model: Callable[..., Any]) -> None:
    model, made, meter = make_model(), rows(6), Meter()
    parts = [pad_rows(made[:1], 0), pad_rows(made[1:], 0)]
    accumulate(Learner(NextToken(model)), parts, meter, 1.0, FLOAT32)
    whole = pad_rows(made, 0)
    expected = nn.functional.cross_entropy(
        model(whole.input_ids).flatten(0, 1), whole.targets.flatten()
    )
    assert meter.means()["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_long_gradients_are_scaled_down_and_short_ones_left(
    make_model: Callable[..., Any],
) -> None:
    model, batch = make_model(), [pad_rows(rows(4), 0)]
    free = gradients(model, batch)
    length = math.sqrt(sum(g.square().sum().item() for g in free))
    learner = Learner(NextToken(model))
    for clip in (length / 3, length * 3):
        model.zero_grad(set_to_none=True)
        reported, tokens = accumulate(learner, batch, Meter(), clip, FLOAT32)
        assert reported == pytest.approx(length, rel=1e-5), "the length before clipping"
        assert tokens == batch[0].input_ids.numel()
        scale = min(1, clip / length)
        for p, g in zip(model.parameters(), free, strict=True):
            torch.testing.assert_close(p.grad, g * scale, rtol=1e-4, atol=1e-7)


class Walk(Objective):
    """One weight whose loss falls by its gradient, which each batch brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Loss:
        assert batch.weight is not None
        return Loss((self.weight * batch.weight).sum())


class Slopes(StepSource):
    """Gives the slopes that it is told, one a step, and one for ever after the last."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.slopes = slopes

    def __next__(self) -> list[Batch]:
        slope = self.slopes[self.step] if self.step < len(self.slopes) else 1.0
        self.step += 1
        one = torch.ones(1, 1, dtype=torch.long)
        return [Batch(one, one, weight=torch.full((1, 1), slope))]


def fitted(objective: Objective, *parts: Any) -> None:
    with Interruptible() as interrupt:
        fit(Learner(objective), *parts, interrupt)


def walk(
    slopes: list[float],
    steps: int,
    hooks: Any = (),
    progress: Progress | None = None,
    **changes: Any,
) -> tuple[Walk, Progress, Meter]:
    objective, progress, meter = Walk(), progress or Progress(), Meter()
    config = TrainingConfig(
        steps=steps, optimizer=OptimizerConfig(lr=0.5), schedule=CONSTANT, **changes
    )
    optimizers = Optimizers(objective, config.optimizer)
    fitted(objective, Slopes(slopes), optimizers, config, progress, hooks, meter)
    return objective, progress, meter


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_counted(bad: float) -> None:
    clean, _, _ = walk([1.0, 1.0], steps=2)
    objective, progress, _ = walk([1.0, bad, 1.0], steps=3)
    assert progress.skipped == 1 and progress.step == 3
    assert torch.equal(objective.weight, clean.weight), "as if the step had never been"


def test_a_spike_is_refused_once_it_is_known_what_is_usual() -> None:
    _, progress, _ = walk([1.0] * 60 + [30.0] + [1.0] * 9, steps=70)
    assert progress.skipped == 1 and progress.usual_norm == pytest.approx(1.0)
    _, progress, _ = walk([1.0] * 60 + [30.0] + [1.0] * 9, steps=70, spike=0.0)
    assert progress.skipped == 0 and progress.usual_norm > 1.2
    _, progress, _ = walk([1.0] * 5 + [30.0] + [1.0] * 9, steps=15)
    assert progress.skipped == 0, "the first steps say little about what is usual"


def test_steps_that_teach_nothing_do_not_make_a_spike_of_those_that_do() -> None:
    """Where most groups of replies are decided, most gradients of RL are zero."""
    _, progress, _ = walk([0.0] * 200 + [1.0] * 10 + [0.0, 0.0, 0.0, 0.0, 1.0] * 60, steps=510)
    assert progress.skipped == 0 and progress.usual_norm == pytest.approx(1.0)
    _, progress, _ = walk([0.0, 1.0] * 60 + [30.0] + [1.0] * 9, steps=130)
    assert progress.skipped == 1, "there are spikes nevertheless"


def test_many_refusals_in_a_row_are_a_divergence() -> None:
    progress = Progress()
    with pytest.raises(Divergence):
        walk([1.0, 1.0, 1.0, *[math.nan] * 30], steps=100, progress=progress)
    assert (progress.step, progress.refused) == (23, 20)
    progress = Progress()
    with pytest.raises(Divergence):
        walk([1.0] * 60 + [0.0, 0.0, 30.0] * 30, steps=150, progress=progress)
    assert progress.step == 120, "steps that teach nothing are no sign of recovery"
    objective, progress, _ = walk(([math.nan] * 19 + [1.0]) * 3, steps=60)
    assert progress.skipped == 57 and objective.weight.isfinite().all()


def test_the_loop_counts_steps_and_tokens() -> None:
    seen: list[int] = []
    _, progress, _ = walk([], steps=5, hooks=[lambda p: seen.append(p.step)])
    assert seen == [1, 2, 3, 4, 5]
    assert progress.finished and progress.tokens == 5


def test_a_hook_can_end_the_run() -> None:
    def stop(progress: Progress) -> None:
        progress.finished = progress.finished or progress.step == 3

    _, progress, _ = walk([], steps=10, hooks=[stop])
    assert progress.step == 3


def test_the_optimizer_is_told_the_schedule() -> None:
    """AdamW moves a weight with an even gradient by its learning rate."""
    rates = ScheduleConfig(shape="linear", warmup=0.0, decay=1.0)
    objective, progress = Walk(), Progress()
    config = TrainingConfig(steps=4, optimizer=OptimizerConfig(lr=0.1), schedule=rates)
    moved: list[float] = []

    def note(_: Progress) -> None:
        moved.append(-objective.weight.item() - sum(moved))

    fitted(
        objective,
        Slopes([]),
        Optimizers(objective, config.optimizer),
        config,
        progress,
        [note],
        Meter(),
    )
    assert moved == pytest.approx([0.1, 0.075, 0.05, 0.025], rel=1e-4)


@pytest.fixture
def display() -> Iterator[Display]:
    with Display() as made:
        yield made


def validated(
    losses: list[float], tmp_path: Path, display: Display, **changes: Any
) -> tuple[Walk, Progress, WorkDirectory]:
    config = TrainingConfig(
        steps=len(losses),
        optimizer=OptimizerConfig(lr=0.5),
        schedule=CONSTANT,
        validate_every=1,
        **changes,
    )
    objective, progress, meter = Walk(), Progress(), Meter()
    learner = Learner(objective)
    work = WorkDirectory(tmp_path / "out", "mark")
    answers = iter(losses)
    optimizers, file = Optimizers(objective, config.optimizer), MetricsFile(work)
    check = Validate(
        config, lambda: {"loss": next(answers)}, learner, work, file, display, optimizers
    )
    fitted(objective, Slopes([]), optimizers, config, progress, [check], meter)
    return objective, progress, work


def test_a_run_that_gets_worse_is_ended(tmp_path: Path, display: Display) -> None:
    losses = [5.0, 4.0, 4.5, 4.4, 3.0, 3.1, 3.2, 3.3, 1.0]
    _, progress, _ = validated(losses, tmp_path, display, patience=3)
    assert progress.step == 8 and progress.best_loss == 3.0 and progress.finished
    _, progress, _ = validated(losses, tmp_path, display)
    assert progress.step == 9, "without patience a run goes on"


def test_the_best_weights_are_kept(tmp_path: Path, display: Display) -> None:
    _, _, work = validated([5.0, 3.0, 4.0, 4.0], tmp_path, display, keep_best=True)
    best = torch.load(work.best, weights_only=True)["weight"]
    after_two, _, _ = walk([], steps=2)
    assert torch.equal(best, after_two.weight)


@pytest.mark.parametrize(
    ("every", "expected"), [(2, [2, 4, 5]), (0, [5]), (1, [1, 2, 3, 4, 5]), (9, [5])]
)
def test_a_cadence(every: int, expected: list[int]) -> None:
    assert [step for step in range(1, 6) if due(step, every, last=step == 5)] == expected


def test_logged_rows_cover_every_step_once(
    tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkDirectory(tmp_path / "out", "mark")
    meter = Meter()
    config = TrainingConfig(
        steps=7, optimizer=OptimizerConfig(lr=0.5), schedule=CONSTANT, log_every=3
    )
    log = Log(config, meter, MetricsFile(work), display, Stopwatch())
    objective = Walk()
    slopes = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    rules = Optimizers(objective, config.optimizer)
    fitted(objective, Slopes(slopes), rules, config, Progress(), [log], meter)
    logged = [json.loads(line) for line in work.metrics.read_text().splitlines()]
    assert [row["step"] for row in logged] == [3, 6, 7]
    assert [row["grad_norm"] for row in logged] == pytest.approx([2.0, 5.0, 7.0])
    assert all(row["split"] == "train" for row in logged)


def test_precision_is_what_was_asked() -> None:
    assert loop.resolve("float32", torch.device("cpu")) == torch.float32
    assert loop.resolve("bfloat16", torch.device("cpu")) == torch.bfloat16
