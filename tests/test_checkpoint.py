from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from instar import checkpoint
from instar.checkpoint import (
    load_causal_lm,
    load_score_model,
    save_model,
    score_model_from,
)
from instar.errors import UserError
from instar.files import atomic_directory, read_json, write_json
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
)


def make(kind: type[Any] = CausalLM, **changes: Any) -> Any:
    config = CONFIG.model_copy(update=changes)
    model = kind(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    return model


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", [CausalLM, ScoreModel])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path: Path, kind: type[Any], tied: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    save_model(model, tmp_path)
    load = load_causal_lm if kind is CausalLM else load_score_model
    found = load(tmp_path)
    assert found.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name]), name
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_score_model_keeps_the_form_of_its_reward(tmp_path: Path) -> None:
    save_model(make(), tmp_path / "lm")
    fresh = score_model_from(tmp_path / "lm", "prior")
    assert fresh.prior_weight.item() == 1 and not fresh.score.weight.any()
    with torch.no_grad():
        fresh.prior_weight.fill_(0.5)
    save_model(fresh, tmp_path / "reward")
    found = load_score_model(tmp_path / "reward")
    assert found.config.reward_form == "prior" and found.prior_weight.item() == 0.5


def test_a_prior_needs_the_output_embedding(tmp_path: Path) -> None:
    save_model(make(tie_word_embeddings=False), tmp_path)
    with pytest.raises(UserError, match=r"two matrices.*Choose the form"):
        score_model_from(tmp_path, "prior")


def test_a_tied_head_is_left_out_and_the_format_is_named(tmp_path: Path) -> None:
    save_model(make(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 (not a mapping)
        assert stored.metadata() == {"format": "pt"}


def test_both_ends_of_a_text_are_named_for_others(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    save_model(make(), tmp_path)
    for config in (AutoConfig, GenerationConfig):
        assert config.from_pretrained(tmp_path).eos_token_id == [3, 5]


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4000)
    model = make(tie_word_embeddings=False)
    save_model(model, tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    found = load_causal_lm(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name]), name

    files[1].unlink()
    with pytest.raises(UserError, match=files[1].name):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    save_model(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*Run the stage"):
        load_causal_lm(tmp_path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} is not a checkpoint.*Name a directory"):
        load_causal_lm(tmp_path)
    save_model(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_wrong_kind_of_checkpoint(tmp_path: Path, tied: bool) -> None:
    save_model(make(CausalLM, tie_word_embeddings=tied), tmp_path / "lm")
    save_model(make(ScoreModel, tie_word_embeddings=tied), tmp_path / "score")
    with pytest.raises(UserError, match=r"lm does not hold a ScoreModel.*right kind"):
        load_score_model(tmp_path / "lm")
    with pytest.raises(UserError, match=r"score does not hold a CausalLM.*right kind"):
        load_causal_lm(tmp_path / "score")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_model(make(), tmp_path)
    values = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", values | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match="does not hold a CausalLM"):
        load_causal_lm(tmp_path)
    write_json(tmp_path / "config.json", values | {"vocab_size": 41})
    with pytest.raises(UserError, match="does not hold a CausalLM"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba"}, "'mamba'.*instar reads qwen3, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.*llama"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"vocab_size": "many"}, "`vocab_size` is 'many'"),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    save_model(make(), tmp_path)
    path = tmp_path / "config.json"
    write_json(path, read_json(path) | changes)
    with pytest.raises(UserError, match=rf"config\.json.*{told}"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff"])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    save_model(make(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        load_causal_lm(tmp_path)


def test_old_llama_configs_leave_things_out(tmp_path: Path) -> None:
    model = make(family="llama", num_key_value_heads=2, tie_word_embeddings=False)
    save_model(model, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta"):
        values[name] = None
    path.write_text(json.dumps(values))
    assert load_causal_lm(tmp_path).config == model.config


@pytest.mark.parametrize("keep", [0, 1])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4000)
    out = tmp_path / "out"
    with atomic_directory(out) as directory:
        save_model(make(), directory)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real, written = checkpoint.save_file, []

    def full(weights: Any, path: Path, metadata: Any) -> None:
        if len(written) == keep:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(path)
        real(weights, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with (
        pytest.raises(OSError, match="No space left") as caught,
        atomic_directory(out) as directory,
    ):
        save_model(make(), directory)
    assert caught.value.errno == errno.ENOSPC and "model" in str(caught.value.filename)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == ["out"]


def test_the_system_really_says_so_in_this_way(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError) as caught:
            checkpoint._save_file({"a": torch.zeros(5000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
