"""Where a step's time goes, on the smallest stages there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from instar import profile
from instar.data.sources import PackedSource
from instar.errors import UserError
from instar.model import layers
from instar.objectives import language
from instar.stages.registry import STAGES
from instar.training import loop
from instar.training.loop import TrainingConfig


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "product_flops", lambda *_: 1e11)


def write(values: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{values['stage']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def pretrain(values: dict[str, dict[str, Any]], tmp_path: Path) -> Path:
    return write(values["pretrain"], tmp_path)


def test_a_stage_is_taken_apart(
    pretrain: Path, life: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    before = (layers.attend, language.token_logprobs)
    assert profile.main([str(pretrain), "--measure", "2", "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    for part in ("matrix products", "attention", "cross-entropy", "optimizer", "data"):
        assert part in shown
    assert "sampling" not in shown and "of the 100 that matrix products reach" in " ".join(
        shown.split()
    )
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert not (life / "pretrain").exists(), "nothing is saved"
    assert (layers.attend, language.token_logprobs) == before, "nothing stays marked"


def test_parts_add_up_to_a_step(pretrain: Path) -> None:
    config = profile.read_stage(pretrain, [])
    build = STAGES["pretrain"].build
    assert build is not None
    found = profile.measure(build(config), config.training, warm=1, steps=3)
    assert sum(found.seconds.values()) == pytest.approx(found.step_s, rel=0.05)
    assert found.seconds["attention"] > 0 and found.flops > 0


@pytest.mark.parametrize("answer", [True, False])
def test_it_is_compiled_where_the_whole_run_is(
    pretrain: Path, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    """Asked of the recipe's steps and its own source, and once: not of the few that are run."""
    asked: list[tuple[Any, ...]] = []
    ran: list[tuple[str, int]] = []
    told: list[str] = []

    def compiles(choice: str, objective: Any, source: Any, steps: int) -> bool:
        asked.append((choice, type(source), steps))
        return answer

    def fit(learner: Any, source: Any, optimizers: Any, config: TrainingConfig, *rest: Any) -> None:
        ran.append((config.compile, config.steps))
        arithmetic = config.model_copy(update={"compile": "off"})  # a minute, else
        loop.fit(learner, source, optimizers, arithmetic, *rest)

    monkeypatch.setattr(profile, "compiles", compiles)
    monkeypatch.setattr(profile, "fit", fit)
    config = profile.read_stage(pretrain, ["--steps", "9000"])
    build = STAGES["pretrain"].build
    assert build is not None
    found = profile.measure(build(config), config.training, 0, 2, note=told.append)
    assert asked == [("auto", PackedSource, 9000)]
    assert ran == ([("on", 1), ("on", 3)] if answer else [("off", 2)])
    assert found.compiled == answer == bool(told)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_code_is_taken_apart(
    values: dict[str, dict[str, Any]], life: Path, tmp_path: Path
) -> None:
    """In a process of its own: the shape checks of the others are not compiled."""
    wide = values["pretrain"]["model"] | {"max_position_embeddings": 256}
    recipe = write(values["pretrain"] | {"model": wide, "context": 256}, tmp_path)
    command = [sys.executable, "-m", "instar", "profile", str(recipe), "--compile", "on"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    shares = dict(re.findall(r"│ ([\w -]+?) +│ +[\d.,]+ │ +([\d.]+)%", ended.stdout))
    assert "The blocks are compiled" in " ".join(ended.stdout.split())
    for part in ("matrix products", "attention", "cross-entropy", "element-wise", "optimizer"):
        assert float(shares[part]) > 1, ended.stdout
    # Nothing is compiled anew while it is watched: that would be nearly all of the time.
    assert float(shares["other"]) < 50, ended.stdout


def test_a_kernel_counts_once() -> None:
    """The profiler lists it by itself, and as time of the operation that started it."""
    operation = FunctionEvent(1, "aten::mm", 0, 0, 10, use_device="cuda")
    operation.append_kernel("gemm", 0, 7)
    kernel = FunctionEvent(1, "gemm", 0, 2, 9, device_type=DeviceType.CUDA, use_device="cuda")
    spent = profile.by_category([operation, kernel], on_device=True)
    assert spent == {"matrix products": pytest.approx(7e-6)}


def test_backward_counts_where_its_forward_did() -> None:
    """A product in a marked region, and its two products backward, which no mark surrounds."""
    a, b = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("instar::attention"):
            inside = a @ b
        outside = (inside @ b).sum()
        outside.backward()
    regions: dict[int, str] = {}
    events = profiler.events()
    assert events is not None
    spent = profile.by_category(events, on_device=False)
    assert spent["attention"] > 0 and spent["matrix products"] > 0
    for event in events:
        region = profile._region(event)
        if region and event.sequence_nr >= 0:
            regions.setdefault(event.sequence_nr, region)
    products = [profile.category(e, regions) for e in events if e.name == "aten::mm"]
    # One forward and two backward of each of the two products.
    assert sorted(products) == ["attention"] * 3 + ["matrix products"] * 3


def test_only_stages_that_train_have_steps(tmp_path: Path) -> None:
    path = write({"stage": "tokenizer"}, tmp_path)
    with pytest.raises(UserError, match="'tokenizer' has no steps"):
        profile.main([str(path)])


def test_a_stage_s_own_options_are_taken(pretrain: Path) -> None:
    config = profile.read_stage(pretrain, ["--batch-size", "2", "--optimizer.lr", "0.5"])
    assert config.training.optimizer.lr == 0.5 and config.batch_size == 2  # type: ignore[attr-defined]
