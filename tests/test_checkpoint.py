from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from instar import checkpoint
from instar.checkpoint import (
    FAMILIES,
    from_hugging_face,
    load_causal_lm,
    load_score_model,
    read_dtype,
    save_model,
    score_model_from,
    weights_of,
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
    with pytest.raises(UserError, match=r"not hold a CausalLM.*Missing model\.layers\.2.*10 more"):
        load_causal_lm(tmp_path)
    write_json(tmp_path / "config.json", values | {"num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"not hold a CausalLM.*Unexpected model\.layers\.1"):
        load_causal_lm(tmp_path)
    write_json(tmp_path / "config.json", values | {"vocab_size": 41})
    told = r"embed_tokens\.weight is \(40, 16\) in the file, and by config\.json \(41, 16\)"
    with pytest.raises(UserError, match=told):
        load_causal_lm(tmp_path)


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": None, "rope_scaling": values}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba"}, "'mamba'.*instar reads qwen3, llama, qwen2, mistral, gpt2, qwen"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"model_type": "gpt2", "num_hidden_layers": None}, "`n_layer` is missing"),
        (rope(rope_type="dynamic", factor=2.0), "dynamic.*reads.*default, linear, llama3, yarn"),
        (rope(type="longrope"), "rope_scaling is.*longrope"),
        (rope(rope_type="llama3"), "`factor` is missing"),
        (rope(type="linear", factor=0), "rope_scaling: `factor` is 0"),
        (
            rope(rope_type="llama3", factor=8, low_freq_factor=4.0),
            "low_freq_factor must be less than",
        ),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.*proportional"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"vocab_size": "many"}, "`vocab_size` is 'many'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "mistral with layer_types"),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            "layer_types names 4 blocks, num_hidden_layers is 2",
        ),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    save_model(make(), tmp_path)
    path = tmp_path / "config.json"
    write_json(path, read_json(path) | changes)
    with pytest.raises(UserError, match=rf"config\.json.*{told}"):
        load_causal_lm(tmp_path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    save_model(make(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: a pickle.*Convert it to safetensors"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_files(tmp_path: Path, index: str) -> None:
    save_model(make(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json names no files"):
        load_causal_lm(tmp_path)


def test_a_stored_head_that_is_not_the_embedding(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=False)
    save_model(model, tmp_path)
    path = tmp_path / "config.json"
    write_json(path, read_json(path) | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"lm_head.* is not .*one matrix.*tie_word_embeddings"):
        load_causal_lm(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    save_model(model, tmp_path)
    write_json(path, read_json(path) | {"tie_word_embeddings": True})
    found = load_causal_lm(tmp_path)
    assert found.lm_head.weight is found.model.embeddings.weight


def test_a_head_that_is_neither_stored_nor_tied(tmp_path: Path) -> None:
    save_model(make(), tmp_path)
    path = tmp_path / "config.json"
    write_json(path, read_json(path) | {"tie_word_embeddings": False})
    with pytest.raises(UserError, match=r"Missing lm_head\.weight"):
        load_causal_lm(tmp_path)


def test_what_is_read_is_the_models_own(tmp_path: Path) -> None:
    save_model(make(), tmp_path)
    model = load_causal_lm(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for weight in model.parameters():
            assert weight.requires_grad and weight.device.type == "cpu"
            weight.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_stored_format_is_found_again(tmp_path: Path, dtype: Any) -> None:
    save_model(make(), tmp_path, dtype=dtype)
    assert read_dtype(tmp_path) == dtype
    assert read_json(tmp_path / "config.json")["dtype"] == dtype
    assert next(load_causal_lm(tmp_path).parameters()).dtype == torch.float32


def test_mixed_formats_need_the_widest(tmp_path: Path) -> None:
    weights = weights_of(make())
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    save_model(make(), tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    assert read_dtype(tmp_path) == "float32"


NEEDED = {
    "vocab_size": 50,
    "hidden_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_key_value_heads": None},
        {"sliding_window": None},
        {"use_sliding_window": True},
        {"tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-4},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    ],
)
def test_what_a_file_leaves_out_means_what_transformers_takes_it_for(
    family: str, given: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
    names |= {"num_attention_heads": "n_head", "rms_norm_eps": "layer_norm_epsilon"}
    values = NEEDED | given
    if family == "gpt2":
        values = {names.get(name, name): value for name, value in values.items()}
        values.pop("rope_scaling", None)
    found = from_hugging_face(values | {"model_type": family}, "config.json")
    if family in ("mistral", "qwen3_moe") and values.get("num_key_value_heads", 1) is None:
        assert found.num_key_value_heads == 32, "transformers refuses this null"
        values["num_key_value_heads"] = 32
    theirs = AutoConfig.for_model(family, **values)
    assert found.num_hidden_layers == 30 and found.vocab_size == 50
    assert found.max_position_embeddings == theirs.max_position_embeddings
    assert found.initializer_range == theirs.initializer_range
    assert found.tie_word_embeddings == theirs.tie_word_embeddings
    if family == "gpt2":
        assert found.rms_norm_eps == theirs.layer_norm_epsilon
        assert found.intermediate_size == (theirs.n_inner or 4 * theirs.n_embd)
        return
    assert found.rms_norm_eps == theirs.rms_norm_eps
    assert found.intermediate_size == theirs.intermediate_size
    assert found.num_key_value_heads == theirs.num_key_value_heads
    assert found.head_dim == getattr(theirs, "head_dim", 128)
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]
    if found.rope_scaling:
        original = theirs.rope_parameters["original_max_position_embeddings"]
        assert found.rope_scaling.original_max_position_embeddings == original
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    for layer in range(30):
        here = window if types is None or types[layer] == "sliding_attention" else None
        assert found.window(layer) == here
    if family == "qwen3_moe":
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            assert getattr(found, name) == getattr(theirs, name)
        assert found.norm_topk_prob == theirs.norm_topk_prob
        assert found.decoder_sparse_step == theirs.decoder_sparse_step
        assert found.mlp_only_layers == tuple(theirs.mlp_only_layers)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"family": "qwen2", "attention_bias": True}, "qwen2 has no attention_bias; llama, qwen3"),
        ({"mlp_bias": True}, "qwen3 has no mlp_bias; llama may"),
        ({"family": "llama", "sliding_window": 4}, "llama has no sliding_window"),
        (
            {"family": "mistral", "layer_types": ["full_attention"] * 2},
            "mistral has no layer_types",
        ),
        ({"num_experts": 4}, "qwen3 has no num_experts"),
        ({"family": "qwen3_moe", "num_experts": 4}, "4 is less than num_experts_per_tok 8"),
        ({"family": "gpt2"}, "gpt2 has as many key heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn needs original_max"),
    ],
)
def test_a_shape_that_its_family_has_not(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ModelConfig.parse(CONFIG.model_dump() | changes, "here")


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
