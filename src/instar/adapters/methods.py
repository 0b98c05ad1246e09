"""Every method of adapting, by our name and by PEFT's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from instar.adapters.adalora import AdaLoRAConfig
from instar.adapters.base import AdapterConfig
from instar.adapters.bitfit import BitFitConfig
from instar.adapters.bottleneck import BottleneckConfig
from instar.adapters.dora import DoRAConfig
from instar.adapters.ia3 import IA3Config
from instar.adapters.lora import LoRAConfig
from instar.adapters.prefix import PrefixConfig
from instar.adapters.prompt import PromptConfig
from instar.adapters.relora import ReLoRAConfig
from instar.errors import UserError

Method = Annotated[
    LoRAConfig
    | DoRAConfig
    | ReLoRAConfig
    | AdaLoRAConfig
    | IA3Config
    | BitFitConfig
    | BottleneckConfig
    | PrefixConfig
    | PromptConfig,
    Field(discriminator="method"),
]
"""The settings of one of them, told apart by `method`."""

IN_PEFT = {
    "LORA": LoRAConfig,
    "ADALORA": AdaLoRAConfig,
    "IA3": IA3Config,
    "PREFIX_TUNING": PrefixConfig,
    "PROMPT_TUNING": PromptConfig,
}
"""Those that PEFT has, by its `peft_type`; a LoRA may be marked as DoRA besides, and what ReLoRA
has learnt is one."""

OWN = "instar_method"
"""The key of a record that PEFT could not read."""


def described(config: AdapterConfig) -> dict[str, Any]:
    """What `adapter_config.json` holds for a method: PEFT's words, or ours where it has none."""
    if isinstance(config, (DoRAConfig, ReLoRAConfig, *IN_PEFT.values())):
        return config.to_peft()
    return {OWN: config.model_dump(mode="json")}


def understood(values: dict[str, Any]) -> AdapterConfig:
    """The method that an `adapter_config.json` describes.

    Raises:
        UserError: There is no such method here, or it asks for something that is not.
    """
    if OWN in values:
        try:
            return TypeAdapter(Method).validate_python(values[OWN])
        except ValidationError as error:
            raise UserError(
                f"adapter_config.json: `{OWN}` is no method ({error.errors()[0]['msg']})",
                "Was it written by a later version?",
            ) from None
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in IN_PEFT:
        raise UserError(
            f"adapter_config.json: peft_type is {kind!r}", f"instar reads {', '.join(IN_PEFT)}."
        )
    method = DoRAConfig if kind == "LORA" and values.get("use_dora") else IN_PEFT[kind]
    return method.from_peft(values)
