"""The record of tensors that travels from a source to an objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100
"""Target value at positions where no loss is taken."""

WIDTH_MULTIPLE = 8
"""Widths of padded rows are multiples of this: matrix products are tuned for every new shape."""


def padded_width(length: int) -> int:
    """The number of columns that rows of at most ``length`` tokens are padded to."""
    return math.ceil(max(1, length) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


@dataclass(frozen=True)
class Batch:
    """Sequences with their targets, and what frozen models wrote beside them.

    Sequences are padded on the right; attention is causal, so padding needs no mask.
    Pairwise batches hold the chosen replies in the first half of the rows and the rejected
    replies in the second half.

    Attributes:
        input_ids: Token ids ``(B, T)``.
        targets: The token that should follow each position ``(B, T)``; ``IGNORE`` where no loss
            is taken. ``targets[:, t]`` belongs to the logits at position ``t``.
        positions: Position of each token within its document ``(B, T)``; counted from the left
            edge when absent.
        segment_ids: Which packed document each token belongs to ``(B, T)``, from 0 on, or
            ``SHARED`` (``model/stack.py``), which all documents of the row begin with; absent
            when a row is one document.
        reference_logprobs: Log-probabilities of ``targets`` under the frozen reference
            ``(B, T)``, zero where ignored.
        old_logprobs: The same under the policy that sampled the rollout ``(B, T)``.
        old_values: The critic's values when the rollout was sampled ``(B, T)``.
        advantage: Advantage of each target ``(B, T)``.
        returns: What the critic should have predicted ``(B, T)``.
        weight: Weight of each target in the loss ``(B, T)``; one when absent.
        teacher_ids: The k likeliest tokens of a frozen model at each target ``(B, T, k)``.
        teacher_logprobs: Their log-probabilities under it ``(B, T, k)``, zero where ignored.
    """

    input_ids: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"] | None = None
    segment_ids: Int[Tensor, "b t"] | None = None
    reference_logprobs: Float[Tensor, "b t"] | None = None
    old_logprobs: Float[Tensor, "b t"] | None = None
    old_values: Float[Tensor, "b t"] | None = None
    advantage: Float[Tensor, "b t"] | None = None
    returns: Float[Tensor, "b t"] | None = None
    weight: Float[Tensor, "b t"] | None = None
    teacher_ids: Int[Tensor, "b t k"] | None = None
    teacher_logprobs: Float[Tensor, "b t k"] | None = None

    @property
    def mask(self) -> Tensor:
        """Boolean ``(B, T)``: where a loss is taken."""
        return self.targets != IGNORE

    @property
    def documents(self) -> Tensor:
        """How many there are, in all rows."""
        if self.segment_ids is None:
            # A GPU fills it in by itself; for `torch.tensor` the processor would wait.
            return torch.full((), len(self.input_ids), device=self.input_ids.device)
        return (self.segment_ids.amax(dim=1) + 1).sum()

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in present.items() if value is not None}

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; a GPU fetches it by itself, from memory that stays put."""
        tensors = self.tensors()
        if device.type == "cuda":
            tensors = {k: v if v.is_cuda else v.pin_memory() for k, v in tensors.items()}
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in tensors.items()})

    def rows(self, index: Int[Tensor, " n"] | Bool[Tensor, " b"] | slice) -> Batch:
        """The chosen rows of every field."""
        return Batch(**{k: v[index] for k, v in self.tensors().items()})

    def row_lengths(self) -> Int[Tensor, " b"]:
        """How many columns of each row are its own, to the last token that is a target.

        ``targets[:, t]`` is the token that stands at ``t + 1``, so a row's last token has no
        target of its own, and neither has the last column:

        ======== ==== ==== ==== ==== =====
        column    0    1    2    3    4
        input    ask   ask  a    b   (pad)
        target    -    a    b    -    -
        ======== ==== ==== ==== ==== =====

        Here the length is 4.
        """
        columns = torch.arange(2, self.targets.shape[1] + 2, device=self.targets.device)
        return (columns * self.mask).amax(dim=1)

    def trimmed(self) -> Batch:
        """The same rows, as narrow as their longest target allows."""
        if not len(self.input_ids):
            return self
        width = padded_width(int(self.row_lengths().max()))
        return Batch(**{k: v[:, :width] for k, v in self.tensors().items()})
