"""Where the switch between compiled code and plain code reaches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from instar import compilation
from instar.compilation import compilable, compiled


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How ``square`` was run each time; nothing is really compiled."""
    found: list[str] = []

    def mark(function: Callable[[Tensor, list[str]], Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, ran: list[str]) -> Tensor:
            result = function(x, ran)
            ran[-1] = "compiled"
            return result

        return run

    monkeypatch.setattr(compilation, "_compile", mark)
    return found


@compilable
def square(x: Tensor, ran: list[str]) -> Tensor:
    ran.append("plain")
    return x.square()


@pytest.mark.parametrize(("enabled", "told"), [(True, "compiled"), (False, "plain")])
def test_what_a_backward_pass_in_another_thread_computes_again_is_computed_the_same_way(
    enabled: bool, told: str, ran: list[str]
) -> None:
    x = torch.ones(3, requires_grad=True)
    with compiled(enabled), set_checkpoint_early_stop(False):
        loss = checkpoint(square, x, ran, use_reentrant=False)
        assert isinstance(loss, Tensor)
        with ThreadPoolExecutor(1) as device:  # as that in which a GPU's gradients are computed
            device.submit(loss.sum().backward).result()
    assert ran == [told, told]


def test_the_switch_falls_back_to_where_it_was(ran: list[str]) -> None:
    x = torch.ones(3)
    with compiled():
        with pytest.raises(ValueError, match="stop"), compiled(False):
            square(x, ran)
            raise ValueError("stop")
        square(x, ran)
    square(x, ran)
    assert ran == ["plain", "compiled", "plain"]
