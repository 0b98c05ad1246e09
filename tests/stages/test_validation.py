"""Held-out data is measured in passes that fit where training fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from instar.data.batch import Batch
from instar.objectives.base import Objective
from instar.stages.registry import STAGES
from instar.stages.validation import held_out
from instar.training.display import Display


@pytest.mark.parametrize(
    ("name", "data"),
    [("sft", "conversations"), ("reward", "preferences"), ("dpo", "preferences")],
)
def test_held_out_data_is_cut_as_training_is_and_says_the_same(
    name: str,
    data: str,
    life: Path,
    values: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Display() as display:
        pretrain = STAGES["pretrain"]
        pretrain.run(pretrain.config.parse(values["pretrain"], "test"), display)
    module, passes = import_module(f"instar.stages.{name}"), list[int]()

    def watched(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
        def each() -> Iterator[Batch]:
            for batch in batches:
                passes.append(batch.input_ids.numel())
                yield batch

        return held_out(objective, each())

    monkeypatch.setattr(module, "held_out", watched)
    settings = values[name] | {
        "init": str(life / "pretrain"),
        "valid": [str(life / "data" / f"{data}.jsonl")],
        "batch_size": 12,
    }

    def measured(micro_tokens: int) -> dict[str, float]:
        passes.clear()
        torch.manual_seed(0)
        config = STAGES[name].config.parse(settings | {"micro_tokens": micro_tokens}, "test")
        return module.build(config).validate()

    whole = measured(10**6)
    assert len(passes) == 1
    parts = measured(224)
    assert len(passes) > 2 and max(passes) <= 224
    assert whole["loss"] > 0 and parts == pytest.approx(whole, rel=1e-5, abs=1e-6)
