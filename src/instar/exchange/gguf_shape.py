"""A model's shape in two spellings: the keys of a GGUF file, and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from instar.errors import UserError
from instar.exchange.gguf_names import ARCHITECTURES, ROPE_FACTORS, architecture_of
from instar.exchange.rope_factors import llama3_factors, llama3_settings
from instar.model.config import ModelConfig, RopeScaling
from instar.model.hugging_face import from_hugging_face
from instar.model.rotary import attention_factor

SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""What every file says; GGUF's keys follow the architecture's name and a dot."""

GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}
EXPERT_SIZES = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
THETA = 10_000.0
"""The base of rotary frequencies where nothing is said."""

YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}
"""What llama.cpp and transformers both take for granted of YaRN."""

YARN_KEYS = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}
"""GGUF's keys of YaRN, after ``rope.scaling.``, to ``config.json``'s."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""``config.json``'s model type to the class that it names."""


class Keys:
    """The keys of one architecture.

    Args:
        metadata: All keys of the file.
        arch: The architecture.
    """

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self._metadata, self._arch = metadata, arch

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return self._metadata.get(f"{self._arch}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """One whole number.

        Raises:
            UserError: It is missing, no size, or differs from block to block.
        """
        value = self.get(key, default)
        if value is None:
            raise UserError(f"the file has no key {self._arch}.{key}", "Download it again.")
        several = set(value) if isinstance(value, list) else {value}
        if len(several) != 1:
            raise UserError(
                f"{self._arch}.{key} differs from block to block", "instar's blocks are all alike."
            )
        size = several.pop()
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{self._arch}.{key} is {size!r}", "Download the file again.")
        return size


def to_config(
    metadata: Mapping[str, Any], arch: str, vocab_size: int, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``config.json`` holds for the model of a GGUF file, control tokens apart.

    Args:
        metadata: The file's keys.
        arch: One of ``ARCHITECTURES``.
        vocab_size: Rows of the embedding.
        tensors: Name to tensor; only ``rope_freqs.weight`` is looked at, the others named.

    Raises:
        UserError: A key is missing, or asks for something that instar does not have.
    """
    keys = Keys(metadata, arch)
    tied = "output.weight" not in tensors
    if arch == "gpt2":
        return _gpt2_config(keys, vocab_size, tied)
    config: dict[str, Any] = {"model_type": ARCHITECTURES[arch].model_types[0]}
    config["vocab_size"] = vocab_size
    skipped = {"feed_forward_length"} if ARCHITECTURES[arch].has_experts else set()
    config |= {name: keys.size(key) for key, name in SIZES.items() if key not in skipped}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = keys.size("attention.head_count_kv", heads)
    config["head_dim"] = keys.size("attention.key_length", config["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, config["head_dim"]) != config["head_dim"]:
            raise UserError(
                f"{arch}.{key} is {keys.get(key)} and a head is {config['head_dim']} wide",
                "instar's heads are as wide for values as for keys, and rotate whole.",
            )
    config["rms_norm_eps"] = _decimal(keys.get("attention.layer_norm_rms_epsilon", 1e-6))
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = tied
    biased = "blk.0.attn_q.bias" in tensors
    if arch != "qwen2":  # whose queries, keys and values always have biases
        config["attention_bias"] = biased
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    config |= _rope(keys, config, tensors)
    config |= _window(keys, arch)
    if ARCHITECTURES[arch].has_experts:
        config |= {name: keys.size(key) for key, name in EXPERT_SIZES.items()}
        config["intermediate_size"] = keys.size(
            "feed_forward_length", config["moe_intermediate_size"]
        )
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return config | {"architectures": [CLASSES[config["model_type"]]]}


def _gpt2_config(keys: Keys, vocab_size: int, tied: bool) -> dict[str, Any]:
    config = {name: keys.size(key) for key, name in GPT2_SIZES.items()}
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        **config,
        "layer_norm_epsilon": _decimal(keys.get("attention.layer_norm_epsilon", 1e-5)),
        "activation_function": "gelu_new",
        "tie_word_embeddings": tied,
        "architectures": [CLASSES["gpt2"]],
    }


def _window(keys: Keys, arch: str) -> dict[str, Any]:
    """Attention that looks back a limited way."""
    window = keys.get("attention.sliding_window")
    if not window:
        return {}
    if arch == "llama":
        return {"model_type": "mistral", "sliding_window": int(window)}
    return {"use_sliding_window": True, "sliding_window": int(window), "max_window_layers": 0}


def _rope(keys: Keys, config: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, in the spelling of transformers 5 and in the one before."""
    theta = float(keys.get("rope.freq_base", THETA))
    scaling = _scaling(keys, config["max_position_embeddings"])
    if ROPE_FACTORS in tensors:
        if scaling:
            raise UserError(
                f"the file has {ROPE_FACTORS} and {scaling['rope_type']} scaling as well",
                "instar slows rotary frequencies in one way only.",
            )
        factors = np.asarray(tensors[ROPE_FACTORS], dtype=np.float32)
        scaling = {"rope_type": "llama3"} | llama3_settings(factors, config["head_dim"], theta)
    written: dict[str, Any] = {"rope_theta": theta}
    written["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    return written | ({"rope_scaling": scaling} if scaling else {})


def _scaling(keys: Keys, context: int) -> dict[str, Any]:
    """How frequencies are slowed down; nothing where they are left as they are.

    A file that names no type means linear scaling, as llama.cpp has it: old files say the factor
    only. A factor of 0 is none.
    """
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"the file's rotary scaling is {kind!r}", "instar reads none, linear and yarn."
        )
    factor = _decimal(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))) or 1.0
    if kind == "yarn":
        return _yarn(keys, factor, context)
    _refuse_other(keys, "rope.scaling.attn_factor", 1.0)
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else {}


def _yarn(keys: Keys, factor: float, context: int) -> dict[str, Any]:
    """YaRN's settings.

    ``yarn_attn_factor`` is transformers' ``attention_factor``, by which llama.cpp's converter
    names it so; ``attn_factor`` multiplies what is computed without it.
    """
    _refuse_other(keys, "rope.scaling.yarn_ext_factor", 1.0)
    _refuse_other(keys, "rope.scaling.yarn_log_multiplier", 0.0)
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = keys.size("rope.scaling.original_context_length", context)
    scaling["original_max_position_embeddings"] = original
    for key, name in YARN_KEYS.items():
        if (value := keys.get(f"rope.scaling.{key}")) is not None:
            scaling[name] = _decimal(value)
    if (louder := _decimal(keys.get("rope.scaling.attn_factor", 1.0))) != 1.0:
        whole = RopeScaling.parse(scaling, "the file's rotary scaling")
        scaling["attention_factor"] = louder * attention_factor(whole)
    return scaling


def _refuse_other(keys: Keys, key: str, granted: float) -> None:
    if (value := keys.get(key, granted)) != granted:
        raise UserError(
            f"the file's {key} is {_decimal(value)}",
            f"instar computes {granted} only; download the model's own directory instead.",
        )


def _decimal(number: float) -> float:
    """The shortest decimal of a float32, which was meant: 1e-05 is 9.999999747e-06 in Python."""
    return float(str(np.float32(number)))


def from_config(config: Mapping[str, Any]) -> tuple[str, dict[str, int | float | str]]:
    """The other way: GGUF's architecture, and its keys without the architecture's name.

    Args:
        config: What ``config.json`` holds.

    Raises:
        UserError: llama.cpp would compute something else than this model.
    """
    arch = architecture_of(config.get("model_type"))
    shape = from_hugging_face(dict(config), "config.json")
    keys = {key: getattr(shape, name) for key, name in SIZES.items()}
    keys["vocab_size"] = shape.vocab_size
    if arch == "gpt2":
        return arch, keys | {"attention.layer_norm_epsilon": shape.rms_norm_eps}
    keys["attention.head_count_kv"] = shape.num_key_value_heads
    keys |= {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim}
    keys["attention.layer_norm_rms_epsilon"] = shape.rms_norm_eps
    keys["rope.dimension_count"] = shape.head_dim
    keys["rope.freq_base"] = shape.rope_theta
    keys |= _scaling_keys(shape.rope_scaling)
    if shape.sliding_window:
        # llama.cpp looks back over everything: within the window that is the same.
        keys["context_length"] = min(keys["context_length"], shape.sliding_window)
    if ARCHITECTURES[arch].has_experts:
        _refuse_what_differs(shape)
        keys |= {key: getattr(shape, name) for key, name in EXPERT_SIZES.items()}
    return arch, keys


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    """What a file says of slowed frequencies; Llama 3's factors are a tensor instead.

    Raises:
        UserError: A GGUF file cannot say it.
    """
    if scaling is None or scaling.rope_type == "llama3":
        return {}
    keys = {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": scaling.factor}
    if scaling.rope_type == "linear":
        return keys
    for name, granted in YARN.items():
        if getattr(scaling, name) != granted:
            raise UserError(
                f"config.json: {name} of the rotary scaling is {getattr(scaling, name)!r}",
                f"A GGUF file is written for {granted!r} only.",
            )
    original = scaling.original_max_position_embeddings
    return keys | {"rope.scaling.original_context_length": original}


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """What ``rope_freqs.weight`` holds for this model; none where there is no such tensor."""
    shape = from_hugging_face(dict(config), "config.json")
    if shape.rope_scaling is None or shape.rope_scaling.rope_type != "llama3":
        return None
    return llama3_factors(shape.rope_scaling.model_dump(), shape.head_dim, shape.rope_theta)


def _refuse_what_differs(shape: ModelConfig) -> None:
    """What llama.cpp takes for granted of experts must be so."""
    granted = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": ()}
    for name, value in granted.items():
        if getattr(shape, name) != value:
            raise UserError(
                f"config.json: {name} is {getattr(shape, name)!r}",
                f"llama.cpp computes this architecture with {value!r} only.",
            )
