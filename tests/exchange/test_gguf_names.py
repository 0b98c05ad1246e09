"""Names and orders of tensors, against what the two sides are known to do."""

from __future__ import annotations

import numpy as np
import pytest

from instar.errors import UserError
from instar.exchange.gguf_names import (
    ARCHITECTURES,
    architecture_of,
    from_gguf,
    gguf_name,
    hugging_face_name,
    to_gguf,
)


@pytest.mark.parametrize(
    ("arch", "ours", "theirs"),
    [
        ("llama", "token_embd.weight", "model.embed_tokens.weight"),
        ("llama", "blk.11.ffn_norm.weight", "model.layers.11.post_attention_layernorm.weight"),
        ("qwen2", "blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", "blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3moe", "blk.3.ffn_gate_inp.weight", "model.layers.3.mlp.gate.weight"),
        ("gpt2", "blk.1.attn_qkv.bias", "transformer.h.1.attn.c_attn.bias"),
        ("gpt2", "position_embd.weight", "transformer.wpe.weight"),
    ],
)
def test_names_go_both_ways(arch: str, ours: str, theirs: str) -> None:
    assert hugging_face_name(arch, ours) == theirs
    assert gguf_name(arch, theirs) == ours


def test_no_two_tensors_share_a_name() -> None:
    for arch, known in ARCHITECTURES.items():
        stems = [*known.top, *(f"blk.2.{part}" for part in known.block)]
        names = [hugging_face_name(arch, f"{stem}.weight") for stem in stems]
        assert len({*names}) == len(names) and None not in names


def test_experts_are_one_tensor() -> None:
    name = "blk.5.ffn_up_exps.weight"
    theirs = hugging_face_name("qwen3moe", name)
    assert theirs == "model.layers.5.mlp.experts.{}.up_proj.weight"
    assert gguf_name("qwen3moe", theirs.format(17)) == name
    assert hugging_face_name("qwen3", name) is None


def test_gpt2_without_its_prefix() -> None:
    assert gguf_name("gpt2", "h.0.mlp.c_fc.weight") == "blk.0.ffn_up.weight"
    assert gguf_name("gpt2", "h.0.attn.bias") is None


def test_llama_rotates_neighbours() -> None:
    # Two heads of width 4: Hugging Face pairs row 0 with 2 and 1 with 3, llama.cpp 0 with 1.
    rows = np.arange(8)[:, None] * np.ones((1, 3))
    sorted_ = to_gguf("llama", "blk.0.attn_q.weight", rows, 2, 1)
    assert sorted_[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_gguf("llama", "blk.0.attn_v.weight", rows, 2, 1) is rows
    assert to_gguf("qwen3", "blk.0.attn_q.weight", rows, 2, 1) is rows
    bias = to_gguf("llama", "blk.0.attn_k.bias", np.arange(4), 2, 1)
    assert bias.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.attn_k.weight"])
def test_sorting_is_undone(name: str) -> None:
    rows = np.random.default_rng(0).normal(size=(48, 5))
    there = to_gguf("llama", name, rows, 6, 2)
    assert not np.array_equal(there, rows)
    assert np.array_equal(from_gguf("llama", name, there, 6, 2), rows)


def test_an_unknown_family() -> None:
    with pytest.raises(UserError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        architecture_of("mamba")
