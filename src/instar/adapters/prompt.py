"""Prompt tuning: embeddings that are learnt, in front of every text.

Shapes: N virtual tokens, D model width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn

from instar.adapters.base import AdapterConfig
from instar.adapters.prefix import Pairs, Virtual, put_before, read, virtual_values
from instar.errors import UserError
from instar.hub import located
from instar.model.transformer import Headed
from instar.tokenizer.hf import Tokenizer

STARTS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
"""Our words and PEFT's."""


class PromptConfig(AdapterConfig):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691, section 2)."""

    needs_whole = True

    method: Literal["prompt"] = "prompt"  # type: ignore[assignment]
    """Which method."""
    num_virtual_tokens: Annotated[int, Gt(0)] = 20
    """How many tokens the prompt is long."""
    start: Literal["random", "vocabulary", "text"] = "vocabulary"
    """`random`: numbers between -0.5 and 0.5; `vocabulary`: the embeddings of random tokens, any of
    them as in PEFT, which the paper, with the 5,000 most frequent, finds better (section 3.2);
    `text`: those of `text`."""
    text: str = ""
    """What to begin from where `start` is `text`; repeated or cut to the prompt's length."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that reads `text`, or a name on the hub."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """A prompt of numbers, tokens or text."""
        n, table = self.num_virtual_tokens, model.model.embeddings.weight.detach()
        if self.start == "random":
            first = torch.rand(n, table.shape[1], generator=generator) - 0.5
        else:
            ids = torch.randint(len(table), (n,), generator=generator)
            if self.start == "text":
                ids = torch.tensor(self._text_ids())
            first = table[ids.to(table.device)].float()
        put_before(model, name, LearntPrompt(first))

    def _text_ids(self) -> list[int]:
        if self.tokenizer is None:
            raise UserError("start is text, but there is no `tokenizer`", "Name its directory.")
        ids = Tokenizer.load(located(self.tokenizer)).encode(self.text)
        if not ids:
            raise UserError("start is text, but `text` is empty", "Write what to begin from.")
        return (ids * math.ceil(self.num_virtual_tokens / len(ids)))[: self.num_virtual_tokens]

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `PromptTuningConfig`; it asks the model for its sizes."""
        values: dict[str, Any] = {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": STARTS[self.start],
            "modules_to_save": self.modules_to_save or None,
        }
        if self.start == "text":
            values["prompt_tuning_init_text"] = self.text
            values["tokenizer_name_or_path"] = str(self.tokenizer)
        return values

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """The settings in PEFT's `adapter_config.json`, but for how the prompt once began."""
        return cls.parse(virtual_values(values), "adapter_config.json")


class LearntPrompt(Virtual):
    """Embeddings that stand in front of a text, as a prefix.

    They see nothing but themselves, so they are the same before every text: one row of them
    through the blocks gives the keys and values that all rows of a batch look back on. That is
    equal to standing in front of each row, and cheaper.

    Args:
        first: The embeddings to begin with.
    """

    def __init__(self, first: Float[Tensor, "n d"]) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(first.clone())

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.prompt_embeddings)

    def keys_values(self, decoder: Any) -> Pairs:
        """What the blocks make of them."""
        return read(decoder, self.prompt_embeddings.to(next(decoder.embeddings.parameters()).dtype))

    def stored(self) -> dict[str, Tensor]:
        """The embeddings."""
        return {"prompt_embeddings": self.prompt_embeddings.detach()}
