"""Requests of several adapters in one batch: each row is computed with its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from instar.adapters.base import check_loaded, chosen_anew
from instar.model.transformer import Headed


@contextmanager
def rows(model: Headed, names: Sequence[str | None]) -> Iterator[None]:
    """For a while, row ``i`` of every batch is computed with the adapter ``names[i]``.

    What a row gives does not depend on its neighbours' adapters.

    Raises:
        UserError: The model has no such adapter.
    """
    for name in names:
        check_loaded(model, name)
    with chosen_anew(model, None, tuple(names)):
        yield
