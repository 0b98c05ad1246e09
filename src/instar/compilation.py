"""Compiled code where a long run asks for it, and the same functions as written elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_compiled = False
"""Whether code is compiled now, in every thread: a GPU's backward pass runs in one of its own, and
what it computes again must be computed as it was the first time."""


@contextmanager
def compiled(enabled: bool = True) -> Iterator[None]:
    """Within this context, every ``compilable`` function runs as compiled code.

    It lasts as long as the block, for all threads, backward passes within it included: a loop that
    trains within it leaves sampling and validation, whose shapes change all the time, as they are.
    """
    global _compiled
    before, _compiled = _compiled, enabled
    try:
        yield
    finally:
        _compiled = before


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that ``compiled`` may compile; elsewhere it runs as it is written.

    A method of a module may be marked: modules of one class share the code, and their weights
    keep their names. The compiler (Ansel et al. 2024, "PyTorch 2", ASPLOS) fuses what lies
    between matrix products into few passes over memory, and is loaded when it is first needed.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen = _compile(function) if _compiled else function
        return chosen(*args, **kwargs)

    return call


@functools.cache
def _compile(function: Callable[P, R]) -> Callable[P, R]:
    import torch

    return torch.compile(function)
