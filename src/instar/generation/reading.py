"""How the engine asks the model: rows of tokens in, logits of what follows each row out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from instar.adapters.base import slots as slots_of
from instar.adapters.prefix import virtual_lengths
from instar.adapters.rows import rows as adapters_by_row
from instar.generation.body import Forward, fast_forward, is_compiled
from instar.generation.lean import Place
from instar.generation.native import cache_dtype
from instar.generation.products import Format
from instar.generation.slots import View
from instar.model.transformer import CausalLM


class Reader(Protocol):
    """A model as the engine sees it."""

    model: CausalLM
    """Whose words they are; it may be read in another layout."""
    dtype: torch.dtype
    """Of keys and values."""
    masks: bool
    """Whether columns out of sight are read, with weight zero."""

    def refresh(self) -> bool:
        """Take over the model's weights if they have changed; whether they have."""
        ...

    def read(self, ids: Tensor, view: View, last: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """Take tokens in, and say what may follow.

        Args:
            ids: New tokens ``(R, T)``, padded on the right.
            view: The rows that they belong to; takes up their keys and values.
            last: The last real token of each row ``(R,)``.
            adapters: Who speaks in each row.

        Returns:
            Logits after those ``(R, V)``, float32.
        """
        ...


class ModelReader:
    """The model itself, whatever it is made of.

    Args:
        model: Runs in its own precision, or under the autocast around it, as it does in training:
            frozen matrices under adapters may only fit that. Weights and training mode stay as
            they are.
    """

    masks = True

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.dtype = next(model.parameters()).dtype
        self._signature = signature(model)

    def refresh(self) -> bool:
        """The weights are the model's own; it only looks whether they have changed."""
        before, self._signature = self._signature, signature(self.model)
        return before != self._signature

    def read(self, ids: Tensor, view: View, last: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """As ``Reader`` says."""
        names = self._names(adapters)
        virtual = virtual_lengths(self.model, names)
        if len(set(virtual)) == 1:
            return self._read(ids, view, last, names)
        order, parts = list[int](), list[Tensor]()
        for length in set(virtual):
            own = [row for row, n in enumerate(virtual) if n == length]
            rows = torch.tensor(own, device=ids.device)
            asked = [names[row] for row in own]
            parts.append(self._read(ids[rows], view.part(rows), last[rows], asked))
            order += own
        return torch.cat(parts)[torch.tensor(order, device=ids.device).argsort()]

    def _read(self, ids: Tensor, view: View, last: Tensor, names: Sequence[str | None]) -> Tensor:
        """Rows that have equally many virtual tokens before them."""
        rows = torch.arange(len(ids), device=ids.device)

        def head(hidden: Tensor) -> Tensor:
            # A head of which each row has its own wants rows of tokens.
            return self.model.lm_head(hidden[rows, last][:, None])[:, 0].float()

        speaking = adapters_by_row(self.model, names) if any(names) else nullcontext()
        with evaluating(self.model), speaking:
            return self.model.read(head, ids, cache=view)

    def _names(self, adapters: Sequence[str | None]) -> Sequence[str | None]:
        """Whose the rows are, if any request says so; the others are the active adapter's then."""
        if not any(adapters):
            return adapters
        active = next((slot.active for slot in slots_of(self.model).values()), None)
        return [name or active for name in adapters]


class LeanReader:
    """A copy of the model's weights, laid out for writing (``generation.body``).

    Args:
        model: One that ``body.fits``.
        format: Of the copied matrices, whatever the autocast around it.
    """

    def __init__(self, model: CausalLM, format: Format) -> None:
        self.model = model
        self.format: Format = format
        self.compiled = is_compiled(model)
        self.dtype = cache_dtype(format) if self.compiled else torch.float32
        self.masks = not self.compiled
        self._signature: tuple[object, ...] | None = None
        self._forward: Forward | None = None

    def suits(self) -> bool:
        """Whether the model still lies where it would be read this way."""
        return self.compiled == is_compiled(self.model)

    def refresh(self) -> bool:
        """Copy the weights again if they have changed."""
        now = signature(self.model)
        if self._forward is not None and now == self._signature:
            return False
        self._forward = None  # first, so that there are never two copies
        self._forward = fast_forward(self.model, self.format)
        self._signature = now  # last: what Ctrl-C breaks off is begun anew
        return True

    def read(self, ids: Tensor, view: View, last: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """As ``Reader`` says."""
        assert self._forward is not None, "refresh comes first"
        # Training's autocast would multiply in its own format.
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            ends = None if ids.shape[1] == 1 else last
            place = Place(view.store, view.chosen, view.numbers, view.lengths, view.width)
            return self._forward(ids, place, ends)


def signature(model: CausalLM) -> tuple[object, ...]:
    """Something that changes when the model's weights, or the adapters that speak, do.

    Every write in place counts a tensor's version up; what goes past that is not seen: ``.data``,
    and fused optimizers, which is one reason for ``Engine.rest`` before training goes on.
    """
    weights = tuple((id(weight), weight._version) for weight in model.parameters())
    return weights, tuple(slot.active for slot in slots_of(model).values())


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients, for a while.

    Not ``inference_mode``: its tensors could not be used in training afterwards.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
