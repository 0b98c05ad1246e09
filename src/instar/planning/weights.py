"""How many weights a stage's model has, and which of them learn: the model is built without any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from instar.adapters.base import AdapterConfig, slots, store_frozen
from instar.adapters.nf4 import quantize, stored_bytes
from instar.adapters.opening import Bits, to_learn
from instar.adapters.packed import Packed
from instar.errors import UserError
from instar.model import CausalLM, ModelConfig
from instar.training.layers import freeze
from instar.training.optimizer import sort_parameters


@dataclass(frozen=True)
class Weights:
    """The numbers that one model of a stage consists of.

    Attributes:
        learnt: Those that learn.
        learnt_matrices: Of these, those that Muon moves.
        learnt_outside: Of these, those outside of the blocks, such as the embedding.
        frozen: Those that do not learn, packed ones apart.
        frozen_layers: Of these, those that an adapter's base keeps in the products' format where
            they are whole.
        blocks: Those within the blocks, whether they learn or not; packed ones apart.
        started: Those that learnt before ``training.layers.freeze`` stopped some.
        packed: Those that are stored in four bits.
        packed_bytes: What they take.
        beside: What an adapter keeps and does not learn, such as what ReLoRA has settled.
        adapted: Whether an adapter learns.
    """

    learnt: int
    learnt_matrices: int
    learnt_outside: int
    frozen: int
    frozen_layers: int
    blocks: int
    started: int
    packed: int
    packed_bytes: int
    beside: int
    adapted: bool

    @property
    def numbers(self) -> int:
        """All but the packed ones."""
        return self.learnt + self.frozen

    @property
    def outside(self) -> int:
        """Those outside of the blocks."""
        return self.numbers - self.blocks

    @property
    def share(self) -> float:
        """How much of the model learns."""
        return self.learnt / (self.numbers + self.packed)


def weigh(
    shape: ModelConfig, adapter: AdapterConfig | None, bits: Bits | None, patterns: Sequence[str]
) -> Weights:
    """Count a model's weights as its stage would train them.

    Args:
        shape: Of the model; a score model is counted as a language model.
        adapter: What learns in its place.
        bits: How a frozen base is stored.
        patterns: Parts that never learn (``training.layers.freeze``).

    Raises:
        UserError: The settings do not go together.
    """
    with torch.device("meta"):  # tensors with a shape and nothing in it
        model = formed(shape, adapter, bits)
        store_frozen(model, torch.bfloat16)
    packed = [layer for layer in model.modules() if isinstance(layer, Packed)]
    started = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stop(model, patterns)
    learnt = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    within = {id(p): p.numel() for block in model.model.blocks for p in block.parameters()}
    matrices, _, _ = sort_parameters(model)
    return Weights(
        learnt=sum(learnt.values()),
        learnt_matrices=sum(p.numel() for p in matrices.values()),
        learnt_outside=sum(n for p, n in learnt.items() if p not in within),
        frozen=sum(p.numel() for p in frozen),
        frozen_layers=sum(p.numel() for p in frozen if p.dtype == torch.bfloat16),
        blocks=sum(within.values()),
        started=started,
        packed=sum(layer.in_features * layer.out_features for layer in packed),
        packed_bytes=sum(map(stored_bytes, packed)),
        beside=_beside(model),
        adapted=bool(model.adapters),
    )


def _beside(model: CausalLM) -> int:
    """Numbers in the buffers of an adapter's parts."""
    deltas = [delta for slot in slots(model).values() for delta in slot.deltas.values()]
    return sum(buffer.numel() for delta in deltas for buffer in delta.buffers())


EMPTY_START = {"lora": "kaiming", "prefix": "random"}
"""By method: how an adapter begins that need not look at the weights, which here are nobody's."""


def formed(shape: ModelConfig, adapter: AdapterConfig | None, bits: Bits | None) -> CausalLM:
    """A model of that shape, with what learns in it; its weights mean nothing.

    Raises:
        UserError: The settings do not go together.
    """
    model = CausalLM(shape)
    if bits:
        quantize(model)
    if adapter:
        # A language model has no score.
        whole = [part for part in adapter.modules_to_save if not part.endswith("score")]
        changed: dict[str, object] = {"modules_to_save": whole}
        if adapter.method in EMPTY_START:
            changed["start"] = EMPTY_START[adapter.method]
        adapter = adapter.model_copy(update=changed)
    return to_learn(model, adapter, bits, seed=0)


def stop(model: CausalLM, patterns: Sequence[str]) -> None:
    """Stop what the patterns fit from learning, as a stage does.

    One that fits nothing here may fit what the stage has besides: a critic, a score.
    """
    for pattern in patterns:
        with suppress(UserError):
            freeze(model, [pattern])
