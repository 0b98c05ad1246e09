"""Every stage, killed without warning at random moments, ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from instar.stages import verb

KILLS = 20
ANCESTORS = {
    "pretrain": [],
    "sft": ["pretrain"],
    "reward": ["pretrain", "sft"],
    "dpo": ["pretrain", "sft"],
    "ppo": ["pretrain", "sft", "reward"],
    "rlvr": ["pretrain", "sft", "dpo"],
}


def outcome(directory: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was killed."""
    return {
        name: (directory / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")
    }


def saved(out: Path) -> bool:
    """Whether there is a state to go on from."""
    return any(out.with_name(f".{out.name}.work").glob("*.sha256"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo", "ppo", "rlvr"])
def test_killed_at_random_moments(
    name: str, values: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Processes that begin with everything imported: a kill then falls into the work itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["instar.stages.registry", "instar.stages.verb"])
    life = Path(values[name]["run"])

    def process(out: Path, stage: str = name) -> Any:
        training: dict[str, Any] = {"steps": 40, "log_every": 1, "save_every": 3}
        if stage not in ("ppo", "rlvr"):
            training |= {"validate_every": 2, "keep_best": True}
        training["optimizer"] = {"name": "muon" if stage == "pretrain" else "adamw", "lr": 0.01}
        recipe = tmp_path / f"{stage}.yaml"
        recipe.write_text(yaml.safe_dump(values[stage] | {"training": training}), encoding="utf-8")
        return context.Process(target=verb.main, args=(stage, [str(recipe), "--out", str(out)]))

    def finish(out: Path, stage: str = name) -> None:
        last = process(out, stage)
        last.start()
        last.join()
        assert last.exitcode == 0

    for parent in ANCESTORS[name]:
        finish(life / parent, parent)
    finish(tmp_path / "warm")  # what is imported late is imported now
    began = time.perf_counter()
    finish(tmp_path / "whole")
    lasts = time.perf_counter() - began
    expected, rng, landed = outcome(tmp_path / "whole"), random.Random(name), 0
    for number in range(KILLS):
        out = tmp_path / f"killed-{number}"
        victim = process(out)
        victim.start()
        if number % 2:
            victim.join(rng.uniform(0.0, lasts))
        else:  # getting ready takes most of so short a run: wait for that
            while victim.is_alive() and not saved(out):
                time.sleep(0.005)
            victim.join(rng.uniform(0.0, lasts / 4))
        victim.kill()
        victim.join()
        # It had saved something, and had not come to its end.
        landed += not out.exists() and saved(out)
        finish(out)
        assert outcome(out) == expected, f"kill {number}"
    assert landed >= KILLS // 3, "kills have to fall into the run"
