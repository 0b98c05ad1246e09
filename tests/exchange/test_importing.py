"""``instar import``: what it takes, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from instar.checkpoint import load_causal_lm
from instar.cli import main
from instar.config import read_config
from instar.errors import UserError
from instar.exchange import weights
from instar.exchange.gguf_write import write_gguf
from instar.exchange.importing import Options, import_model
from instar.exchange.weights import INDEX, StoredWeights, write_weights
from instar.generation import Engine
from instar.lineage import hash_file
from instar.stages.sft import SFTConfig
from instar.training.display import Display

Make = Callable[[str], Path]


def imported(source: Path, out: Path, dtype: str = "keep") -> Path:
    with Display() as display:
        return import_model(str(source), out, dtype, display)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_gguf_file_becomes_a_model(checkpoint: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "ferry.gguf"
    general = {"name": "Ferry", "license": "mit", "languages": ["en"]}
    write_gguf(checkpoint("llama"), path, "f32", general)
    out = imported(path, tmp_path / "out")
    ids = torch.tensor([[2, 40, 50, 60, 7]])
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))(ids).logits
    again = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.equal(theirs, again)
    assert torch.allclose(load_causal_lm(out)(ids), theirs, atol=1e-5)
    record = json.loads((out / "lineage.json").read_text())
    assert record["stage"] == record["config"]["stage"] == "import"
    assert record["data"] == {"ferry.gguf": hash_file(path)}
    assert record["general"] == general and record["parameters"] > 0
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, [3, 5])
    assert Engine.load(out).tokenizer.im_end_id == 5


@torch.no_grad()
def test_every_family_computes_the_same(family: str, checkpoint: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = checkpoint(family)
    write_gguf(directory, tmp_path / "m.gguf", "f32", {})
    out = imported(tmp_path / "m.gguf", tmp_path / "out")
    ids = torch.randint(6, 400, (1, 200), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, theirs)
    assert torch.allclose(load_causal_lm(out)(ids), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [
        ("f16", "keep", torch.float16),
        ("bf16", "keep", torch.bfloat16),
        ("q8_0", "keep", torch.float32),
        ("f32", "bfloat16", torch.bfloat16),
    ],
)
def test_types_of_weights(
    kind: str, dtype: str, stored: torch.dtype, checkpoint: Make, tmp_path: Path
) -> None:
    write_gguf(checkpoint("qwen3"), tmp_path / "m.gguf", kind, {})  # type: ignore[arg-type]
    out = imported(tmp_path / "m.gguf", tmp_path / "out", dtype)
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {stored}
    name = json.loads((out / "config.json").read_text())["dtype"]
    assert f"torch.{name}" == str(stored)


def test_a_directory_is_taken_over(checkpoint: Make, tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    shutil.copytree(checkpoint("qwen3"), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: zh\n---\n# Theirs\n")
    kept = imported(source, tmp_path / "kept")
    before = load_file(source / "model.safetensors")
    after = load_file(kept / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (kept / "README.md").exists()
    said = json.loads((kept / "lineage.json").read_text())["general"]
    assert said == {"license": "apache-2.0", "languages": "zh"}
    half = imported(source, tmp_path / "half", "float16")
    found = load_file(half / "model.safetensors")
    assert all(torch.equal(found[name], before[name].half()) for name in before)


def test_only_its_own_is_replaced(checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    imported(checkpoint("qwen3"), out)
    imported(checkpoint("llama"), out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(UserError, match="has not made it"):
        imported(checkpoint("qwen3"), tmp_path / "mine")


def test_a_model_that_contradicts_its_config(checkpoint: Make, tmp_path: Path) -> None:
    source = tmp_path / "odd"
    shutil.copytree(checkpoint("qwen3"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="cannot run this model"):
        imported(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_is_missing(name: str, checkpoint: Make, tmp_path: Path) -> None:
    source = tmp_path / "part"
    shutil.copytree(checkpoint("qwen3"), source)
    (source / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        imported(source, tmp_path / "out")


def test_several_files(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    with StoredWeights(checkpoint("qwen3")) as stored:
        count = write_weights(tmp_path, ((name, stored[name]) for name in stored))
        index = json.loads((tmp_path / INDEX).read_text())
        assert len(set(index["weight_map"].values())) > 2
        assert index["metadata"]["total_size"] == 4 * count
        assert {path.name for path in tmp_path.glob("*.safetensors")} == {
            *index["weight_map"].values()
        }
        with StoredWeights(tmp_path) as again:
            assert set(again) == set(stored)
            for name in again:
                assert np.array_equal(again[name], stored[name])


def test_the_recipe_that_help_names_leaves_other_lives_alone() -> None:
    found = re.search(r"instar sft (\S+) --init runs/smollm", Options.__doc__ or "")
    assert found
    life = read_config(SFTConfig, Path(__file__).parents[2] / found[1]).run
    assert life != SFTConfig.model_fields["run"].default


def test_the_verb(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    write_gguf(checkpoint("qwen3"), tmp_path / "m.gguf", "f32", {})
    out = str(tmp_path / "out")
    command = ["instar", "import", str(tmp_path / "m.gguf"), "--out", out]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert "parameters of qwen3" in capfd.readouterr().out
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    assert main() == 2
    error = capfd.readouterr().err
    assert "cut short or damaged" in error and len(error.strip().splitlines()) == 1
    assert (tmp_path / "out" / "config.json").exists(), "what was there before stays"
