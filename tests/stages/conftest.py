from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instar.data.readers import write_jsonl
from instar.tokenizer.hf import save_tokenizer

TRAINING = {"steps": 2, "log_every": 1}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def life(tmp_path: Path) -> Path:
    """A life's directory with a tokenizer of bytes and a few lines of every kind of data."""
    run = tmp_path / "life"
    save_tokenizer(run / "tokenizer", [], 96)
    data = run / "data"
    data.mkdir()
    replies = ["yes.", "no, never.", "maybe, we shall see."]
    questions = [f"Is {i} even?" for i in range(12)]
    lines: dict[str, list[dict[str, Any]]] = {
        "readings": [{"text": f"{q} {replies[i % 3]} " * 3} for i, q in enumerate(questions)],
        "readings_valid": [{"text": "春眠不觉晓", "language": "zh"}, {"text": "Is it?"}],
        "conversations": [
            {"messages": [user(q), {"role": "assistant", "content": replies[i % 3]}]}
            for i, q in enumerate(questions)
        ],
        "preferences": [
            {"messages": [user(q)], "chosen": "yes.", "rejected": replies[1 + i % 2]}
            for i, q in enumerate(questions)
        ],
        "prompts": [{"messages": [user(q)]} for q in questions],
        "tasks": [{"messages": [user(q)], "verifier": "integer", "answer": "1"} for q in questions],
    }
    lines["conversations_valid"] = lines["conversations"][:3]
    lines["preferences_valid"] = lines["preferences"][:3]
    for name, records in lines.items():
        write_jsonl(data / f"{name}.jsonl", records)
    return run


@pytest.fixture
def values(life: Path) -> dict[str, dict[str, Any]]:
    """Each trained stage's settings, as a YAML file would hold them."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 96,
    }
    rollout = {"prompts": 2, "samples": 2, "max_new_tokens": 4}
    batches = {"batch_size": 4, "micro_tokens": 100}
    stages: dict[str, dict[str, Any]] = {
        "pretrain": {"model": small, "context": 16, "batch_size": 4, "micro_batch": 3},
        "sft": batches,
        "reward": batches,
        "dpo": batches,
        "ppo": {"rollout": {**rollout, "epochs": 2}},
        "rlvr": {"rollout": rollout},
    }
    common = {"run": str(life), "training": TRAINING}
    return {name: {"stage": name, **common, **own} for name, own in stages.items()}
