"""The two names of every tensor: in a GGUF file, and in a Hugging Face directory.

A GGUF file knows few words (``blk.0.attn_q.weight``) for all architectures; Hugging Face has
names of its own for each. Most tensors are the same numbers in the same order. Three are not:

- Llama's queries and keys. Hugging Face rotates the two halves of a head against each other,
  llama.cpp (for this architecture only) neighbouring rows; the rows of each head are sorted anew.
- GPT-2's matrices, which Hugging Face keeps as input x output.
- Experts: a matrix each for Hugging Face, one tensor of all for llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from instar.errors import UserError

Array = np.ndarray

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
FEED_FORWARD = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
"""The tensors that hold the matrices of all experts of a block."""

QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

ROPE_FACTORS = "rope_freqs.weight"
"""By what each rotary frequency is divided; Hugging Face computes it from four settings."""


@dataclass(frozen=True)
class Architecture:
    """How one architecture of GGUF files is named elsewhere.

    Attributes:
        model_types: What ``config.json`` may call it; the first is what is written.
        top: Tensors that occur once, GGUF name to Hugging Face name.
        block: Tensors of every block, the same.
        prefix: What stands before a block's number in Hugging Face's names.
        rotates_neighbours: Rows of queries and keys are sorted as llama.cpp rotates them.
        transposed: GGUF names of matrices that Hugging Face keeps as input x output.
        has_experts: A block's feed-forward is many, and a router chooses among them.
    """

    model_types: tuple[str, ...]
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    block: Mapping[str, str] = field(default_factory=lambda: ATTENTION | FEED_FORWARD)
    prefix: str = "model.layers."
    rotates_neighbours: bool = False
    transposed: frozenset[str] = frozenset()
    has_experts: bool = False


GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral"), rotates_neighbours=True),
    "qwen2": Architecture(("qwen2",)),
    "qwen3": Architecture(("qwen3",), block=ATTENTION | FEED_FORWARD | QK_NORM),
    "qwen3moe": Architecture(
        ("qwen3_moe",),
        block=ATTENTION | QK_NORM | {"ffn_gate_inp": "mlp.gate"},
        has_experts=True,
    ),
    "gpt2": Architecture(
        ("gpt2",),
        top=GPT2_TOP,
        block=GPT2_BLOCK,
        prefix="transformer.h.",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
"""The architectures that instar reads and writes, by GGUF's names."""


def architecture_of(model_type: str | None) -> str:
    """GGUF's name for what ``config.json`` calls ``model_type``.

    Raises:
        UserError: There is none here.
    """
    for name, architecture in ARCHITECTURES.items():
        if model_type in architecture.model_types:
            return name
    known = ", ".join(t for a in ARCHITECTURES.values() for t in a.model_types)
    raise UserError(f"model_type is {model_type!r}", f"As GGUF instar writes {known}.")


def hugging_face_name(arch: str, name: str) -> str | None:
    """The name in a Hugging Face directory of a tensor called ``name`` in a GGUF file.

    Args:
        arch: One of ``ARCHITECTURES``.
        name: Such as ``blk.0.attn_q.weight``.

    Returns:
        The name; with ``{}`` in place of the expert's number where the tensor holds all experts;
        none for a tensor that this architecture does not have.
    """
    known = ARCHITECTURES[arch]
    stem, _, kind = name.rpartition(".")
    if stem in known.top:
        return f"{known.top[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if not found:
        return None
    number, part = found.groups()
    if known.has_experts and part in EXPERTS:
        return f"{known.prefix}{number}.mlp.experts.{{}}.{EXPERTS[part]}.{kind}"
    return f"{known.prefix}{number}.{known.block[part]}.{kind}" if part in known.block else None


def gguf_name(arch: str, name: str) -> str | None:
    """The other way: GGUF's name for a tensor of a Hugging Face directory, or none.

    All experts' matrices of one kind have the same name.
    """
    known = ARCHITECTURES[arch]
    if arch == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        name = f"transformer.{name}"  # GPT2Model's own directories, the original among them
    stem, _, kind = name.rpartition(".")
    for ours, theirs in known.top.items():
        if stem == theirs:
            return f"{ours}.{kind}"
    found = re.fullmatch(re.escape(known.prefix) + r"(\d+)\.(.+)", stem)
    if not found:
        return None
    number, part = found.groups()
    if known.has_experts and (expert := re.fullmatch(r"mlp\.experts\.\d+\.(\w+)", part)):
        part = next((ours for ours, theirs in EXPERTS.items() if theirs == expert[1]), None)
    else:
        part = next((ours for ours, theirs in known.block.items() if theirs == part), None)
    return f"blk.{number}.{part}.{kind}" if part else None


def _part(name: str) -> str:
    """``attn_q`` of ``blk.0.attn_q.weight``."""
    return name.split(".")[-2]


def _heads(arch: str, name: str, heads: int, key_heads: int) -> int:
    """How many heads' rows are to be sorted; 0 where the order is the same."""
    if not ARCHITECTURES[arch].rotates_neighbours:
        return 0
    return {"attn_q": heads, "attn_k": key_heads}.get(_part(name), 0)


def to_gguf(arch: str, name: str, tensor: Array, heads: int, key_heads: int) -> Array:
    """A tensor as GGUF has it.

    Args:
        arch: One of ``ARCHITECTURES``.
        name: Its name there.
        tensor: As Hugging Face has it.
        heads: Query heads.
        key_heads: Key heads.
    """
    if name.endswith(".weight") and _part(name) in ARCHITECTURES[arch].transposed:
        return np.ascontiguousarray(tensor.T)
    if count := _heads(arch, name, heads, key_heads):
        halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def from_gguf(arch: str, name: str, tensor: Array, heads: int, key_heads: int) -> Array:
    """The inverse of ``to_gguf``."""
    if name.endswith(".weight") and _part(name) in ARCHITECTURES[arch].transposed:
        return np.ascontiguousarray(tensor.T)
    if count := _heads(arch, name, heads, key_heads):
        pairs = tensor.reshape(count, -1, 2, *tensor.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor
