"""Shapes in Hugging Face's words: what a ``config.json`` says, read and written."""

from __future__ import annotations

from typing import Any

from instar.errors import UserError
from instar.model.config import WINDOWED, Family, ModelConfig, RopeScaling
from instar.model.transformer import CausalLM, ScoreModel

HEADS = {CausalLM: "ForCausalLM", ScoreModel: "ForSequenceClassification"}
"""How transformers' classes end, for each of our heads."""

FAMILIES: dict[Family, str] = {
    "qwen3": "Qwen3",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "mistral": "Mistral",
    "gpt2": "GPT2",
    "qwen3_moe": "Qwen3Moe",
}
"""How they begin, for each ``model_type``."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "gpt2": {
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts": 128,
    },
}
"""What a file that leaves a setting out means by it: the defaults of transformers' config classes,
as documented for version 5.23. ``COMMON`` holds for all families, where nothing else is said."""

COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""What no file leaves out."""

GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon",
}
"""What GPT-2's files call what ours call otherwise."""

GELU = ("gelu_new", "gelu_pytorch_tanh")
"""Two names for GELU in its tanh form."""

BIASED = ("llama", "qwen3", "qwen3_moe")
"""Families in which ``attention_bias`` means something; the others have what they have."""

EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)

WINDOW, WINDOW_FROM = 4096, 28
"""Qwen's defaults: the window where one is asked for, and the first block that keeps to it."""


def to_hugging_face(config: ModelConfig, head: str, dtype: str = "float32") -> dict[str, Any]:
    """What ``config.json`` holds for a model of this shape, control tokens apart.

    Args:
        config: The shape.
        head: One of ``HEADS``.
        dtype: Format of the stored weights.
    """
    values = _gpt2_values(config) if config.family == "gpt2" else _rotary_values(config)
    values |= {
        "architectures": [FAMILIES[config.family] + head],
        "model_type": config.family,
        "dtype": dtype,
    }
    if head == HEADS[ScoreModel]:
        values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        values["reward_form"] = config.reward_form  # ours; transformers reads the last score
    return values


def _gpt2_values(config: ModelConfig) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, theirs in GPT2_NAMES.items()}
    same = ("vocab_size", "initializer_range", "tie_word_embeddings")
    values |= {name: getattr(config, name) for name in same}
    # Who trains it elsewhere is not to be surprised by dropout that it was not trained with.
    return (
        values
        | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        | {"activation_function": GELU[0]}
    )


def _rotary_values(config: ModelConfig) -> dict[str, Any]:
    """Both spellings of the rotary settings are written.

    ``rope_theta`` and ``rope_scaling`` are for readers before transformers 5, ``rope_parameters``
    for those after it.
    """
    left_out = {"family", "reward_form", "mlp_bias", "sliding_window", "layer_types", *EXPERTS}
    values = config.model_dump(exclude=left_out | {"rope_scaling"})
    values |= {
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if config.rope_scaling is not None:
        scaling = _scaling_values(config.rope_scaling)
        values["rope_scaling"] = scaling
        values["rope_parameters"] = scaling | {"rope_theta": config.rope_theta}
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.family == "qwen3_moe":
        values |= config.model_dump(mode="json", include=set(EXPERTS))
    if config.family in WINDOWED:
        values |= _window_values(config)
    return values


def _scaling_values(scaling: RopeScaling) -> dict[str, Any]:
    """Only what the rule knows: others may not like to see more."""
    own = {
        "linear": {"rope_type", "factor"},
        "llama3": {
            "rope_type",
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        },
        "yarn": set(RopeScaling.model_fields) - {"low_freq_factor", "high_freq_factor"},
    }
    return scaling.model_dump(include=own[scaling.rope_type], exclude_none=True)


def _window_values(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    if config.family == "mistral":
        return {"sliding_window": window}  # null, for here absence would mean a window
    if window is None:
        return {}
    values: dict[str, Any] = {"use_sliding_window": True, "sliding_window": window}
    if config.family in ("qwen2", "qwen3"):
        windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        types = ["sliding_attention" if w else "full_attention" for w in windows]
        first = types.index("sliding_attention") if "sliding_attention" in types else len(types)
        values |= {"layer_types": types, "max_window_layers": first}
    return values


def from_hugging_face(values: dict[str, Any], origin: str) -> ModelConfig:
    """The shape that a ``config.json`` describes.

    Args:
        values: What it holds.
        origin: Its name, for error messages.

    Raises:
        UserError: The architecture, or a setting of it, is one that this model does not have.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin} does not hold an object", "Write it again.")
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{origin}: model_type is {family!r}", f"instar reads {', '.join(FAMILIES)}."
        )
    if family == "gpt2":
        ours = {theirs: ours for ours, theirs in GPT2_NAMES.items()}
        values = {ours.get(name, name): value for name, value in values.items()}
    given = {name: value for name, value in values.items() if value is not None}
    _refuse(family, given, origin)
    for name in NEEDED:
        if name not in given:
            told = GPT2_NAMES.get(name, name) if family == "gpt2" else name
            raise UserError(f"{origin}: `{told}` is missing", "Write the file again.")
    if family == "qwen3_moe" and "num_local_experts" in given:  # transformers 5 calls it so
        given.setdefault("num_experts", given["num_local_experts"])
    defaults = COMMON | DEFAULTS[family]
    read = set(ModelConfig.model_fields) - {"family", "layer_types", "rope_scaling"}
    read -= set() if family == "qwen3_moe" else set(EXPERTS)
    read -= set() if family in BIASED else {"attention_bias"}
    read -= set() if family == "llama" else {"mlp_bias"}
    known = {name: {**defaults, **given}[name] for name in read if name in defaults | given}
    known["family"] = family
    known |= _heads(family, values, known) | _window(family, values, origin)
    if family != "gpt2":
        known |= _rope(given, known["max_position_embeddings"], origin)
    return ModelConfig.parse(known, origin)


def _refuse(family: str, given: dict[str, Any], origin: str) -> None:
    """Say so where a file asks for a part that the models here have not."""
    unsupported = {
        "quantization_config": "quantization_config" in given,
        "partial_rotary_factor": given.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if family == "gpt2":
        unsupported |= {
            "activation_function": given.get("activation_function", GELU[0]) not in GELU,
            "scale_attn_weights": not given.get("scale_attn_weights", True),
            "scale_attn_by_inverse_layer_idx": given.get("scale_attn_by_inverse_layer_idx", False),
            "add_cross_attention": given.get("add_cross_attention", False),
        }
    else:
        unsupported["hidden_act"] = given.get("hidden_act", "silu") != "silu"
    for name, present in unsupported.items():
        if present:
            raise UserError(f"{origin}: {name} is {given[name]!r}", "This model has no such part.")


def _heads(family: str, values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Sizes that others follow from; what is not a number is left for pydantic to name."""
    d, heads = known["hidden_size"], known["num_attention_heads"]
    if not isinstance(d, int) or not isinstance(heads, int) or heads < 1:
        return {}
    if family == "gpt2":
        inner = known.get("intermediate_size", 4 * d)
        return {"num_key_value_heads": heads, "head_dim": d // heads, "intermediate_size": inner}
    found: dict[str, Any] = {"head_dim": known.get("head_dim", d // heads)}
    # Left out it is the family's default, but null means one for each query head.
    if values.get("num_key_value_heads", ...) is None or "num_key_value_heads" not in known:
        found["num_key_value_heads"] = heads
    return found


def _window(family: str, values: dict[str, Any], origin: str) -> dict[str, Any]:
    """The sliding window, and which blocks keep to it."""
    types = values.get("layer_types")
    if family == "mistral":
        if types and set(types) != {"sliding_attention"}:
            raise UserError(
                f"{origin}: mistral with layer_types {sorted(set(types))}",
                "Its blocks are all alike; take layer_types out.",
            )
        return {"sliding_window": values.get("sliding_window", WINDOW)}
    if family not in WINDOWED or not values.get("use_sliding_window"):
        return {"sliding_window": None}
    window = values.get("sliding_window", WINDOW)
    if window is None or family == "qwen3_moe":
        return {"sliding_window": window}
    layers, first = values.get("num_hidden_layers"), values.get("max_window_layers", WINDOW_FROM)
    if types is None and isinstance(layers, int) and isinstance(first, int):
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if types and set(types) == {"sliding_attention"}:
        types = None
    if types and set(types) == {"full_attention"}:
        return {"sliding_window": None}
    return {"sliding_window": window, "layer_types": types}


def _rope(given: dict[str, Any], context: Any, origin: str) -> dict[str, Any]:
    """The rotary base, and how frequencies are scaled, in the spelling of any age."""
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    rope, parameters = given.get(name) or {}, given.get("rope_parameters") or {}
    for spelt, value in ((name, rope), ("rope_parameters", parameters)):
        if not isinstance(value, dict):
            raise UserError(f"{origin}: {spelt} is {value!r}", "It holds an object.")
    base = given.get("rope_theta", COMMON["rope_theta"])
    base = rope.get("rope_theta", parameters.get("rope_theta", base))
    # Before transformers 4.43, `rope_type` was called `type`.
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rules = ("default", "linear", "llama3", "yarn")
    if kind not in rules or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{origin}: {name} is {rope!r}", f"instar reads the rope types {', '.join(rules)}."
        )
    if kind == "default":
        return {"rope_theta": base}
    found = {key: rope[key] for key in RopeScaling.model_fields if rope.get(key) is not None}
    found["rope_type"] = kind
    if kind != "linear":
        original = given.get("original_max_position_embeddings", context)
        original = found.setdefault("original_max_position_embeddings", original)
        if kind == "yarn" and isinstance(original, int) and original > 0:
            found.setdefault("factor", context / original)
    return {"rope_theta": base, "rope_scaling": RopeScaling.parse(found, f"{origin}: {name}")}
