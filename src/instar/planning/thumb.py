"""The rules of thumb that textbooks give, to stand beside what is reckoned in full."""

from __future__ import annotations

from dataclasses import dataclass

from instar.model.config import ModelConfig


@dataclass(frozen=True)
class Thumb:
    """What the rules say of a stage.

    Attributes:
        parameters: ``P = L (4 d^2 + d V)``.
        memory_bytes: ``28 P``: weights 4, gradients 8, optimizer 16 bytes each.
        flops: ``6 P N``.
    """

    parameters: int
    memory_bytes: int
    flops: int


MISLEADS = {
    "parameters": "P = L(4d² + dV) counts the embedding once a block, though a model has it once, "
    "and leaves the feed-forward out, which is two thirds of a block.",
    "memory": "28 bytes a parameter is float32 weights (4) with gradients and moments counted "
    "twice: AdamW keeps 4 + 4 + 8 = 16, Muon 12. It knows nothing of activations, which grow with "
    "the batch, nor of the framework: for a small model they are nearly all.",
    "flops": "6PN is right for products (2 forward, 4 backward), if P leaves out the input "
    "embedding, which is looked up and not multiplied. It leaves out attention, which grows with "
    "the context, sampling and frozen models; and it is no time: that needs the share of the "
    "peak that is reached.",
}
"""Where each rule goes wrong."""


def rules(model: ModelConfig, tokens: int) -> Thumb:
    """Apply them.

    Args:
        model: Shape of the model.
        tokens: Positions to train on.
    """
    d = model.hidden_size
    parameters = model.num_hidden_layers * (4 * d**2 + d * model.vocab_size)
    return Thumb(parameters, 28 * parameters, 6 * parameters * tokens)
