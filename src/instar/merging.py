"""Models without training: an adapter merged into its base, or several models made into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

import instar
from instar.adapters.io import CONFIG, holds_scores, is_adapter
from instar.adapters.opening import (
    content_of,
    generation_settings,
    load_model,
    load_tokenizer,
    merged,
    plain_directory,
)
from instar.adapters.vectors import dare, ties
from instar.checkpoint import read_dtype, read_model_config, save_model
from instar.errors import UserError
from instar.exchange.importing import Kept
from instar.files import atomic_directory
from instar.hub import located
from instar.lineage import Cost, Stopwatch, hash_value, peak_rss_bytes, write_lineage
from instar.model import CausalLM, ScoreModel
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.reading import read_files, read_object
from instar.training.display import Display

Method = Literal["average", "slerp", "ties", "dare"]
Mix = Callable[[list[Tensor], Tensor | None], Tensor]
"""One tensor of the product, from those of the models and that of the base."""

PARALLEL = 1e-4
"""Sine of the angle below which two directions count as one, and a straight line is taken."""


@dataclass
class Arguments:
    """Merge an adapter into its base, or make one model out of several of the same shape.

    With one directory, which must be an adapter, the product is a model that says the same without
    it. With several, `average` takes the mean of the weights (model soups), `slerp` goes from the
    first to the second along the sphere; what each model learnt since a common base, `ties`
    averages and `dare` adds up. The tokenizer, the longest context and what is recommended for
    sampling are those of the first.
    """

    models: Annotated[list[Path], tyro.conf.Positional]
    """An adapter, or two or more checkpoints: directories or names on the hub."""
    out: Path
    """Directory to write."""
    method: Method = "average"
    """How several models become one."""
    weights: list[float] = field(default_factory=list)
    """One a model. Of `average` and `slerp` only their shares count; equal ones by default. Of
    `ties` and `dare` they are factors of what each model learnt: by default 1, and of `dare`, which
    adds up where `ties` takes means, one over the number of models."""
    density: float = 0.5
    """Of `ties` and `dare`: the share of each model's changes that is kept."""
    base: Path | None = None
    """Of `ties` and `dare`: the checkpoint that all of them began with. Of an adapter: where its
    base lies, if not where the adapter says."""
    seed: int = 0
    """Of `dare`: decides which changes are kept."""
    dtype: Kept = "keep"
    """How to store the weights. keep: as those of the first model, or of the adapter's base."""


def main(argv: list[str]) -> int:
    """The verb ``merge``."""
    arguments = tyro.cli(Arguments, args=argv, prog="instar merge", description=Arguments.__doc__)
    with Display() as display:
        display.note(f"merge: wrote {merge(arguments)}")
    return 0


def merge(arguments: Arguments) -> Path:
    """Write the product's directory, with all parents in its ``lineage.json``.

    Raises:
        UserError: The models do not fit together, or an option does not fit the method.
    """
    watch, models, base = Stopwatch(), arguments.models, arguments.base
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists", "Choose another --out.")
    if len(models) > 1:
        mix = _mix(arguments, _factors(arguments))
    else:
        mix = None
        _check_single(arguments)
    here = _fetched(arguments)
    product, tokenizer = _mixed(here, mix) if mix else _merged(here.models[0], here.base)
    generation = generation_settings(here.models[0], here.base)
    kept = read_dtype(plain_directory(here.models[0], here.base))
    settings = {k: v for k, v in asdict(arguments).items() if k != "out"}
    settings |= {"models": [str(m) for m in models], "base": str(base or "") or None}
    parents = zip(_parents(arguments), _parents(here), strict=True)
    record: dict[str, Any] = {
        "config": {"stage": "merge", **settings},
        "data": {},
        "parents": {str(name): content_of(place, here.base) for name, place in parents},
        "version": instar.__version__,
    }
    record["fingerprint"] = hash_value(record)
    with atomic_directory(arguments.out) as directory:
        dtype = kept if arguments.dtype == "keep" else arguments.dtype
        save_model(product, directory, tokenizer, dtype=dtype, generation=generation)
        cost = Cost(watch.wall_s, watch.cpu_s, peak_rss_bytes=peak_rss_bytes())
        size = sum(p.numel() for p in product.parameters())
        write_lineage(directory, record | {"stage": "merge", "parameters": size}, cost)
    return arguments.out


def _fetched(arguments: Arguments) -> Arguments:
    """The same with directories in place of names on the hub."""
    base = located(arguments.base) if arguments.base else None
    return replace(arguments, models=[located(path) for path in arguments.models], base=base)


def _parents(arguments: Arguments) -> list[Path]:
    """What the product is made from."""
    return [*arguments.models, *([arguments.base] if arguments.base else [])]


def _merged(directory: Path, base: Path | None) -> tuple[CausalLM | ScoreModel, Tokenizer]:
    """An adapter's base with the adapter in its weights, and their tokenizer."""
    if not is_adapter(directory):
        raise UserError(
            f"{directory} is no adapter: it has no {CONFIG}",
            "Name an adapter, or two or more checkpoints.",
        )
    return merged(directory, base), load_tokenizer(directory, base)


def _check_single(arguments: Arguments) -> None:
    """Raise ``UserError`` where something is said of one adapter that only several models need."""
    usual = Arguments(arguments.models, arguments.out)
    for name in ("method", "weights", "density", "seed"):
        if getattr(arguments, name) != getattr(usual, name):
            raise UserError(
                f"--{name} says how several models become one, and there is one directory",
                "Name more of them, or leave it out: an adapter is merged as it is.",
            )


def _mixed(arguments: Arguments, mix: Mix) -> tuple[CausalLM | ScoreModel, Tokenizer]:
    """Several models as one, and the tokenizer of the first."""
    paths = _parents(arguments)
    for path in paths:
        _check_alike(paths[0], path)
    models = [load_model(path) for path in paths]
    weights = [dict(model.named_parameters()) for model in models]
    base = weights.pop() if arguments.base else {}
    with torch.no_grad():
        for name, weight in models[0].named_parameters():
            weight.copy_(mix([own[name].detach() for own in weights], base.get(name)))
    return models[0], Tokenizer.load(paths[0])


def _factors(arguments: Arguments) -> list[float]:
    """One factor a model; together one, where models and not what they learnt are added up."""
    count, method = len(arguments.models), arguments.method
    weights = arguments.weights or [1.0 if method == "ties" else 1 / count] * count
    if len(weights) != count or sum(weights) <= 0 or min(weights) < 0:
        raise UserError(
            f"--weights is {weights}, for {count} models",
            "Give one weight a model, none of them negative and not all of them zero.",
        )
    if method in ("ties", "dare"):
        return weights
    return [weight / sum(weights) for weight in weights]


def _mix(arguments: Arguments, factors: list[float]) -> Mix:
    """The method as a function of one tensor of each model.

    Raises:
        UserError: It cannot be used on these.
    """
    method, density = arguments.method, arguments.density
    needs_base = method in ("ties", "dare")
    if needs_base != (arguments.base is not None):
        raise UserError(
            f"--method {method} {'needs' if needs_base else 'has no use for'} a --base",
            "Name the checkpoint that all models began with." if needs_base else "Leave it out.",
        )
    if not 0 < density <= 1:
        raise UserError(f"--density is {density}", "Give a share above 0 and up to 1.")
    if method == "average":
        return lambda tensors, _: average(tensors, factors)
    if method == "slerp":
        if len(factors) != 2:
            raise UserError(f"slerp is for two models, not {len(factors)}", "Use average.")
        return lambda tensors, _: slerp(tensors[0], tensors[1], factors[1])

    generator = torch.Generator().manual_seed(arguments.seed)

    def changed(tensors: list[Tensor], base: Tensor | None) -> Tensor:
        assert base is not None
        learnt = [tensor - base for tensor in tensors]
        if method == "ties":
            return base + ties(learnt, factors, density)
        return base + dare(learnt, factors, density, generator)

    return changed


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum_i share_i w_i``, a model soup (Wortsman et al. 2022, arXiv:2203.05482).

    Args:
        tensors: The same weight of each model.
        shares: Together one.
    """
    return torch.stack([share * w for share, w in zip(shares, tensors, strict=True)]).sum(dim=0)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical linear interpolation (Shoemake 1985, "Animating rotation with quaternion curves").

    ``sin((1-t) omega) / sin(omega) a + sin(t omega) / sin(omega) b`` with omega the angle between
    both, taken as vectors. The straight mean of two long vectors that point elsewhere is shorter
    than either; on the sphere the length stays. Where they have one direction, or opposite ones,
    the circle is not defined, and the straight line is taken.

    Args:
        first: A weight of the first model, a.
        second: The same of the second, b.
        t: How far to go from the first (0) to the second (1).
    """
    a, b = first.double().flatten(), second.double().flatten()
    lengths = a.norm() * b.norm()
    cosine = (a @ b / lengths).clamp(-1, 1) if lengths > 0 else torch.ones((), dtype=a.dtype)
    omega = torch.acos(cosine)
    if torch.sin(omega) < PARALLEL:
        mixed = (1 - t) * a + t * b
    else:
        mixed = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)
    return mixed.view_as(first).to(first.dtype)


def _check_alike(first: Path, second: Path) -> None:
    """Raise ``UserError`` if two checkpoints have no common weights, or mean other tokens."""
    if is_adapter(second):
        raise UserError(f"{second} is an adapter", "Merge it into its base first.")
    kinds = ["reward" if holds_scores(path) else "language" for path in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{first} holds a {kinds[0]} model, {second} a {kinds[1]} model",
            "Merge models of one kind.",
        )
    shapes, others = _shape(first), _shape(second)
    different = [name for name in shapes | others if shapes.get(name) != others.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{name} is {shapes.get(name)} in {first} and {others.get(name)} in {second}",
            "Merge models of one shape.",
        )
    if _tokens(first) != _tokens(second):
        raise UserError(
            f"{first} and {second} have different tokenizers", "Merge models that share one."
        )


def _shape(directory: Path) -> dict[str, Any]:
    """What of a model's config its weights depend on."""
    config = read_model_config(directory)
    others = {"initializer_range"}
    if config.family != "gpt2":  # whose positions are weights; rotary ones reach any length
        others.add("max_position_embeddings")
    return config.model_dump(exclude=others)


def _tokens(directory: Path) -> dict[str, Any]:
    """A tokenizer as a value, also where it lies in two files as GPT-2's did at first."""
    Tokenizer.load(directory)  # says what is wrong with it, if anything is
    return read_object(read_files(directory), "tokenizer.json")
