"""Compiled code where a long run asks for it, and the same functions as written elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_COMPILED: ContextVar[bool] = ContextVar("compiled", default=False)


@contextmanager
def compiled(enabled: bool = True) -> Iterator[None]:
    """Within this context, every ``compilable`` function runs as compiled code.

    Like autocast it reaches what is called inside, and only that: a loop that trains within it
    leaves sampling and validation, whose shapes change all the time, as they are.
    """
    token = _COMPILED.set(enabled)
    try:
        yield
    finally:
        _COMPILED.reset(token)


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that ``compiled`` may compile; elsewhere it runs as it is written.

    A method of a module may be marked: modules of one class share the code, and their weights
    keep their names. The compiler (Ansel et al. 2024, "PyTorch 2", ASPLOS) fuses what lies
    between matrix products into few passes over memory, and is loaded when it is first needed.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen = _compile(function) if _COMPILED.get() else function
        return chosen(*args, **kwargs)

    return call


@functools.cache
def _compile(function: Callable[P, R]) -> Callable[P, R]:
    import torch

    return torch.compile(function)
