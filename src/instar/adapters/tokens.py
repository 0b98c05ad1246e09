"""Some rows of the embedding learn beside an adapter: for tokens that the base never met.

A model that has only read documents has never seen ``<|im_start|>``; no change of its matrices
gives that token a meaning as quickly as a row of its own. PEFT calls it `trainable_token_indices`.

Shapes: B sequences, T tokens, V vocabulary, D width, n tokens that learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters.slots import Part, Slot
from instar.errors import UserError
from instar.model.transformer import CausalLM, Headed

STORED = "token_adapter.trainable_tokens_delta"
"""PEFT's name of the rows, behind that of the embedding."""


class TokenRows(Part):
    """The rows of one adapter: they stand in place of the embedding's own.

    Args:
        ids: Which tokens ``(n,)``.
        rows: Their rows as they are now ``(n, D)``.
    """

    ids: Tensor

    def __init__(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = nn.Parameter(rows.detach().clone())

    def stored(self) -> dict[str, Tensor]:
        """The rows, by PEFT's name, which says delta and means the rows themselves."""
        return {STORED: self.rows.detach()}

    def fill(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        """Take over what ``stored`` gave elsewhere; ``ValueError`` where it does not fit."""
        super().fill({"rows" if name == STORED else name: w for name, w in tensors.items()})


class TokenSlot(Slot):
    """An embedding, some rows of which an adapter may have of its own.

    Args:
        base: The embedding.
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """The table, with the active adapter's rows in it."""
        if self.by_row is not None:
            raise ValueError("rows of the batch have adapters of their own: there is no one table")
        part = self.chosen()
        if not isinstance(part, TokenRows):
            return self.base.weight
        return self.base.weight.index_copy(0, part.ids, part.rows.to(self.base.weight.dtype))

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The tokens' rows."""
        return self.made(ids, self._embedded)

    def _embedded(self, ids: Int[Tensor, "b t"], part: nn.Module | None) -> Float[Tensor, "b t d"]:
        rows = self.base(ids)
        if not isinstance(part, TokenRows):
            return rows
        found = ids[..., None] == part.ids
        own = F.embedding(found.int().argmax(dim=-1), part.rows).to(rows.dtype)
        return torch.where(found.any(dim=-1, keepdim=True), own, rows)

    def logits(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """What a head says whose matrix is the table."""
        return self.made(x, self._spoken)

    def _spoken(self, x: Float[Tensor, "b t d"], part: nn.Module | None) -> Float[Tensor, "b t v"]:
        logits = F.linear(x, self.base.weight)
        if not isinstance(part, TokenRows):
            return logits
        return logits.index_copy(-1, part.ids, F.linear(x, part.rows.to(x.dtype)).to(logits.dtype))

    def merged(self, name: str) -> nn.Module:
        """A plain embedding with the adapter's rows."""
        part = self.part(name)
        if not isinstance(part, TokenRows):
            return self.base
        vocabulary, width = self.base.weight.shape
        table = nn.Embedding(vocabulary, width, device="meta")
        table.weight = nn.Parameter(self.base.weight.index_copy(0, part.ids, part.rows))
        return table


class TiedHead(nn.Module):
    """A head whose matrix is the embedding's, whatever rows stand in it now.

    Args:
        embedding: Whose; it stays where it is in the model, and is not a part of the head.
    """

    def __init__(self, embedding: TokenSlot) -> None:
        super().__init__()
        self._embedding = [embedding]

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """The table."""
        return self._embedding[0].weight

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits."""
        return self._embedding[0].logits(x)


def put_rows_in(model: Headed, name: str, ids: Sequence[int]) -> None:
    """Let some tokens' rows learn with an adapter; a tied head speaks with the same rows.

    Args:
        model: Changed in place.
        name: The adapter.
        ids: The tokens, each once; files hold their rows in this order.

    Raises:
        UserError: An id is none of the vocabulary's.
    """
    if not ids:
        return
    if wrong := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise UserError(
            f"trainable_token_indices: {wrong[0]} is no id of a vocabulary of "
            f"{model.config.vocab_size}",
            "`instar tokenizer encode DIR TEXT --special` shows the ids of tokens.",
        )
    path, embedding = next(
        (path, part) for path, part in model.named_modules() if part is model.model.embeddings
    )
    if not isinstance(embedding, TokenSlot):
        if not isinstance(embedding, nn.Embedding):
            raise UserError(
                f"trainable_token_indices: another adapter trains {path} whole (modules_to_save)",
                "Give each of the two a model of its own, or merge one of them first.",
            )
        slot = TokenSlot(embedding)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, slot)
        if isinstance(model, CausalLM) and model.config.tie_word_embeddings:
            model.lm_head = TiedHead(slot)  # type: ignore[assignment]
        embedding = slot
    chosen = torch.tensor(ids, device=embedding.base.weight.device)
    embedding.deltas[name] = TokenRows(chosen, embedding.base.weight[chosen])


def tie_again(model: Headed) -> None:
    """After merging: a plain head on the plain embedding."""
    if isinstance(model, CausalLM) and isinstance(model.lm_head, TiedHead):
        width, vocabulary = model.config.hidden_size, model.config.vocab_size
        model.lm_head = nn.Linear(width, vocabulary, bias=False, device="meta")
        model.tie()
