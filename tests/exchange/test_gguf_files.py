"""GGUF files out and in again: every number and every id survives; damaged files are refused."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instar.errors import UserError
from instar.exchange.gguf_read import GGUFFile
from instar.exchange.gguf_shape import from_config, to_config
from instar.exchange.gguf_write import write_gguf
from instar.exchange.importing import import_model
from instar.exchange.weights import StoredWeights
from instar.tokenizer.hf import Tokenizer
from instar.training.display import Display

gguf = pytest.importorskip("gguf")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
Make = Callable[[str], Path]


def numbers(directory: Path) -> dict[str, np.ndarray]:
    with StoredWeights(directory) as weights:
        return {name: weights[name].float().numpy() for name in weights}


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    file = GGUFFile(path)
    config = to_config(file.metadata, file.arch, file.vocab_size, file.small)
    heads = config.get("num_attention_heads") or config["n_head"]
    weights = file.weights(heads, config.get("num_key_value_heads", heads))
    return config, {name: np.array(values) for name, values in weights}


def test_every_number_survives(family: str, checkpoint: Make, tmp_path: Path) -> None:
    directory = checkpoint(family)
    size = write_gguf(directory, tmp_path / "model.gguf", "f32", {"name": "x"})
    assert size == (tmp_path / "model.gguf").stat().st_size
    config, found = read_back(tmp_path / "model.gguf")
    expected = numbers(directory)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
    original = json.loads((directory / "config.json").read_text())
    assert from_config(config) == from_config(original)
    if config["model_type"] != "mistral" and original["model_type"] != "mistral":
        same = {key for key in config.keys() & original.keys() if not key.startswith("rope")}
        same -= {"n_inner"}  # nothing there means four times the width
        assert {k: config[k] for k in same} == {k: original[k] for k in same}


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2)])
def test_shorter_numbers_are_close(
    kind: Any, error: float, checkpoint: Make, tmp_path: Path
) -> None:
    directory = checkpoint("qwen3")
    size = write_gguf(directory, tmp_path / "model.gguf", kind, {})
    full = write_gguf(directory, tmp_path / "full.gguf", "f32", {})
    assert size < 0.75 * full  # the vocabulary is as long as ever
    expected = numbers(directory)
    for name, values in read_back(tmp_path / "model.gguf")[1].items():
        if values.ndim == 1:
            assert np.array_equal(values, expected[name]), name
        else:
            assert 0 < np.abs(values - expected[name]).max() < error * np.abs(values).max(), name


def test_types_of_matrices_and_vectors(checkpoint: Make, tmp_path: Path) -> None:
    write_gguf(checkpoint("qwen3 experts"), tmp_path / "model.gguf", "q8_0", {})
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.1.attn_q_norm.weight"] == "F32"


def test_a_large_number_is_no_float16(checkpoint: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "large"
    shutil.copytree(checkpoint("qwen3"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up.*float16 does not reach"):
        write_gguf(directory, tmp_path / "model.gguf", "f16", {})
    assert not list(tmp_path.glob("*.gguf")), "a file that is not whole does not appear"


def test_ids_survive(checkpoint: Make, tmp_path: Path, strings: list[str]) -> None:
    directory = checkpoint("llama")
    write_gguf(directory, tmp_path / "model.gguf", "f32", {})
    with Display() as display:
        import_model(str(tmp_path / "model.gguf"), tmp_path / "back", "keep", display)
    there, back = Tokenizer.load(directory), Tokenizer.load(tmp_path / "back")
    for special in (False, True):
        for text in strings:
            ids = there.encode(text, special)
            assert back.encode(text, special) == ids
            assert back.decode(ids, skip_special=False) == there.decode(ids, skip_special=False)
    assert (back.bos_id, back.eos_id, back.pad_id) == (there.bos_id, there.eos_id, there.pad_id)
    template = (tmp_path / "back" / "chat_template.jinja").read_text()
    assert "generation %}" not in template and "<|im_start|>" in template


def test_the_end_that_only_the_model_names(checkpoint: Make, tmp_path: Path) -> None:
    """GPT-2's tokenizer on the hub names no token at all."""
    directory = tmp_path / "gpt2"
    shutil.copytree(checkpoint("gpt2"), directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    model = json.loads((directory / "config.json").read_text())
    model |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": -1}
    (directory / "generation_config.json").unlink(missing_ok=True)
    for said, config, generation in (
        ((2, 3), {"bos_token_id": 2, "eos_token_id": 3}, {"eos_token_id": 5}),
        ((None, 5), {}, {"eos_token_id": [5, 3]}),
    ):
        (directory / "config.json").write_text(json.dumps(model | config))
        (directory / "generation_config.json").write_text(json.dumps(generation))
        write_gguf(directory, tmp_path / "model.gguf", "f32", {})
        keys = GGUFFile(tmp_path / "model.gguf").metadata
        found = [keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")]
        assert found == [*said, None]
    (directory / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="no file says which token ends a text"):
        write_gguf(directory, tmp_path / "model.gguf", "f32", {})


def test_tokens_of_the_older_map(checkpoint: Make, tmp_path: Path) -> None:
    """What transformers before 4.34 wrote names tokens in special_tokens_map.json."""
    directory = tmp_path / "older"
    shutil.copytree(checkpoint("qwen2"), directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    named = {"bos_token": "<bos>", "eos_token": {"content": "<|im_end|>"}}
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    write_gguf(directory, tmp_path / "model.gguf", "f32", {})
    keys = GGUFFile(tmp_path / "model.gguf").metadata
    assert keys["tokenizer.ggml.bos_token_id"] == 2 and keys["tokenizer.ggml.eos_token_id"] == 5


def test_rows_without_tokens(checkpoint: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.resize_token_embeddings(416, mean_resizing=False)
    directory = tmp_path / "wider"
    shutil.copytree(checkpoint("llama"), directory)
    model.save_pretrained(directory)
    write_gguf(directory, tmp_path / "model.gguf", "f32", {})
    file = GGUFFile(tmp_path / "model.gguf")
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len({*tokens}) == file.vocab_size == 416
    with Display() as display:
        import_model(str(tmp_path / "model.gguf"), tmp_path / "back", "keep", display)
    assert Tokenizer.load(tmp_path / "back").vocab_size == 400


def test_a_file_cut_short(checkpoint: Make, tmp_path: Path) -> None:
    write_gguf(checkpoint("qwen2"), tmp_path / "model.gguf", "f32", {})
    whole = (tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (4, 12, 24, 100, 4000, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short or damaged"):
            GGUFFile(cut)


def test_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>Not found</html>")
    with pytest.raises(UserError, match="is not a GGUF file"):
        GGUFFile(tmp_path / "page.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(UserError, match="is not a GGUF file"):
        GGUFFile(tmp_path / "empty.gguf")
    with pytest.raises(UserError, match="no such file"):
        GGUFFile(tmp_path / "none.gguf")


def with_bytes(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


def test_an_unknown_architecture(checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint("qwen2"), path, "f32", {})
    with_bytes(path, b"\x05\x00\x00\x00\x00\x00\x00\x00qwen2", b"\x05\0\0\0\0\0\0\0mamba")
    with pytest.raises(UserError, match=r"'mamba'.*instar reads llama, qwen2, qwen3"):
        GGUFFile(path)


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_file(number: int, tmp_path: Path) -> None:
    """As llama-gguf-split writes parts: only the first says what the model is."""
    path = tmp_path / f"model-{number + 1:05d}-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama" if number == 0 else "")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"one of 2 parts.*Join the parts first.*--merge"):
        GGUFFile(path)


def test_the_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[exchange\]'"):
        GGUFFile(tmp_path / "model.gguf")


@pytest.mark.parametrize(("number", "told"), [(999, "type 999"), (24, "type I8")])
def test_an_unknown_type(number: int, told: str, checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint("qwen2"), path, "f32", {})
    name = b"blk.0.attn_norm.weight"
    before = name + struct.pack("<IQI", 1, 64, 0)
    with_bytes(path, before, name + struct.pack("<IQI", 1, 64, number))
    with pytest.raises(UserError, match=rf"{told}.*instar reads .*Q4_K"):
        read_back(path)


@pytest.mark.parametrize(
    "key", ["qwen2.embedding_length", "qwen2.block_count", "tokenizer.ggml.merges"]
)
def test_a_key_is_missing(key: str, checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint("qwen2"), path, "f32", {})
    with_bytes(path, key.encode(), key[:-1].encode() + b"_")
    with pytest.raises(UserError, match=re.escape(key)), Display() as display:
        import_model(str(path), tmp_path / "out", "keep", display)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("attention.head_count", 5, r"blk\.0\.attn_q\.weight has the shape .* 5 heads"),
        ("attention.head_count_kv", 3, r"attn_k\.weight has the shape .*3 of keys"),
        ("attention.head_count", 0, r"llama\.attention\.head_count is 0"),
        ("context_length", 0, r"llama\.context_length is 0"),
        ("embedding_length", 32, "instar cannot run this model"),
    ],
)
def test_keys_that_contradict_the_tensors(
    key: str, value: int, told: str, checkpoint: Make, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint("llama"), path, "f32", {})
    content, name = path.read_bytes(), f"llama.{key}".encode()
    place = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    path.write_bytes(content[:place] + struct.pack("<I", value) + content[place + 4 :])
    with pytest.raises(UserError, match=told), Display() as display:
        import_model(str(path), tmp_path / "out", "keep", display)
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_would_compute_otherwise() -> None:
    base = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    base |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8}
    experts = {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1}
    for change, told in [
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (experts, "norm_topk_prob is False"),
        (experts | {"norm_topk_prob": True, "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function"),
    ]:
        with pytest.raises(UserError, match=told):
            from_config(base | change)


def scaling_of(**said: Any) -> dict[str, Any] | None:
    """The ``rope_scaling`` of a file with these keys, its dots written as two underscores."""
    _, keys = from_config(MISTRAL | {"model_type": "llama"})
    keys |= {f"rope.{key.replace('__', '.')}": value for key, value in said.items()}
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    return to_config(metadata, "llama", 8, {}).get("rope_scaling")


def test_a_factor_without_a_type_is_linear() -> None:
    """What llama.cpp does with old files (``load_hparams``)."""
    linear = {"rope_type": "linear", "factor": 4.0}
    assert scaling_of(scaling__factor=4.0) == scaling_of(scale_linear=4.0) == linear
    assert scaling_of(scaling__factor=1.0) is scaling_of(scale_linear=0.0) is None
    assert scaling_of(scaling__type="none", scaling__factor=4.0) is None


def test_the_settings_of_yarn_come_in() -> None:
    said = {"scaling__type": "yarn", "scaling__factor": 4.0}
    said["scaling__original_context_length"] = 64
    assert scaling_of(**said) == YARN
    betas = {"scaling__yarn_beta_fast": float(np.float32(16.3)), "scaling__yarn_beta_slow": 2.0}
    assert scaling_of(**said, **betas) == YARN | {"beta_fast": 16.3, "beta_slow": 2.0}
    given = scaling_of(**said, scaling__yarn_attn_factor=float(np.float32(1.2)))
    assert given == YARN | {"attention_factor": 1.2}
    doubled = scaling_of(**said, scaling__attn_factor=2.0)
    # Without it, by the paper's equation 22: 0.1 ln 4 + 1.
    assert doubled == YARN | {"attention_factor": pytest.approx(2 * 1.1386294)}
    del said["scaling__original_context_length"]
    assert scaling_of(**said) == YARN | {"original_max_position_embeddings": 8192}


def test_one_way_of_scaling_only() -> None:
    _, keys = from_config(MISTRAL | {"model_type": "llama", "rope_scaling": YARN})
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    with pytest.raises(UserError, match=r"rope_freqs\.weight and yarn scaling"):
        to_config(metadata, "llama", 8, {"rope_freqs.weight": np.ones(4)})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("yarn_ext_factor", 0.5, "yarn"),
        ("yarn_log_multiplier", 0.1, "yarn"),
        ("attn_factor", 1.5, "linear"),
        ("type", "longrope", "longrope"),
    ],
)
def test_rotary_scaling_that_instar_has_not(key: str, value: Any, kind: str) -> None:
    said = {"scaling__type": kind, f"scaling__{key}": value}
    with pytest.raises(UserError, match=rf"{value}"):
        scaling_of(**said)


MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("said", "context"),
    [({"sliding_window": 512}, 512), ({"sliding_window": None}, 8192), ({}, 4096)],
)
def test_a_window_shortens_the_context(said: dict[str, Any], context: int) -> None:
    """A config.json that leaves the window out means 4096 tokens, as transformers has it."""
    from transformers import MistralConfig

    arch, keys = from_config(MISTRAL | said)
    assert arch == "llama" and keys["context_length"] == context
    assert context == (MistralConfig(**MISTRAL | said).sliding_window or 8192)


def test_the_older_spelling_of_rotary_settings_wins() -> None:
    """Both may be there; transformers and our own model then go by `rope_scaling`."""
    from transformers import LlamaConfig

    config = MISTRAL | {"model_type": "llama", "rope_theta": 5e5}
    config |= {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}
    _, keys = from_config(config)
    theirs = LlamaConfig(**config).rope_parameters
    assert keys["rope.scaling.type"] == theirs["rope_type"] == "yarn"
    assert keys["rope.scaling.factor"] == theirs["factor"] == 4.0
    assert keys["rope.scaling.original_context_length"] == 64
    assert keys["rope.freq_base"] == theirs["rope_theta"]


def test_a_reward_model_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "reward"
    shutil.copytree(checkpoint("qwen3"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["score.weight"] = weights["model.norm.weight"][None].clone()
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"no place for the tensor score\.weight"):
        write_gguf(directory, tmp_path / "model.gguf", "f32", {})
