"""An accelerator's speed, reckoned from its data sheet and from what is usually reached of it."""

from __future__ import annotations

from instar.model.config import ModelConfig
from instar.planning.hardware import Hardware
from instar.planning.speed import Line, Speed
from instar.training.optimizer import OptimizerConfig

UTILISATION = 0.4
"""Share of an accelerator's peak that training reaches: between the 38% to 43% of Llama 3 405B on
H100 (Grattafiori et al. 2024, arXiv:2407.21783, table 4) and the 46% of PaLM (Chowdhery et al.
2022, arXiv:2204.02311, table 3). Narrow models reach less."""

STREAMING = 0.6
"""Share of an accelerator's memory bandwidth that decoding reaches."""

LAUNCH_S = 5e-6
"""Seconds to launch a kernel from Python; a block is about forty, and as many again backward."""
BLOCK_KERNELS = 40


def reckoned(model: ModelConfig, optimizer: OptimizerConfig, hardware: Hardware) -> Speed:
    """An accelerator's speed from its data sheet and what is usually reached of it.

    Args:
        model: The shape.
        optimizer: The rule that moves the weights.
        hardware: One device of it counts; sharing the work is a matter of its own.
    """
    reached = UTILISATION * hardware.flops
    width = model.num_attention_heads * model.head_dim
    head = 2 * model.vocab_size * model.hidden_size / reached
    products = model.matrix_parameters() - model.vocab_size * model.hidden_size
    products = 2 * products / model.num_hidden_layers
    # Reads and writes weight, gradient and two moments, four bytes each.
    update = 28 * model.parameters() / (STREAMING * hardware.bandwidth)
    if optimizer.name == "muon":
        update += orthogonalization_flops(model) / reached
    # Half of a causal context is visible on average.
    reading = Line(BLOCK_KERNELS * LAUNCH_S, products / reached, 2 * width / reached)
    streaming = STREAMING * hardware.bandwidth
    columns = 2 * 2 * model.num_key_value_heads * model.head_dim
    return Speed(
        block=Line(2 * reading.start, 3 * reading.token, 3 * reading.pair),
        reading=reading,
        ends=Line(3 * LAUNCH_S),
        head=Line(0.0, 3 * head),
        head_reading=Line(0.0, head),
        # Every step reads the weights once, in two bytes, and each row its own keys and values.
        decode=Line(reading.start + products / streaming, reading.token, columns / streaming),
        decode_rest=Line(1e-3, head),
        update=update,
        saved=Line(0.0, fused_block_bytes(model)),
        head_saved=Line(0.0, 8.0 * model.vocab_size),
    )


def orthogonalization_flops(model: ModelConfig) -> int:
    """Operations of Muon's five Newton-Schulz iterations on the matrices of all blocks.

    An iteration on m rows and n columns, m the fewer: the Gram matrix 2 m^2 n, its square 2 m^3,
    and their polynomial times the matrix 2 m^2 n (``training.optimizer.orthogonalize``).
    """
    d, f = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    block = [(d, queries)] * 2 + [(d, keys)] * 2 + [(d, f)] * 3
    iteration = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in block)
    return 5 * model.num_hidden_layers * iteration


def fused_block_bytes(model: ModelConfig) -> float:
    """Bytes a token that a block keeps with fused attention, products in bfloat16.

    Counted as Korthikanti et al. do (2022, arXiv:2205.05198, section 4.1), for this block: two
    normalisations keep their input in float32 and give a product's factor; queries and keys are
    kept before and after normalisation, values once, the result of attention twice; gate and up,
    and the gate's activation and its product with up.
    """
    d, f = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    norms = 2 * (4 + 2) * d
    attention = (4 + 2) * (queries + keys) + 2 * keys + 2 * 2 * queries
    return norms + attention + 4 * 2 * f
