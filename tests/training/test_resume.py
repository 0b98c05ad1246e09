"""A run that is stopped anywhere and started again ends as if it had never been stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instar.data.batch import Batch
from instar.data.sources import PackedSource
from instar.errors import UserError
from instar.generation import Engine
from instar.lineage import Stopwatch
from instar.model import ScoreModel
from instar.objectives.clipped import ActorCritic
from instar.objectives.language import NextToken
from instar.rollout.judges import Preferred
from instar.rollout.source import RolloutConfig, RolloutSource
from instar.stages.base import Job
from instar.stages.running import _train
from instar.tokenizer.hf import Tokenizer
from instar.training import state
from instar.training.display import Display
from instar.training.interrupt import Interrupted, Interruptible
from instar.training.loop import TrainingConfig
from instar.training.meter import Meter
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner
from instar.training.schedule import ScheduleConfig
from instar.training.state import (
    Progress,
    Saver,
    WorkDirectory,
    checksum_of,
    load_tensors,
    save_tensors,
    sweep,
)


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def pretraining(make_model: Callable[..., Any], tokenizer: Tokenizer) -> Callable[[], Job]:
    def build() -> Job:
        rng = np.random.default_rng(0)
        tokens = rng.integers(6, 262, 700).astype(np.uint16)
        model = make_model()
        source = PackedSource(tokens, context=16, batch_size=6, micro_batch=4, seed=1)
        # Validation has to come out of the model, so that early stopping is resumed as well.
        return Job(NextToken(model), source, model, tokenizer, int, lambda: {"loss": norm(model)})

    return build


def norm(model: torch.nn.Module) -> float:
    return sum(p.detach().square().sum().item() for p in model.parameters())


@pytest.fixture
def rollouts(make_model: Callable[..., Any], tokenizer: Tokenizer) -> Callable[[], Job]:
    """Two epochs of two minibatches: every second stop falls into the middle of a rollout."""

    def build() -> Job:
        policy, critic = make_model(seed=0), make_model(ScoreModel, seed=1)
        judge = Preferred(
            policy=policy,
            critic=critic,
            reward_model=make_model(ScoreModel, seed=1).requires_grad_(False),
            reference=make_model(seed=0).requires_grad_(False),
            beta=0.05,
            gamma=1.0,
            lam=0.95,
            unfinished_penalty=1.0,
        )
        tasks: Any = [{"messages": [{"role": "user", "content": c}]} for c in "abcdef"]
        config = RolloutConfig(
            prompts=4, samples=2, max_new_tokens=5, epochs=2, minibatches=2, micro_batch=3
        )
        source = RolloutSource(tasks, Engine(policy, tokenizer), judge, config, seed=2)
        objective = ActorCritic(policy, critic)
        return Job(objective, source, policy, tokenizer, int, lambda: {"loss": norm(policy)})

    return build


@pytest.fixture(params=["pretraining", "rollouts"])
def build(request: pytest.FixtureRequest) -> Callable[[], Job]:
    return request.getfixturevalue(request.param)


def training(**changes: Any) -> TrainingConfig:
    settings = {
        "steps": 11,
        "optimizer": OptimizerConfig(name="muon", lr=3e-3),
        "schedule": ScheduleConfig(warmup=0.2, decay=0.5),
        "log_every": 3,
        "validate_every": 4,
        "keep_best": True,
        "save_every": 4,
    }
    return TrainingConfig(**settings | changes)


def run(
    build: Callable[[], Job],
    out: Path,
    stop_at: int | None = None,
    stop: Callable[[], None] | None = None,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], bytes, Any]:
    """One sitting: the weights, the metrics file and the progress at its end.

    ``stop`` is called when step ``stop_at`` draws its batches.
    """
    job = build()
    if stop:
        draw, drawn = job.source, iter(range(1, 1000))
        assert not WorkDirectory(out, "mark").states(), "only a first sitting is stopped"

        class Stopping:
            """The source, with an accident on the way."""

            def __next__(self) -> Any:
                if next(drawn) == stop_at:
                    stop()
                return next(draw)

            def __getattr__(self, name: str) -> Any:
                return getattr(draw, name)

        job.source = Stopping()  # type: ignore[assignment]
    work = WorkDirectory(out, "mark")
    with Display() as display:
        progress = _train(job, training(**changes), work, Stopwatch(), display)
    return job.objective.state_dict(), work.metrics.read_bytes(), progress


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("stop_at", [1, 5, 6, 11])
@pytest.mark.parametrize(
    ("stop", "raised"), [(ctrl_c, Interrupted), (terminate, Interrupted), (kill, Killed)]
)
def test_stopped_and_started_again(
    build: Callable[[], Job],
    tmp_path: Path,
    stop_at: int,
    stop: Callable[[], None],
    raised: type[BaseException],
) -> None:
    weights, logged, done = run(build, tmp_path / "whole")
    with pytest.raises(raised):
        run(build, tmp_path / "out", stop_at, stop)
    saved = WorkDirectory(tmp_path / "out", "mark").states()
    at = load_tensors(saved[0])["progress"]["step"]
    if raised is Interrupted:
        assert at == stop_at, "the step under way comes to its end and is saved"
    else:
        assert at == (stop_at - 1) // 4 * 4
    again, logged_again, done_again = run(build, tmp_path / "out")
    assert logged_again == logged
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    for field in ("step", "tokens", "best_loss", "worse", "skipped", "usual_norm", "finished"):
        assert getattr(done, field) == getattr(done_again, field), field


def test_stopped_early_stays_stopped(pretraining: Callable[[], Job], tmp_path: Path) -> None:
    rising = {"validate_every": 1, "patience": 2, "optimizer": OptimizerConfig(lr=0.03)}
    weights, logged, progress = run(pretraining, tmp_path / "out", **rising)
    assert progress.finished and progress.step < 11
    # As if the machine had died before the checkpoint was written.
    again, logged_again, progress_again = run(pretraining, tmp_path / "out", **rising)
    assert progress_again.step == progress.step and logged_again == logged
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_the_best_weights_come_out(pretraining: Callable[[], Job], tmp_path: Path) -> None:
    rising = {"validate_every": 1, "optimizer": OptimizerConfig(lr=0.03)}
    best, _, progress = run(pretraining, tmp_path / "best", **rising)
    last, _, _ = run(pretraining, tmp_path / "last", keep_best=False, **rising)
    embedding = "policy.model.embed_tokens.weight"
    assert not torch.equal(best[embedding], last[embedding])
    found = pretraining().objective
    found.load_state_dict(best)
    assert norm(found.policy) == pytest.approx(progress.best_loss)  # type: ignore[arg-type]


def test_the_best_of_nothing(pretraining: Callable[[], Job], tmp_path: Path) -> None:
    def unmeasured() -> Job:
        return replace(pretraining(), validate=None)

    with pytest.raises(UserError, match="this stage validates nothing"):
        run(unmeasured, tmp_path / "out")
    run(unmeasured, tmp_path / "out", keep_best=False)


def test_another_config_begins_anew(pretraining: Callable[[], Job], tmp_path: Path) -> None:
    run(pretraining, tmp_path / "out")
    work = WorkDirectory(tmp_path / "out", "mark")
    assert work.states()
    other = WorkDirectory(tmp_path / "out", "another mark")
    assert not other.states() and not other.metrics.exists()
    other.remove()
    assert WorkDirectory(tmp_path / "out", "mark").states(), "the run before it waits"


def test_a_full_disk_leaves_the_last_state(
    pretraining: Callable[[], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, logged, _ = run(pretraining, tmp_path / "whole", keep_best=False)
    save = torch.save

    def full(value: Any, stream: Any) -> None:
        if value["progress"]["step"] >= 8:
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, stream)

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(pretraining, tmp_path / "out", keep_best=False)
    work = WorkDirectory(tmp_path / "out", "mark")
    assert [load_tensors(p)["progress"]["step"] for p in work.states()] == [4, 0]
    assert not [p for p in work.path.iterdir() if p.name.endswith(".writing")]
    monkeypatch.undo()
    again, logged_again, _ = run(pretraining, tmp_path / "out", keep_best=False)
    assert logged_again == logged
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unreadable"])
def test_a_damaged_state_is_passed_over_with_a_warning(
    pretraining: Callable[[], Job],
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, logged, _ = run(pretraining, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path / "out", 10, ctrl_c)
    newest = WorkDirectory(tmp_path / "out", "mark").states()[0]
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        # The checksum is right, and still it is no state.
        content = bytearray(b"not a state")
        checksum_of(newest).write_text(hashlib.sha256(content).hexdigest(), encoding="utf-8")
    newest.write_bytes(content)
    again, logged_again, _ = run(pretraining, tmp_path / "out")
    shown = capsys.readouterr().out
    assert f"{newest} is damaged" in shown and "going on from step 8" in shown
    kept = [
        load_tensors(p)["progress"]["step"]
        for p in WorkDirectory(tmp_path / "out", "mark").states()
    ]
    assert kept == [11, 8], "the damaged one does not count"
    assert [p.name for p in newest.parent.glob("*.damaged")] == [f"{newest.name}.damaged"]
    assert logged_again == logged
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_without_a_whole_state_nothing_begins_again_by_itself(
    pretraining: Callable[[], Job], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path / "out", 10, ctrl_c)
    for path in WorkDirectory(tmp_path / "out", "mark").states():
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no saved state in .* is whole.*Delete that folder"):
            run(pretraining, tmp_path / "out")


def test_a_state_that_cannot_be_read_now_is_not_damaged(
    pretraining: Callable[[], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _, _ = run(pretraining, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path / "out", 10, ctrl_c)

    def gone(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("instar.training.state.hash_file", gone)
        with pytest.raises(OSError, match="Input/output error"):
            run(pretraining, tmp_path / "out")
    again, _, _ = run(pretraining, tmp_path / "out")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_damaged_best_weights_are_said_to_be(
    pretraining: Callable[[], Job], tmp_path: Path
) -> None:
    run(pretraining, tmp_path / "out")
    work = WorkDirectory(tmp_path / "out", "mark")
    work.best.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"best\.pt, are damaged.*Delete that file"):
        run(pretraining, tmp_path / "out")
    work.best.unlink()
    run(pretraining, tmp_path / "out")


def test_an_unfinished_run_outlives_a_change_of_settings(
    pretraining: Callable[[], Job], tmp_path: Path
) -> None:
    """Another value, or a slip of the pen, must not cost days of work."""
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path / "out", 10, ctrl_c)
    notes: list[str] = []
    states = [p.name for p in WorkDirectory(tmp_path / "out", "mark", notes.append).states()]
    assert not notes
    other = WorkDirectory(tmp_path / "out", "another", notes.append)
    assert not other.states() and "is kept in" in notes[0]
    again = WorkDirectory(tmp_path / "out", "mark", notes.append)
    assert [p.name for p in again.states()] == states and len(notes) == 1


def test_of_several_unfinished_runs_the_last_two_are_kept(tmp_path: Path) -> None:
    for mark, kept in (("a", False), ("b", False), ("a", True), ("c", False), ("b", False)):
        work = WorkDirectory(tmp_path / "out", mark)
        assert [load_tensors(path) for path in work.states()] == [mark] * kept
        save_tensors(work.path / "state-000002.pt", mark)
        assert len(list(tmp_path.iterdir())) <= 2


def test_what_a_finished_run_left_is_swept_away(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out", "mark")
    sweep(tmp_path / "out", "another")
    assert work.path.exists(), "somebody works there"
    sweep(tmp_path / "out", "mark")
    assert not work.path.exists()
    work.path.mkdir()
    (work.path / "state-000001.pt").write_bytes(b"much")
    sweep(tmp_path / "out", "another")
    assert not work.path.exists()


def test_a_state_whose_checksum_was_not_written_does_not_count(
    pretraining: Callable[[], Job], tmp_path: Path
) -> None:
    run(pretraining, tmp_path / "out")
    work = WorkDirectory(tmp_path / "out", "mark")
    newest, before = work.states()
    checksum_of(newest).unlink()
    assert work.states() == [before]


def test_saving_goes_on_beside_training(
    pretraining: Callable[[], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state of the moment that asked for it, not of the one that writes."""
    job, written = pretraining(), threading.Event()
    work = WorkDirectory(tmp_path / "out", "mark")
    optimizers = Optimizers(job.objective, OptimizerConfig())
    saver = Saver(work, Learner(job.objective), optimizers, job.source, Meter())
    save = torch.save

    def slow(value: Any, stream: Any) -> None:
        written.wait(10)
        save(value, stream)

    monkeypatch.setattr(state.torch, "save", slow)
    before = {k: v.clone() for k, v in job.objective.state_dict().items()}
    saver.save(Progress(step=1))
    with torch.no_grad():
        for p in job.objective.parameters():
            p.add_(1)
    assert not work.states()
    written.set()
    saver.wait()
    kept = load_tensors(work.states()[0])["objective"]
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())


class Poisoned(PackedSource):
    """Loses its mind at one step, as often as it is told: that many gradients are not finite."""

    def __init__(self, model: torch.nn.Module, at: int, times: int, tokens: np.ndarray) -> None:
        super().__init__(tokens, context=16, batch_size=6, micro_batch=6, seed=1)
        self.model, self.at, self.times = model, at, times

    def __next__(self) -> list[Batch]:
        if self.step == self.at and self.times:
            self.times -= 1
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return super().__next__()


@pytest.mark.parametrize(("times", "survives"), [(2, True), (9, False)])
def test_a_diverged_run_goes_back_at_a_lower_rate(
    make_model: Callable[..., Any],
    tokenizer: Tokenizer,
    tmp_path: Path,
    times: int,
    survives: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model()
    tokens = np.random.default_rng(0).integers(6, 262, 700).astype(np.uint16)
    job = Job(NextToken(model), Poisoned(model, 6, times, tokens), model, tokenizer, int)
    work = WorkDirectory(tmp_path / "out", "mark")
    settings = training(steps=40, validate_every=0, keep_best=False, rollbacks=3)
    with Display() as display:
        if not survives:
            with pytest.raises(UserError, match="going back 3 times did not help"):
                _train(job, settings, work, Stopwatch(), display)
            return
        progress = _train(job, settings, work, Stopwatch(), display)
    assert progress.rollbacks == 2 and progress.step == 40
    assert progress.skipped == 40, "twenty, twice: what was given up is counted"
    assert norm(model) < float("inf")
    shown = capsys.readouterr().out
    assert "diverged at step 26: back to step 4, at 0.5 times the learning rate" in shown
    assert "at 0.25 times" in shown
    logged = [json.loads(line) for line in work.metrics.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in logged] == [*range(3, 40, 3), 40], "each step once"


def test_a_signal_during_a_divergence_saves_no_poison(
    make_model: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make_model()
    tokens = np.random.default_rng(0).integers(6, 262, 700).astype(np.uint16)

    class Stopped(Poisoned):
        def __next__(self) -> list[Batch]:
            if self.step == 10:
                terminate()
            return super().__next__()

    job = Job(NextToken(model), Stopped(model, 6, 1, tokens), model, tokenizer, int)
    work = WorkDirectory(tmp_path / "out", "mark")
    settings = training(steps=40, validate_every=0, keep_best=False)
    with Display() as display, pytest.raises(Interrupted):
        _train(job, settings, work, Stopwatch(), display)
    assert [load_tensors(path)["progress"]["step"] for path in work.states()] == [4, 0]


def test_a_write_that_failed_is_tried_again_at_once(
    pretraining: Callable[[], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full for a moment: nothing but one state is lost."""
    save, broken = torch.save, [True]

    def full_once(value: Any, stream: Any) -> None:
        if value["progress"]["step"] == 4 and broken:
            broken.clear()
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, stream)

    weights, logged, _ = run(pretraining, tmp_path / "whole", keep_best=False)
    monkeypatch.setattr(state.torch, "save", full_once)
    again, logged_again, _ = run(pretraining, tmp_path / "out", keep_best=False)
    states = WorkDirectory(tmp_path / "out", "mark").states()
    assert [load_tensors(path)["progress"]["step"] for path in states] == [11, 8]
    assert logged_again == logged
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_the_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught, Interruptible() as interrupt:
        interrupt.check()
        ctrl_c()
        assert interrupt.asked, "the first one is remembered"
        ctrl_c()
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before
