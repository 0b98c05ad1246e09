"""A run that is stopped anywhere and started again ends as if it had never been stopped."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instar.data.sources import PackedSource
from instar.errors import UserError
from instar.generation import Engine
from instar.lineage import Stopwatch
from instar.model import ScoreModel
from instar.objectives.clipped import ActorCritic
from instar.objectives.language import NextToken
from instar.rollout.judges import Preferred
from instar.rollout.source import RolloutConfig, RolloutSource
from instar.stages.base import Job, _train
from instar.tokenizer.hf import Tokenizer
from instar.training import state
from instar.training.display import Display
from instar.training.interrupt import Interrupted, Interruptible
from instar.training.loop import TrainingConfig
from instar.training.optimizer import OptimizerConfig
from instar.training.schedule import ScheduleConfig
from instar.training.state import WorkDirectory

TIMES = ("elapsed_s", "tokens_per_s")


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
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], Any]:
    """One sitting; ``stop`` is called when step ``stop_at`` draws its batches."""
    job = build()
    if stop:
        draw, drawn = job.source, iter(range(1, 1000))
        already = 0 if not WorkDirectory(out, "mark").state.exists() else None
        assert already == 0, "only a first sitting is stopped"

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
    lines = work.metrics.read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in logged]
    return job.objective.state_dict(), kept, progress


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("stop_at", [1, 5, 6, 11])
@pytest.mark.parametrize(("stop", "raised"), [(ctrl_c, Interrupted), (kill, Killed)])
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
    saved = WorkDirectory(tmp_path / "out", "mark").state
    if raised is Interrupted:
        at = torch.load(saved, weights_only=True)["progress"]["step"]
        assert at == stop_at, "the step under way comes to its end and is saved"
    else:
        assert saved.exists() == (stop_at > 4)
    again, logged_again, done_again = run(build, tmp_path / "out")
    assert logged_again == logged
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    for field in ("step", "tokens", "best_loss", "worse", "skipped", "finished"):
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
    assert work.state.exists()
    other = WorkDirectory(tmp_path / "out", "another mark")
    assert not other.state.exists() and not other.metrics.exists()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_last_state(
    pretraining: Callable[[], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, logged, _ = run(pretraining, tmp_path / "whole", keep_best=False)
    save = torch.save

    def full(value: Any, stream: Any) -> None:
        if value["progress"]["step"] == 8:
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, stream)

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(pretraining, tmp_path / "out", keep_best=False)
    work = WorkDirectory(tmp_path / "out", "mark")
    assert sorted(p.name for p in work.path.iterdir()) == [
        "fingerprint.json",
        "metrics.jsonl",
        "state.pt",
    ]
    assert torch.load(work.state, weights_only=True)["progress"]["step"] == 4
    monkeypatch.undo()
    again, logged_again, _ = run(pretraining, tmp_path / "out", keep_best=False)
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
