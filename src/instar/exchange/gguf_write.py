"""A checkpoint becomes a GGUF file, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from instar.errors import UserError
from instar.exchange.gguf_names import (
    ARCHITECTURES,
    EXPERTS,
    ROPE_FACTORS,
    gguf_name,
    to_gguf,
)
from instar.exchange.gguf_read import library
from instar.exchange.gguf_shape import from_config, rope_factors
from instar.exchange.tokenizer_out import Vocabulary, vocabulary_of
from instar.exchange.weights import StoredWeights
from instar.files import atomic_file, read_json
from instar.model.stored import BUFFERS

Kind = Literal["f32", "f16", "bf16", "q8_0"]

BLOCK = 32
"""Numbers that share a scale in Q8_0; a matrix whose rows are no multiple of it is F16."""

IN_FULL = ("position_embd.weight", "ffn_gate_inp.weight")
"""Matrices that stay float32: llama.cpp adds the one, and chooses experts by the other."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written.

    Attributes:
        name: GGUF's name.
        sources: Hugging Face's names; several for experts, in their order.
        shape: As it will be written, the outermost dimension first.
        kind: How its numbers are stored.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind


def write_gguf(
    directory: Path,
    out: Path,
    kind: Kind,
    general: Mapping[str, Any],
    step: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a checkpoint as a GGUF file that llama.cpp runs.

    Args:
        directory: A Hugging Face directory.
        out: The file; it appears when it is whole.
        kind: How matrices are stored; vectors are always float32.
        general: What the keys ``general.*`` say: texts, and lists of them.
        step: Told after every tensor how many of how many are written.

    Returns:
        Bytes written.

    Raises:
        UserError: llama.cpp would not compute what this model does.
    """
    gguf = library()
    config = read_json(directory / "config.json")
    arch, keys = from_config(config)
    vocabulary = vocabulary_of(directory, config["vocab_size"])
    heads = int(keys["attention.head_count"])
    key_heads = int(keys.get("attention.head_count_kv", heads))
    factors = rope_factors(config)
    with StoredWeights(directory) as weights, atomic_file(out) as beside:
        planned = plan(weights, config, arch, kind)
        writer = gguf.GGUFWriter(beside, arch)
        try:
            _add_general(writer, general, kind)
            _add_keys(writer, keys)
            _add_vocabulary(writer, vocabulary)
            if factors is not None:
                _announce(writer, Planned(ROPE_FACTORS, (), factors.shape, "f32"))
            for each in planned:
                _announce(writer, each)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for done, each in enumerate(planned, start=1):
                values = [
                    to_gguf(arch, each.name, weights[name].float().numpy(), heads, key_heads)
                    for name in each.sources
                ]
                whole = np.stack(values) if _holds_experts(each.name) else values[0]
                writer.write_tensor_data(_stored(each, whole))
                step(done, len(planned))
        finally:
            writer.close()
        return beside.stat().st_size


def plan(weights: StoredWeights, config: Mapping[str, Any], arch: str, kind: Kind) -> list[Planned]:
    """Which tensors to write, from which, and how.

    Raises:
        UserError: The checkpoint holds a tensor that llama.cpp has no place for, or lacks one.
    """
    tied = config.get("tie_word_embeddings", arch == "gpt2")
    sources: dict[str, list[str]] = {}
    for name in weights:
        if BUFFERS.search(name) or (tied and name == "lm_head.weight"):
            continue
        target = gguf_name(arch, name)
        if target is None:
            raise UserError(
                f"llama.cpp's {arch} has no place for the tensor {name}",
                "Export a language model; what judges (a reward model) is none.",
            )
        sources.setdefault(target, []).append(name)
    planned = []
    for name, names in sources.items():
        shape = weights.shape(names[0])
        if name.split(".")[-2] in ARCHITECTURES[arch].transposed and name.endswith(".weight"):
            shape = shape[::-1]
        if _holds_experts(name):
            names.sort(key=lambda name: int(re.findall(r"experts\.(\d+)", name)[0]))
            shape = (len(names), *shape)
        planned.append(Planned(name, tuple(names), shape, _kind(name, shape, kind)))
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    wanted = {"token_embd.weight", "output_norm.weight", f"blk.{blocks - 1}.attn_output.weight"}
    if missing := wanted - sources.keys():
        raise UserError(f"the checkpoint lacks {sorted(missing)[0]}", "Make or download it again.")
    return planned


def _holds_experts(name: str) -> bool:
    return name.split(".")[-2] in EXPERTS


def _kind(name: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """How to store a tensor, given what was asked for."""
    if len(shape) < 2 or name.endswith(IN_FULL):
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % BLOCK else wanted


def _announce(writer: Any, planned: Planned) -> None:
    """Tell the writer of a tensor whose numbers will come later."""
    gguf = library()
    kinds = gguf.GGMLQuantizationType
    if planned.kind in ("bf16", "q8_0"):  # numpy does not know these; the library packs bytes
        kind = kinds[planned.kind.upper()]
        shape = gguf.quant_shape_to_byte_shape(planned.shape, kind)
        size = int(np.prod(shape))
        writer.add_tensor_info(planned.name, shape, np.dtype(np.uint8), size, kind)
        return
    dtype = np.dtype(np.float16 if planned.kind == "f16" else np.float32)
    size = int(np.prod(planned.shape)) * dtype.itemsize
    writer.add_tensor_info(planned.name, planned.shape, dtype, size)


def _stored(planned: Planned, values: np.ndarray) -> np.ndarray:
    """The numbers as the file holds them.

    Raises:
        UserError: A number is too large for float16.
    """
    values = np.ascontiguousarray(values)
    if planned.kind == "f32":
        return values
    if planned.kind in ("bf16", "q8_0"):
        gguf = library()
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[planned.kind.upper()])
        return packed.view(np.uint8)
    if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise UserError(
            f"{planned.name} holds numbers that float16 does not reach", "Write f32 or bf16."
        )
    return values.astype(np.float16)


def _add_general(writer: Any, general: Mapping[str, Any], kind: Kind) -> None:
    gguf = library()
    for name, value in general.items():
        if isinstance(value, list):
            writer.add_array(f"general.{name}", value)
        else:
            writer.add_string(f"general.{name}", str(value))
    types = dict(f32="ALL_F32", f16="MOSTLY_F16", bf16="MOSTLY_BF16", q8_0="MOSTLY_Q8_0")
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_keys(writer: Any, keys: Mapping[str, int | float | str]) -> None:
    for key, value in keys.items():
        name = f"{writer.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    for key, value in vocabulary.keys.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
