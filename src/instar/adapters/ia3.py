"""IA3: one learnt factor for each key, each value, and each neuron of the feed-forward."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from instar.adapters.base import AdapterConfig, learnt_parts, put_in
from instar.adapters.peft_fields import outer_path, targets_of, whole_parts_of
from instar.adapters.slots import Delta, matrix, sizes
from instar.adapters.targets import Targets, frozen, targeted
from instar.errors import UserError
from instar.model.transformer import Headed

PLACES = r".*\.(k_proj|v_proj|down_proj|attn\.c_attn|mlp\.c_proj)"
"""Keys, values and the end of the feed-forward, in all of our families; GPT-2's one matrix for
queries, keys and values is scaled as a whole, as PEFT has it."""

FEEDFORWARD = r".*\.(down_proj|mlp\.c_proj)"
"""The end of the feed-forward."""


class IA3Config(AdapterConfig):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022).

    arXiv:2205.05638, section 3.3: keys and values are multiplied by ``l_k`` and ``l_v``, what goes
    into the last matrix of the feed-forward by ``l_ff``. All begin at 1.
    """

    method: Literal["ia3"] = "ia3"  # type: ignore[assignment]
    """Which method."""
    targets: Targets = PLACES
    """The layers; the paper's by default."""
    feedforward_targets: Targets = FEEDFORWARD
    """Those of them whose input is scaled instead of the output."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """Factors of 1."""
        feedforward = self.feedforward_targets
        inputs = set(targeted(model, feedforward)) if feedforward else set()
        for path in targeted(model, self.targets):
            layer = frozen(model, path)
            put_in(model, path, name, IA3(*sizes(layer), scales_input=path in inputs))

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `IA3Config`."""
        return {
            "peft_type": "IA3",
            "target_modules": self.targets,
            "feedforward_modules": self.feedforward_targets,
            "modules_to_save": self.modules_to_save or None,
        }

    def settings_in(self, model: Headed, name: str) -> dict[str, Any]:
        """The layers by their names: PEFT asks that those of the inputs are listed among all."""
        parts = learnt_parts(model, name).items()
        layers = {outer_path(model, p): part for p, part in parts if isinstance(part, IA3)}
        inputs = [path for path, part in layers.items() if part.scales_input]
        return {"target_modules": list(layers), "feedforward_modules": inputs}

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """The settings in PEFT's `adapter_config.json`.

        Raises:
            UserError: It names no layers, or leaves some out.
        """
        # Without names PEFT has its own for each family: queries instead of keys for Qwen.
        targets = values.get("target_modules")
        if not targets or values.get("exclude_modules"):
            field = "exclude_modules" if targets else "target_modules"
            raise UserError(
                f"adapter_config.json: `{field}` is {values.get(field)!r}",
                "Write the layers that are meant into `target_modules`.",
            )
        inputs = values.get("feedforward_modules")
        ours = {
            "targets": targets_of(values),
            "feedforward_targets": targets_of(values, "feedforward_modules") if inputs else [],
            "modules_to_save": whole_parts_of(values),
        }
        return cls.parse(ours, "adapter_config.json")


class IA3(Delta):
    """``y = l (W x + b)``, or for a feed-forward ``y = W (l x) + b``.

    Args:
        inputs: Of the layer.
        outputs: Of the layer.
        scales_input: Whether the input is scaled.
    """

    def __init__(self, inputs: int, outputs: int, scales_input: bool) -> None:
        super().__init__()
        self.scales_input = scales_input
        # PEFT's shapes: a row beside the inputs, or a column beside the outputs.
        self.ia3_l = nn.Parameter(torch.ones((1, inputs) if scales_input else (outputs, 1)))

    def forward(self, x: Float[Tensor, "... i"], base: nn.Module) -> Float[Tensor, "... o"]:
        """Scaled in the factors' precision: half precision could not hold them near 1."""
        scale = self.ia3_l.flatten()
        if self.scales_input:
            return base((x * scale).to(x.dtype))
        y = base(x)
        return (y * scale).to(y.dtype)

    def merged(self, base: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"] | None]:
        """Rows or columns of the weight, scaled; the bias belongs to the output."""
        weight, bias = matrix(base), base.bias
        scaled = (weight * self.ia3_l).to(weight.dtype)
        if bias is None or self.scales_input:
            return scaled, bias  # type: ignore[return-value]
        return scaled, (bias * self.ia3_l.flatten()).to(bias.dtype)  # type: ignore[operator]
