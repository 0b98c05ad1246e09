"""Trackers are asked in their own words; the real packages are not dependencies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from instar.errors import UserError
from instar.stages import verb
from instar.training.track import TrackedRun, open_tracker

VALUES = {"loss": 2.0, "lr": 0.1}


class Heard:
    """Stands for a tracker's module, and remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return SimpleNamespace(info=SimpleNamespace(run_id=f"{len(self.calls)} in MLflow"))

        return call

    def called(self, name: str) -> list[Any]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def test_wandb_may_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setitem(sys.modules, "wandb", heard)
    tracker = open_tracker("wandb", TrackedRun("mini/sft", tmp_path, {"lr": 1}))
    for step in (3, 2):
        tracker.log({"train/loss": 2.0}, step)
    tracker.close()
    assert heard.called("init")[0][1]["dir"] == str(tmp_path)
    # A step of wandb's own would have to grow: its real client drops rows that go back.
    assert (("*",), {"step_metric": "step"}) in heard.called("define_metric")
    assert heard.called("log") == [(({"train/loss": 2.0, "step": s},), {}) for s in (3, 2)]
    assert heard.calls[-1][0] == "finish"


@pytest.mark.parametrize("package", ["trackio", "swanlab"])
def test_those_that_speak_as_wandb_does(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.setitem(sys.modules, package, heard)
    tracker = open_tracker(package, TrackedRun("mini/sft", tmp_path, {"lr": 1}))  # type: ignore[arg-type]
    tracker.log({"train/loss": 2.0}, 3)
    tracker.close()
    assert [name for name, _, _ in heard.calls] == ["init", "log", "finish"]
    told = heard.calls[0][2]
    assert told["project"] == "instar" and told["config"] == {"lr": 1}
    assert any(str(value).startswith("mini/sft") for value in told.values())
    assert heard.called("log") == [(({"train/loss": 2.0},), {"step": 3})]


@pytest.mark.parametrize("server", [True, False])
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: bool) -> None:
    heard = Heard()
    heard.is_tracking_uri_set = lambda: server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", heard)
    tracker = open_tracker("mlflow", TrackedRun("mini/sft", tmp_path, {"a": {"lr": 1}, "seed": 0}))
    tracker.log({"train/loss": 2.0}, 3)
    tracker.close()
    here = [((f"sqlite:///{tmp_path}/mlflow.db",), {})]
    assert heard.called("set_tracking_uri") == ([] if server else here)
    assert heard.called("start_run") == [((), {"run_name": "mini/sft"})]
    assert heard.called("log_params") == [(({"a.lr": 1, "seed": 0},), {})]
    row = (({"train/loss": 2.0},), {"step": 3, "synchronous": False})
    assert heard.called("log_metrics") == [row]
    assert [name for name, _, _ in heard.calls][-2:] == ["flush_async_logging", "end_run"]


def test_tensorboard_forgets_steps_that_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another sitting, and a run that diverged and went back."""
    heard = Heard()
    module = SimpleNamespace(
        SummaryWriter=lambda place, purge_step: heard.opened(place, purge_step) and heard
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for steps in ([3, 4], [4, 5, 4]):
        tracker = open_tracker("tensorboard", TrackedRun("mini/sft", tmp_path, {}))
        for step in steps:
            tracker.log({"train/loss": 2.0, "train/lr": 0.1}, step)
        tracker.close()
    place = str(tmp_path / "tensorboard" / "mini" / "sft")
    assert heard.called("opened") == [((place, step), {}) for step in (3, 4, 4)]
    rows = [((f"train/{k}", v, s), {}) for s in (3, 4, 4, 5, 4) for k, v in VALUES.items()]
    assert heard.called("add_scalar") == rows
    assert len(heard.called("close")) == 3


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_a_sitting_goes_on_under_the_id_of_the_one_before(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.setitem(sys.modules, package, heard)
    works = [tmp_path / ".sft.work", tmp_path / ".dpo.work"]
    for work in works:
        work.mkdir()
        for _ in range(2):
            open_tracker(package, TrackedRun("mini/sft", tmp_path, {}, work)).close()
    told = [kwargs for _, kwargs in heard.called("init")]
    assert all(kwargs["resume"] == "allow" for kwargs in told)
    first, second, third, fourth = (kwargs["id"] for kwargs in told)
    assert first == second != third == fourth


def test_trackio_goes_on_with_its_own_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows runs by their names: a new one of an old name must not go on in the old one."""
    heard = Heard()
    monkeypatch.setitem(sys.modules, "trackio", heard)
    for work in (tmp_path, tmp_path, None):
        open_tracker("trackio", TrackedRun("mini/sft", tmp_path, {}, work)).close()
    first, again, other = (kwargs["name"] for _, kwargs in heard.called("init"))
    assert first == again != other and other.startswith("mini/sft")


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setitem(sys.modules, "mlflow", heard)
    for lr in (1, 1):
        open_tracker("mlflow", TrackedRun("mini/sft", tmp_path, {"lr": lr}, tmp_path)).close()
    (_, begun), (_, resumed) = heard.called("start_run")
    assert begun == {"run_name": "mini/sft"}
    assert resumed["run_id"].endswith("in MLflow")
    assert len(heard.called("log_params")) == 1, "it lets nobody change them"


def test_a_tracked_run_that_is_gone_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    monkeypatch.setitem(sys.modules, "mlflow", heard)
    open_tracker("mlflow", TrackedRun("mini/sft", tmp_path, {}, tmp_path)).close()
    begin = heard.start_run

    def forgotten(**told: Any) -> Any:
        if "run_id" in told:
            raise LookupError("no such run")
        return begin(**told)

    heard.start_run = forgotten  # type: ignore[attr-defined]
    open_tracker("mlflow", TrackedRun("mini/sft", tmp_path, {}, tmp_path)).close()
    assert "mlflow cannot go on with the run (no such run)" in capsys.readouterr().err
    assert len(heard.called("start_run")) == 2


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed\. pip install wandb"):
        open_tracker("wandb", TrackedRun("mini/sft", tmp_path, {}))


def test_one_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody answers")

    heard = Heard()
    heard.log = unreachable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", heard)
    tracker = open_tracker("wandb", TrackedRun("mini/sft", tmp_path, {}))
    tracker.log({"train/loss": 2.0}, 3)
    tracker.log({"train/loss": 2.0}, 4)
    tracker.close()
    assert capsys.readouterr().err.count("wandb failed and is left out") == 1


def test_a_stage_shows_its_rows_and_closes_what_it_opened(
    values: dict[str, dict[str, Any]], life: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.setitem(sys.modules, "wandb", heard)
    recipe = tmp_path / "pretrain.yaml"
    recipe.write_text(yaml.safe_dump(values["pretrain"]), encoding="utf-8")
    verb.main("pretrain", [str(recipe), "--track", "wandb"])
    assert heard.called("init")[0][1]["name"] == f"{life.name}/pretrain"
    rows = (life / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [json.loads(row)["loss"] for row in rows if json.loads(row)["split"] == "train"]
    shown = [args[0]["train/loss"] for args, _ in heard.called("log") if "train/loss" in args[0]]
    assert shown == expected and len(shown) == 2
    assert heard.calls[-1][0] == "finish"
