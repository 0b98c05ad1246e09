"""All stages by name; reading this imports every one of them."""

from __future__ import annotations

from typing import Any

from instar.stages import corpus, data, dpo, ppo, pretrain, reward, rlvr, sft, tokenizer
from instar.stages.base import Stage

STAGES: dict[str, Stage[Any]] = {
    module.STAGE.name: module.STAGE
    for module in (data, corpus, tokenizer, pretrain, sft, reward, dpo, ppo, rlvr)
}
