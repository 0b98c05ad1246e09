"""Matrices in a few bits: every number of a GGUF file that somebody else packed is taken over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from instar.adapters.opening import load_causal_lm
from instar.checkpoint import save_model
from instar.exchange.gguf_write import write_gguf
from instar.exchange.importing import import_model
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.training.display import Display

gguf = pytest.importorskip("gguf")

HEADS = {"attn_q": 4, "attn_k": 2}
"""Matrices of which llama.cpp sorts the rows of each head otherwise."""

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, merges: list[tuple[bytes, bytes]]) -> Path:
    """A Llama in float32 whose rows are as long as the longest blocks of packed numbers."""
    directory = tmp_path_factory.mktemp("full")
    save_tokenizer(directory, merges[:9], 64)
    tokenizer = Tokenizer.load(directory)
    config = ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=HEADS["attn_q"],
        num_key_value_heads=HEADS["attn_k"],
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    save_model(model, directory, tokenizer)
    write_gguf(directory, directory / "full.gguf", "f32", {})
    return directory / "full.gguf"


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """Rows of bytes; of Q4_K, which the library only reads, any bytes with two small scales."""
    type_ = gguf.GGMLQuantizationType[kind]
    if kind != "Q4_K":
        return gguf.quants.quantize(values, type_)
    weights, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = values.size // weights
    drawn = np.random.default_rng(values.size).integers(0, 256, (blocks, size), dtype=np.uint8)
    drawn[:, :4] = np.tile(np.array([0.01, 0.02], dtype=np.float16).view(np.uint8), (blocks, 1))
    return drawn.reshape(len(values), -1)


def repacked(source: Path, out: Path, kind: str) -> None:
    """The same file with its matrices of another type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, packed(values, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Of each head first the even rows, then the odd ones: Hugging Face rotates the halves."""
    width = len(rows) // heads
    return rows[
        [
            head * width + row
            for head in range(heads)
            for first in (0, 1)
            for row in range(first, width, 2)
        ]
    ]


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K"])
def test_packed_numbers_are_taken_over(kind: str, full: Path, tmp_path: Path) -> None:
    repacked(full, tmp_path / "packed.gguf", kind)
    with Display() as display:
        out = import_model(str(tmp_path / "packed.gguf"), tmp_path / "out", "keep", display)
    found = load_file(out / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "packed.gguf").tensors}
    originals = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(full).tensors}
    assert tensors.keys() == NAMES.keys() and found.keys() == set(NAMES.values())
    for name, tensor in tensors.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        matrix = values.ndim > 1
        assert tensor.tensor_type.name == (kind if matrix else "F32")
        assert np.array_equal(values, originals[name]) is not matrix, "fewer bits lose something"
        if heads := HEADS.get(name.split(".")[-2]):
            values = halves(values, heads)
        assert np.array_equal(found[NAMES[name]].numpy(), values), name
    with torch.no_grad():
        assert load_causal_lm(out)(torch.arange(6, 30)[None]).isfinite().all()
