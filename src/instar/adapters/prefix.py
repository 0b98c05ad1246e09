"""Prefix tuning: keys and values that are learnt, in front of every text.

Shapes: N virtual tokens, L blocks, KV key heads, E head width, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from instar.adapters.base import AdapterConfig, chosen_anew
from instar.adapters.peft_fields import whole_parts_of
from instar.adapters.slots import Part, Slot
from instar.errors import UserError
from instar.model.config import ModelConfig
from instar.model.transformer import Headed

Pairs = list[tuple[Tensor, Tensor]]
"""Keys and values ``(1, KV, N, E)``, a pair for each block."""


class Virtual(Part):
    """Virtual tokens of one adapter."""

    @property
    def length(self) -> int:
        """How many there are."""
        raise NotImplementedError

    def keys_values(self, decoder: Any) -> Pairs:
        """What the blocks see of them."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """What an adapter's file holds: PEFT's key, without the path of a layer."""
        raise NotImplementedError


class Prefixes(Slot):
    """Where such adapters sit: in front of a decoder (its ``prefix``)."""

    @property
    def length(self) -> int:
        """Virtual tokens of the active adapter; 0 where it has none.

        Raises:
            UserError: Rows have adapters of different lengths.
        """
        names = (self.active,) if self.by_row is None else self.by_row
        lengths = {name: len_of(self.part(name)) for name in names}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name or 'the base'} {n}" for name, n in lengths.items())
            raise UserError(
                f"rows of one batch have different numbers of virtual tokens ({found})",
                "Put them into batches of their own.",
            )
        return next(iter(lengths.values()), 0)

    @property
    def longest(self) -> int:
        """Virtual tokens of the adapter that has the most, whoever is active."""
        return max(map(len_of, self.deltas.values()), default=0)

    def keys_values(self, decoder: Any) -> Pairs:
        """The active adapter's, or one row of each row's."""
        if self.by_row is None:
            return self._pairs(self.active, decoder)
        made = {name: self._pairs(name, decoder) for name in set(self.by_row)}
        chosen = [made[name] for name in self.by_row]
        return [
            (torch.cat([k for k, _ in block]), torch.cat([v for _, v in block]))
            for block in zip(*chosen, strict=True)
        ]

    def _pairs(self, name: str | None, decoder: Any) -> Pairs:
        part = self.part(name)
        assert isinstance(part, Virtual)
        return part.keys_values(decoder)


def len_of(part: nn.Module | None) -> int:
    """Virtual tokens of an adapter's part, if it has one."""
    return part.length if isinstance(part, Virtual) else 0


def virtual_lengths(model: Headed, names: Sequence[str | None]) -> list[int]:
    """How many virtual tokens each adapter has before its texts."""
    places = model.model.prefix
    if not isinstance(places, Prefixes):
        return [0] * len(names)
    return [len_of(places.part(name)) for name in names]


def put_before(model: Headed, name: str, virtual: Virtual) -> None:
    """Add an adapter's virtual tokens; the slot is made where there is none."""
    decoder = model.model
    if not isinstance(decoder.prefix, Prefixes):
        decoder.prefix = Prefixes()
    decoder.prefix.deltas[name] = virtual.to(decoder.embeddings.weight.device)


class PrefixConfig(AdapterConfig):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190, section 4)."""

    method: Literal["prefix"] = "prefix"  # type: ignore[assignment]
    """Which method."""
    num_virtual_tokens: Annotated[int, Gt(0)] = 20
    """How many tokens the prefix is long."""
    start: Literal["words", "random"] = "words"
    """`words`: keys and values of random tokens of the vocabulary, as the model computes them,
    which the paper finds better than random numbers where data is scarce (section 7.4); `random`:
    normal numbers, as PEFT has it. With `projection` it is always random."""
    projection: bool = False
    """Whether the prefix is made by a small network from smaller embeddings while it is trained
    (section 4.3). What is stored is what it makes: a plain prefix."""
    projection_width: Annotated[int, Gt(0)] | None = None
    """Width of that network; that of all key heads together when left out."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """A prefix of words, or of random numbers."""
        config, n = model.config, self.num_virtual_tokens
        if self.projection:
            virtual = ProjectedPrefix(config, n, self.projection_width, generator)
        else:
            virtual = LearntPrefix(config, n)
            with torch.no_grad():
                if self.start == "words":
                    ids = torch.randint(config.vocab_size, (n,), generator=generator)
                    virtual.prompt_embeddings.copy_(flat(words(model, ids)))
                else:
                    virtual.prompt_embeddings.normal_(generator=generator)
        put_before(model, name, virtual)

    def to_peft(self) -> dict[str, Any]:
        """PEFT's `PrefixTuningConfig`, of a plain prefix; it asks the model for its sizes."""
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "modules_to_save": self.modules_to_save or None,
        }

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """The settings in PEFT's `adapter_config.json`; PEFT stores a plain prefix as well."""
        return cls.parse(virtual_values(values), "adapter_config.json")


def virtual_values(values: dict[str, Any]) -> dict[str, Any]:
    """What PEFT's record says of virtual tokens, in our words.

    Raises:
        UserError: ``num_transformer_submodules`` is not 1: it is for an encoder and a decoder.
    """
    parts = values.get("num_transformer_submodules") or 1
    if parts != 1:
        raise UserError(
            f"num_transformer_submodules is {parts}: an adapter for an encoder and a decoder",
            "instar's models are decoders alone.",
        )
    return {
        "num_virtual_tokens": values.get("num_virtual_tokens"),
        "start": "random",  # what is read takes its place
        "modules_to_save": whole_parts_of(values),
    }


class LearntPrefix(Virtual):
    """Numbers that are keys and values. Keys are learnt as they are looked at: not rotated.

    Args:
        config: Of the model.
        length: Virtual tokens.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        self.prompt_embeddings = nn.Parameter(torch.zeros(length, torch.Size(self.shape).numel()))

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.prompt_embeddings)

    def keys_values(self, decoder: Any) -> Pairs:
        """The numbers in their places."""
        return pairs(self.prompt_embeddings, self.shape)

    def stored(self) -> dict[str, Tensor]:
        """The numbers."""
        return {"prompt_embeddings": self.prompt_embeddings.detach()}


class ProjectedPrefix(Virtual):
    """Embeddings, and two layers with tanh between them that make keys and values of them.

    Args:
        config: Of the model.
        length: Virtual tokens.
        width: Of the layer in the middle.
        generator: Draws all weights.
    """

    def __init__(
        self, config: ModelConfig, length: int, width: int | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        token = config.num_key_value_heads * config.head_dim
        width = width or token
        self.embedding = nn.Embedding(length, token)
        made = torch.Size(self.shape).numel()
        self.transform = nn.Sequential(nn.Linear(token, width), nn.Tanh(), nn.Linear(width, made))
        with torch.no_grad():
            self.embedding.weight.normal_(generator=generator)
            for layer in (self.transform[0], self.transform[2]):
                assert isinstance(layer, nn.Linear)
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()

    @property
    def length(self) -> int:
        """How many there are."""
        return self.embedding.num_embeddings

    def keys_values(self, decoder: Any) -> Pairs:
        """What the network makes of the embeddings."""
        return pairs(self.transform(self.embedding.weight), self.shape)

    def stored(self) -> dict[str, Tensor]:
        """What the network makes: a plain prefix."""
        return {"prompt_embeddings": self.transform(self.embedding.weight).detach()}


def pairs(numbers: Float[Tensor, "n all"], shape: tuple[int, int, int, int]) -> Pairs:
    """Keys and values from PEFT's order: token by token, each ``(L, 2, KV, E)``."""
    blocks = numbers.view(-1, *shape).permute(1, 2, 3, 0, 4)
    return [(keys[None], values[None]) for keys, values in blocks]


def flat(pairs: Pairs) -> Float[Tensor, "n all"]:
    """The way back."""
    blocks = torch.stack([torch.cat(pair) for pair in pairs])
    return blocks.permute(3, 0, 1, 2, 4).flatten(1)


def words(model: Headed, ids: Int[Tensor, " n"]) -> Pairs:
    """Keys and values of tokens at the beginning of a text, as the model computes them."""
    table = model.model.embeddings.weight
    return read(model.model, table[ids.to(table.device)])


class Witness:
    """Keeps the keys and values that pass by; a ``Past`` without a past."""

    def __init__(self) -> None:
        self.pairs: Pairs = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep them."""
        self.pairs.append((keys, values))
        return keys, values


def read(decoder: Any, embedded: Float[Tensor, "n d"]) -> Pairs:
    """Keys and values that the base alone computes of embeddings at the beginning of a text."""
    witness = Witness()
    positions = torch.arange(len(embedded), device=embedded.device)[None]
    with chosen_anew(decoder, None):
        decoder.run(embedded[None], positions, None, witness)
    return witness.pairs
