"""The plan of a whole life, before and after there is data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from instar import plan as verb
from instar.adapters.lora import LoRAConfig
from instar.errors import UserError
from instar.grow import read_stage
from instar.model.config import ModelConfig
from instar.planning import hardware
from instar.planning.hardware import Hardware
from instar.planning.workload import Workload
from instar.recipes import find
from instar.stages.keeping import KeepConfig
from instar.stages.registry import STAGES

TRAINED = ["pretrain", "sft", "reward", "dpo", "ppo", "rlvr"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are measured elsewhere."""
    monkeypatch.setattr(hardware, "product_flops", lambda *_: 1e11)


def smoke(run: Path) -> dict:
    folder = find("smoke")
    return {
        name: read_stage(folder / f"{name}.yaml", run) for name in ("data", "tokenizer", *TRAINED)
    }


def test_every_stage_that_trains_says_what_it_needs() -> None:
    assert [name for name, stage in STAGES.items() if stage.needs] == TRAINED
    assert all((stage.needs is None) == (stage.build is None) for stage in STAGES.values())


@pytest.mark.parametrize(
    ("name", "count", "told"),
    [
        ("NVIDIA H100 80GB HBM3", 8, "8xH100"),
        ("NVIDIA GeForce RTX 4090", 1, "4090"),
        ("NVIDIA A100-SXM4-80GB", 1, "A100"),
        ("Tesla T4", 1, "|".join(hardware.ACCELERATORS)),
    ],
)
def test_who_plans_for_the_processor_is_told_how_to_plan_for_the_gpu(
    name: str,
    count: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verb, "plan", lambda *_: {})
    cuda = {"is_available": True, "get_device_name": name, "device_count": count}
    for function, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, function, lambda answer=answer: answer)
    assert verb.main(["smoke", "--json"]) == 0
    assert capsys.readouterr().err.endswith(f"for the GPU add --hardware {told}\n")
    assert verb.main(["smoke", "--json", "--hardware", "H100"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verb.main(["smoke", "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_an_accelerator_is_planned_without_any_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nothing"
    assert verb.main(["smoke", "--hardware", "2xH100", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not out.exists(), "planning writes nothing"
    assert list(found["stages"]) == TRAINED
    assert found["hardware"]["devices"] == 2
    for stage in found["stages"].values():
        assert set(stage["predictions"]) == {"ddp", "zero2", "zero3"}
        for prediction in stage["predictions"].values():
            assert prediction["wall_s"] == pytest.approx(sum(prediction["seconds"].values()))
            assert prediction["memory_bytes"] > 1e9
    pretrain = found["stages"]["pretrain"]
    assert pretrain["tokens"] == 60 * 8 * 128


def test_this_machine_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.main(["smoke", "--out", str(tmp_path / "nothing"), "--stage", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "dpo" in shown and "pretrain" not in shown.split("Rules")[0]
    assert "28 bytes a parameter" in shown


def test_what_is_there_is_looked_at(life: Path) -> None:
    """The rows of a life's own files, every one of them where they are few."""
    with verb.surveyed(smoke(life), on_cpu=True) as survey:
        assert survey.run == life
        needs = STAGES["sft"].needs
        assert needs is not None
        survey.models[Path("{run}/pretrain")] = (
            STAGES["pretrain"]
            .needs(  # type: ignore[misc]
                smoke(life)["pretrain"], survey
            )
            .model
        )
        work = needs(smoke(life)["sft"].model_copy(update={"replay": []}), survey)
    # Twelve conversations and no more: one step is all of them.
    assert {sum(e.rows for e in step) for step in work.steps} == {12}


def test_unknown_stages_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stage 'sfft'"):
        verb.main(["smoke", "--hardware", "H100", "--stage", "sfft"])


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(hardware.ACCELERATORS["H100"], memory_bytes=1e9)
    assert isinstance(small, Hardware)
    plans = verb.plan(smoke(tmp_path), small, ["dpo"])
    verb.show(plans, small, {}, Console(width=200))
    row = next(line for line in capsys.readouterr().out.splitlines() if "dpo" in line)
    assert " no " in row


def test_a_start_is_held_in_copies(life: Path) -> None:
    """What ``keep`` asks for: a frozen start, and what the ties keep of it."""

    def work(on_cpu: bool, **keep: float) -> Workload:
        config = smoke(life)["sft"].model_copy(update={"keep": KeepConfig(**keep)})
        plain = Workload(ModelConfig(), config.training, [])
        return config.keep.needs(plain, on_cpu)

    assert (work(True).frozen, work(True).ties) == (0, 0)
    assert work(True, l2_sp=0.1).ties == 2
    assert work(True, ewc=0.1).ties == 3
    assert work(False, kl=0.1).frozen == 1
    # A start that the product alone is averaged with stays where it was read: on the processor.
    assert [work(on_cpu, interpolate=0.5).frozen for on_cpu in (True, False)] == [1, 0]
    assert work(True, interpolate=0.5, kl=0.1).frozen == 1, "the same start"
    assert work(True, interpolate=0.5).readings == 0


def test_an_adapter_goes_on_learning_in_later_stages(tmp_path: Path) -> None:
    configs = smoke(tmp_path)
    configs["sft"] = configs["sft"].model_copy(update={"adapter": LoRAConfig(rank=2)})
    plans = verb.plan(configs, hardware.ACCELERATORS["H100"])
    learnt = {name: one.work.weights.learnt for name, one in plans.items()}
    whole = plans["pretrain"].work.model.parameters()
    assert learnt["pretrain"] == whole
    assert learnt["sft"] == learnt["dpo"] == learnt["rlvr"] < whole / 10
    memory = {name: one.alone["ddp"].memory for name, one in plans.items()}
    assert memory["sft"]["gradients"] == 4 * learnt["sft"]
    # The reference is the base, which it shares, and a copy of the adapter.
    assert memory["dpo"]["weights"] - memory["sft"]["weights"] == 4 * learnt["dpo"]


def test_an_adapted_stage_is_tried_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = smoke(tmp_path)
    configs["dpo"] = configs["dpo"].model_copy(
        update={"adapter": LoRAConfig(rank=2, start="pissa"), "quantize": "nf4"}
    )
    found = verb.plan(configs, hardware.this_machine(), ["dpo"])["dpo"]
    assert found.work.weights.packed_bytes > 0
    assert found.alone["ddp"].seconds["learning"] > 0
    verb.show({"dpo": found}, hardware.ACCELERATORS["H100"], {}, Console(width=200))
    assert "frozen weights" in capsys.readouterr().out
