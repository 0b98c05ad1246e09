"""What all adapters share: where they sit, which one speaks, and how they are merged in."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from instar.adapters.packed import Packed
from instar.adapters.slots import Adapted, Delta, Slot, Whole, rebuilt
from instar.adapters.targets import linear_layers
from instar.adapters.tokens import tie_again
from instar.config import Config
from instar.errors import UserError
from instar.model.transformer import Headed

DEFAULT = "default"
"""Name of an adapter where there is only one."""

H = TypeVar("H", bound=Headed)


class AdapterConfig(Config):
    """A method of adapting, and its settings: what all of them can do."""

    needs_whole: ClassVar[bool] = False
    """Whether it looks at weights outside of the blocks' own passes, where shards are not whole."""
    begins_anew: ClassVar[bool] = False
    """Whether weights that learn are replaced on the way, so that neither their average nor their
    distance from the start means anything."""
    unknown_to_peft: ClassVar[tuple[str, ...]] = ()
    """Settings of the learning that ``to_peft`` has no word for; `base.json` holds them."""

    method: str
    """Which method."""
    modules_to_save: list[str] = []
    """Parts of the model that are trained whole beside the adapter, by the end of their paths:
    PEFT's word, and its sense, so that `norm` means all norms, and `model.norm` the last one. A
    reward model's head is always among them."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        """Put fresh weights into a model, under a name.

        Nothing about its outputs changes yet, but for prefixes and prompts, which cannot be there
        without being seen.

        Raises:
            UserError: A target matches nothing.
        """
        raise NotImplementedError

    def check_run(self, steps: int) -> None:
        """See that a run of so many steps is long enough for the method's own schedule.

        Raises:
            UserError: It is not.
        """

    def stepped(self, model: Headed, name: str, step: int, steps: int) -> Sequence[nn.Parameter]:
        """Told after every optimizer step, while gradients are still there.

        Args:
            model: The model that learns.
            name: The adapter's name in it.
            step: Steps done, this one included.
            steps: Steps of the whole run.

        Returns:
            Parameters that begin anew, of which the optimizer is to forget what it knew.
        """
        return ()

    def penalty(self, model: Headed, name: str) -> Tensor | None:
        """What is added to the mean loss of a step (a scalar with gradient), if anything is."""

    def settings_in(self, model: Headed, name: str) -> dict[str, Any]:
        """What `adapter_config.json` holds beside ``to_peft``: what only the model tells."""
        return {}

    def to_peft(self) -> dict[str, Any]:
        """What `adapter_config.json` holds for it, base and task apart.

        Raises:
            UserError: PEFT has no such method.
        """
        raise UserError(
            f"PEFT has no method {self.method!r}", "Merge the adapter, or keep it here."
        )


def put_in(model: Headed, path: str, name: str, delta: Delta) -> None:
    """Add an adapter's delta at a layer; a slot is put around the layer where there is none.

    The delta takes over the layer's device.
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, Adapted):
        parent, _, child = path.rpartition(".")
        layer = Adapted(layer)
        setattr(model.get_submodule(parent), child, layer)
    layer.deltas[name] = delta.to(layer.weight.device)


def slots(model: nn.Module) -> dict[str, Slot]:
    """All slots by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Slot)}


def activate(model: Headed, name: str | None) -> None:
    """Let one adapter speak, or with ``None`` the base alone.

    Raises:
        UserError: The model has no such adapter.
    """
    check_loaded(model, name)
    for slot in slots(model).values():
        slot.active, slot.by_row = name, None


def check_loaded(model: Headed, name: str | None) -> None:
    """Raises ``UserError`` if the model has no adapter of that name."""
    if name is not None and name not in model.adapters:
        known = ", ".join(model.adapters) or "none"
        raise UserError(f"no adapter {name!r} is loaded", f"Loaded: {known}.")


def check_free(model: Headed, name: str) -> None:
    """Raises ``UserError`` if the model has an adapter of that name."""
    if name in model.adapters:
        raise UserError(f"there is an adapter {name!r} already", "Choose another name.")


@contextmanager
def using(model: Headed, name: str | None) -> Iterator[None]:
    """One adapter, or with ``None`` the base alone, for a while."""
    check_loaded(model, name)
    with chosen_anew(model, name):
        yield


@contextmanager
def chosen_anew(
    module: nn.Module, name: str | None, by_row: tuple[str | None, ...] | None = None
) -> Iterator[None]:
    """Set every slot within a module, and set it back afterwards."""
    before = {slot: (slot.active, slot.by_row) for slot in slots(module).values()}
    for slot in before:
        slot.active, slot.by_row = name, by_row
    try:
        yield
    finally:
        for slot, choice in before.items():
            slot.active, slot.by_row = choice


def add(model: Headed, config: AdapterConfig, seed: int = 0, name: str = DEFAULT) -> None:
    """A fresh adapter: installed, active, and the only thing that learns.

    Args:
        model: Changed in place.
        config: The method.
        seed: Decides the first weights.
        name: What to call it.

    Raises:
        UserError: A target matches nothing, or the name is taken.
    """
    check_free(model, name)
    put_all_in(model, config, name, torch.Generator().manual_seed(seed))
    activate(model, name)
    teach(model, name)


def put_all_in(model: Headed, config: AdapterConfig, name: str, generator: torch.Generator) -> None:
    """Fresh weights of an adapter, and copies of what it trains whole.

    Raises:
        UserError: A target, or a part that is to be trained whole, matches nothing.
    """
    config.install(model, name, generator)
    for end in [*config.modules_to_save, *(["score"] if hasattr(model, "score") else [])]:
        _copy_whole(model, end, name)
    model.adapters[name] = config


def _copy_whole(model: Headed, end: str, name: str) -> None:
    inner = tuple(f"{path}." for path in slots(model))
    found = [p for p, _ in model.named_modules() if p.endswith(end) and not p.startswith(inner)]
    if not found:
        raise UserError(f"modules_to_save: {end!r} matches nothing", "Check its spelling.")
    linear = linear_layers(model)
    for path in found:
        part = model.get_submodule(path)
        if path in linear:
            raise UserError(
                f"modules_to_save: {path} is a linear layer of a block", "Name it in `targets`."
            )
        if not isinstance(part, Whole):
            _check_whole(model, path, part)
            parent, _, child = path.rpartition(".")
            part = Whole(part)
            setattr(model.get_submodule(parent), child, part)
        part.deltas[name] = copy.deepcopy(part.base)


def _check_whole(model: Headed, path: str, part: nn.Module) -> None:
    """Raise ``UserError`` if a part cannot be copied for each adapter."""
    if isinstance(part, Slot):
        raise UserError(
            f"modules_to_save: of {path}, single rows learn already (trainable_token_indices)",
            "Choose one of the two, for all adapters of this model.",
        )
    ends = (model.model.embeddings, getattr(model, "lm_head", None))
    if model.config.tie_word_embeddings and any(part is end for end in ends):
        raise UserError(
            f"modules_to_save: {path} is one matrix with the model's other end",
            "Leave it frozen, or train the model without an adapter.",
        )
    if next(part.children(), None) is not None:
        raise UserError(
            f"modules_to_save: {path} consists of several parts",
            "Name norms, heads and embeddings; layers of the blocks belong into `targets`.",
        )


def remove(model: Headed, name: str) -> None:
    """Take an adapter out; where it spoke, the base alone speaks."""
    model.adapters.pop(name, None)
    for slot in slots(model).values():
        if name in slot.deltas:
            del slot.deltas[name]
        slot.active = None if slot.active == name else slot.active


def teach(model: Headed, name: str) -> None:
    """Freeze everything but one adapter, and what its config trains whole."""
    model.requires_grad_(False)
    for part in learnt_parts(model, name).values():
        part.requires_grad_(True)


def learnt_parts(model: Headed, name: str) -> dict[str, nn.Module]:
    """The modules that an adapter consists of, by the path of the layer that they belong to."""
    return {path: slot.deltas[name] for path, slot in slots(model).items() if name in slot.deltas}


def store_frozen(model: Headed, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of an adapted model's blocks in the format of its products.

    Products under autocast come out the same, and need not cast the matrices each time.
    """
    if model.adapters:
        for layer in linear_layers(model).values():
            for p in (layer.base if isinstance(layer, Adapted) else layer).parameters():
                if not p.requires_grad:
                    p.data = p.data.to(dtype)


def lr_factors(model: nn.Module) -> Mapping[nn.Parameter, float]:
    """Parameters whose learning rate is a multiple of the usual one."""
    return {
        delta.get_parameter(local): factor
        for slot in slots(model).values()
        for delta in slot.deltas.values()
        if isinstance(delta, Delta)
        for local, factor in delta.lr_factors().items()
    }


def stepped(module: nn.Module, step: int, steps: int) -> list[nn.Parameter]:
    """Tell the adapters that learn in ``module`` of an optimizer step; gradients are still there.

    Args:
        module: Holds adapted models.
        step: Steps done, this one included.
        steps: Steps of the whole run.

    Returns:
        Parameters that begin anew.
    """
    return [
        p
        for model in module.modules()
        if isinstance(model, Headed)
        for name, config in model.adapters.items()
        for p in config.stepped(model, name, step, steps)
    ]


def penalties(module: nn.Module) -> list[Tensor]:
    """What the adapters that learn in ``module`` add to the mean loss of a step (scalars)."""
    found = [
        config.penalty(model, name)
        for model in module.modules()
        if isinstance(model, Headed)
        for name, config in model.adapters.items()
    ]
    return [cost for cost in found if cost is not None]


@torch.no_grad()
def merge(model: Headed, name: str = DEFAULT) -> None:
    """Merge an adapter into the weights; the model is a plain one afterwards.

    Args:
        model: Changed in place; other adapters than this one are dropped.
        name: The adapter. A model without any has its packed layers unpacked.

    Raises:
        UserError: There is no such adapter, or its method cannot be merged.
    """
    if model.adapters:
        check_loaded(model, name)
    merged = {path: slot.merged(name) for path, slot in slots(model).items()}
    for path, part in merged.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, part)
    for path, layer in linear_layers(model).items():
        if isinstance(layer, Packed):
            parent, _, child = path.rpartition(".")
            unpacked = rebuilt(layer, layer.weight, layer.bias)
            setattr(model.get_submodule(parent), child, unpacked)
    tie_again(model)
    model.adapters.clear()
    model.requires_grad_(True)


def frozen_twin(model: H, silent: bool = False) -> H:
    """A frozen copy that shares what does not learn: of an adapted model, only the adapter is new.

    Reference models are such twins.

    Args:
        model: What it is a copy of.
        silent: Whether the copy's base speaks alone. A fresh prefix or prompt is seen before it
            has learnt anything, and the model that a run began with had none.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    packed = [layer for layer in model.modules() if isinstance(layer, Packed)]
    shared |= {id(codes): codes for layer in packed for codes in layer.buffers()}
    twin = copy.deepcopy(model, shared).requires_grad_(False).eval()
    if silent:
        activate(twin, None)
    return twin
