"""Several processes learn what one learns, and survive what one survives."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from instar.data.readers import write_jsonl
from instar.files import read_json
from instar.lineage import LINEAGE
from instar.stages import verb
from instar.tokenizer.hf import save_tokenizer

STEPS = 50
STAGES = ["pretrain", "sft", "reward", "dpo", "ppo", "rlvr"]
"""Each after those that it builds on."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Life:
    """A tiny life's directory, and runs of its stages by any number of processes."""

    def __init__(self, directory: Path) -> None:
        self.run = directory
        save_tokenizer(directory / "tokenizer", [], 96)
        data = directory / "data"
        data.mkdir()
        replies = ["yes.", "no, never.", "maybe, we shall see."]
        questions = [f"Is {i} even?" for i in range(40)]
        talks = [
            {"messages": [user(q), {"role": "assistant", "content": replies[i % 3]}]}
            for i, q in enumerate(questions)
        ]
        pairs = [
            {"messages": [user(q)], "chosen": "yes.", "rejected": replies[1 + i % 2]}
            for i, q in enumerate(questions)
        ]
        files: dict[str, list[dict[str, Any]]] = {
            "readings": [{"text": f"{q} {replies[i % 3]} " * 3} for i, q in enumerate(questions)],
            "readings_valid": [{"text": "春眠不觉晓", "language": "zh"}, {"text": "Is it?"}],
            "conversations": talks,
            "conversations_valid": talks[:3],
            "preferences": pairs,
            "preferences_valid": pairs[:3],
            "prompts": [{"messages": [user(q)]} for q in questions],
            "tasks": [
                {"messages": [user(q)], "verifier": "answer", "answer": "yes"} for q in questions
            ],
        }
        for name, records in files.items():
            write_jsonl(data / f"{name}.jsonl", records)

    def recipe(self, stage: str, steps: int, **training: Any) -> Path:
        """A stage's file, made anew; products in float32, or ranks could not be compared."""
        shape = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 96,
        }
        rollout = {"prompts": 6, "samples": 2, "max_new_tokens": 6, "micro_batch": 2}
        own: dict[str, dict[str, Any]] = {
            "pretrain": {"model": shape, "context": 16, "batch_size": 6, "micro_batch": 2},
            "sft": {"batch_size": 6, "micro_tokens": 100},
            "reward": {"batch_size": 6, "micro_tokens": 100, "form": "prior"},
            "dpo": {"batch_size": 6, "micro_tokens": 100},
            "ppo": {"rollout": rollout | {"epochs": 2, "minibatches": 2}},
            "rlvr": {"rollout": rollout, "init": str(self.run / "sft")},
        }
        settings = {"steps": steps, "log_every": 1, "precision": "float32"} | training
        settings.setdefault("optimizer", {"name": "adamw", "lr": 1e-3})
        values = {"stage": stage, "run": str(self.run), "training": settings} | own[stage]
        path = self.run / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def alone(self, stage: str, steps: int, out: str | None = None, **training: Any) -> Path:
        """Run a stage in this process; returns the directory that it wrote."""
        path = self.run / (out or stage)
        recipe = self.recipe(stage, steps, **training)
        assert verb.main(stage, [str(recipe), "--out", str(path)]) == 0
        return path

    def launch(
        self, stage: str, ranks: int, steps: int, out: str, nodes: int = 1, **training: Any
    ) -> list[subprocess.Popen[str]]:
        """Start a stage as ``torchrun`` would, one process a rank."""
        recipe = self.recipe(stage, steps, **training)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks // nodes),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "instar", stage, str(recipe), "--out", str(self.run / out)]
        return [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def together(self, stage: str, ranks: int, steps: int, out: str, **training: Any) -> Path:
        """Run a stage with some processes; returns the directory that they wrote."""
        for process in self.launch(stage, ranks, steps, out, **training):
            said, wrong = process.communicate(timeout=300)
            assert process.returncode == 0, said + wrong
        return self.run / out


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# A run's padding, and the critic's score, depend on how its steps were cut.
CUT = {"tokens", "explained_variance"}


def largest_difference(one: Path, other: Path, names: tuple[str, ...] = ()) -> float:
    """Between figures of two runs, relative to their size (or to 1e-2, if that is larger)."""
    worst = 0.0
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.keys() == b.keys()
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for name in a.keys() & set(names) if names else a.keys() - {"split"} - CUT:
            worst = max(worst, abs(a[name] - b[name]) / max(abs(a[name]), 1e-2))
    return worst


@pytest.fixture
def life(tmp_path: Path) -> Life:
    return Life(tmp_path)


@pytest.fixture
def grown(life: Life) -> Life:
    """A life in which the stages that others build on are done."""
    life.alone("pretrain", 10)
    life.alone("sft", 80, optimizer={"name": "adamw", "lr": 1e-2})  # until some replies end
    life.alone("reward", 4)
    return life


def states(out: Path) -> int:
    """How many states a run has written so far."""
    found = out.with_name(f".{out.name}.work").glob("state-*.pt.sha256")
    return max((int(path.name[6:12]) for path in found), default=0)


def wait_for_state(out: Path, number: int, processes: list[subprocess.Popen[str]]) -> None:
    """Until a run has written its ``number``-th state."""
    while states(out) < number:
        assert all(process.poll() is None for process in processes), "too late"
        time.sleep(0.005)


@pytest.mark.parametrize(("stage", "parallel"), [("pretrain", "zero3"), ("rlvr", "ddp")])
def test_two_ranks_learn_what_one_learns(grown: Life, stage: str, parallel: str) -> None:
    one = grown.alone(stage, 4, "one")
    two = grown.together(stage, 2, 4, "two", parallel=parallel)
    assert read_json(two / LINEAGE)["processes"] == 2
    assert largest_difference(one, two) < 1e-5


@pytest.mark.parametrize(
    ("parallel", "ties"), [("ddp", {"l2_sp": 3.0, "ewc": 2.0}), ("zero3", {})], ids=["ddp", "zero3"]
)
def test_two_ranks_are_held_as_one_is(grown: Life, parallel: str, ties: dict[str, float]) -> None:
    """Penalties have weight one, and the average is the same, whoever computes them."""
    recipe = grown.recipe("sft", 4, ema=0.5, parallel=parallel)
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["keep"] = {"kl": 0.5, "interpolate": 0.5} | ties
    values |= {"replay": ["{run}/data/readings.jsonl"], "init": str(grown.run / "sft")}
    held = grown.run / "held.yaml"
    held.write_text(yaml.safe_dump(values), encoding="utf-8")
    grown.recipe = lambda *_, **__: held  # type: ignore[method-assign]
    one, two = grown.alone("sft", 4, "one"), grown.together("sft", 2, 4, "two")
    assert largest_difference(one, two) < 1e-5
    first, second = (load_file(out / "model.safetensors") for out in (one, two))
    for name, weight in first.items():
        assert torch.allclose(weight, second[name], atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_over_fifty_steps(grown: Life, stage: str) -> None:
    one = grown.alone(stage, STEPS, "one")
    losses = [row["loss"] for row in metrics(one)]
    assert len(losses) >= STEPS
    # The loss of RLVR's only update is zero but for rounding; its gradient is not.
    assert len(set(losses)) > STEPS // 2 or stage == "rlvr"
    for ranks in (2, 4):
        for parallel in ("ddp", "zero2", "zero3"):
            many = grown.together(stage, ranks, STEPS, f"{parallel}-{ranks}", parallel=parallel)
            worst = largest_difference(one, many, ("loss", "reward"))
            print(f"{stage} {parallel} {ranks} ranks: {worst:.1e}")
            assert worst < 1e-5, (parallel, ranks)
    nodes = grown.together(stage, 4, STEPS, "hsdp", nodes=2, parallel="hsdp")
    assert largest_difference(one, nodes, ("loss", "reward")) < 1e-5


@pytest.mark.slow
def test_muon_on_shards(life: Life) -> None:
    optimizer = {"name": "muon", "lr": 1e-3, "muon_lr": 1e-3}
    one = life.alone("pretrain", 10, "one", optimizer=optimizer)
    many = life.together("pretrain", 4, 10, "many", optimizer=optimizer, parallel="zero3")
    # It multiplies in bfloat16 where that is fast, and so rounds a thousand times coarser.
    assert largest_difference(one, many, ("loss",)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_resumed_on_another_number_of_ranks(grown: Life, stage: str) -> None:
    settings = {"save_every": 5, "parallel": "zero3"}
    one = grown.alone(stage, STEPS, "one", **settings)
    out = grown.run / "changing"
    for ranks, number in ((2, 4), (1, 7)):
        processes = grown.launch(stage, ranks, STEPS, "changing", **settings)
        wait_for_state(out, number, processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        assert not out.exists()
    grown.together(stage, 2, STEPS, "changing", **settings)
    assert largest_difference(one, out, ("loss", "reward")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies(life: Life, dies: int) -> None:
    settings = {"save_every": 5}
    one = life.alone("pretrain", STEPS, "one", **settings)
    out = life.run / "two"
    processes = life.launch("pretrain", 2, STEPS, "two", **settings)
    wait_for_state(out, 4, processes)
    processes[dies].kill()
    _, wrong = processes[1 - dies].communicate(timeout=60)
    assert processes[1 - dies].returncode == 2
    assert "another process of this run has ended" in wrong
    assert "run the same command again" in wrong
    assert "Traceback" not in wrong
    processes[dies].communicate()
    assert states(out) >= 4
    life.together("pretrain", 2, STEPS, "two", **settings)
    assert largest_difference(one, out, ("loss",)) < 1e-5


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(life: Life) -> None:
    settings = {"save_every": 5}
    one = life.alone("pretrain", STEPS, "one", **settings)
    out = life.run / "two"
    processes = life.launch("pretrain", 2, STEPS, "two", **settings)
    wait_for_state(out, 3, processes)
    processes[1].terminate()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 143
    life.together("pretrain", 2, STEPS, "two", **settings)
    assert largest_difference(one, out, ("loss",)) < 1e-5


@pytest.mark.slow
def test_the_best_weights_are_kept(grown: Life) -> None:
    settings: dict[str, Any] = {"validate_every": 1, "keep_best": True, "patience": 1}
    settings["optimizer"] = {"name": "adamw", "lr": 0.05}
    one = grown.alone("sft", 30, "one", **settings)
    many = grown.together("sft", 2, 30, "many", parallel="zero3", **settings)
    assert max(row["step"] for row in metrics(one)) < 30, "it stops early"
    assert largest_difference(one, many, ("loss",)) < 1e-5
    kept = [load_file(out / "model.safetensors") for out in (one, many)]
    for name, weight in kept[0].items():
        torch.testing.assert_close(kept[1][name], weight, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_shards_in_bfloat16(life: Life) -> None:
    settings = {"precision": "bfloat16", "validate_every": 5, "activation_checkpointing": True}
    one = life.alone("pretrain", 20, "one", **settings)
    many = life.together("pretrain", 2, 20, "many", parallel="zero3", **settings)
    assert largest_difference(one, many, ("loss",)) < 1e-2


@pytest.mark.slow
def test_a_disk_that_is_full_on_rank_0_ends_all(life: Life) -> None:
    processes = life.launch("pretrain", 2, STEPS, "two", save_every=1)
    wait_for_state(life.run / "two", 2, processes)
    # No file may grow any longer: the next state cannot be written.
    resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (0, 0))
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "File too large" in said[0] and "Traceback" not in said[0] + said[1]
    one = life.alone("pretrain", STEPS, "one")
    two = life.together("pretrain", 2, STEPS, "two", save_every=1)
    assert largest_difference(one, two, ("loss",)) < 1e-5


@pytest.mark.slow
def test_what_is_wrong_is_said_once(life: Life) -> None:
    (life.run / "data" / "readings.jsonl").unlink()
    said = [p.communicate(timeout=60)[1] for p in life.launch("pretrain", 2, 4, "two")]
    assert sum("no such file" in text for text in said) == 1
    assert not any("Traceback" in text or "another process" in text for text in said)


@pytest.mark.slow
def test_fewer_rows_than_ranks(life: Life) -> None:
    processes = life.launch("pretrain", 8, 4, "eight")
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 2 for process in processes)
    assert "there are 8 processes" in said[0]
