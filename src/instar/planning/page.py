"""The plan as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from instar.planning.hardware import Hardware
from instar.planning.prediction import Prediction, StagePlan
from instar.planning.thumb import MISLEADS, rules

GIB = 2**30

PARTLY = (
    "where only some weights learn, steps that were not tried whole are foreseen as if the "
    "gradients of all were computed, which is up to a third too long; what decoding four-bit "
    "weights takes, and what adapters keep of a pass, is left out."
)
"""What the prediction of a stage that does not train all weights leaves out."""


def show(
    plans: Mapping[str, StagePlan],
    hardware: Hardware,
    known: Mapping[str, Mapping[str, Any]],
    console: Console,
) -> None:
    """Print what every stage will take, what takes it, and what rules of thumb say.

    Args:
        plans: By stage.
        hardware: Where they are to run.
        known: By stage, the cost of an earlier run; shown beside the prediction.
        console: Where to print.
    """
    peak = f"{hardware.flops / 1e12:,.2f} TFLOP/s"
    console.print(
        f"[bold]{hardware.name}[/bold]: {hardware.world_size} × {peak} in matrix products, "
        f"{hardware.memory_bytes / GIB:.0f} GiB ({hardware.source})"
    )
    console.print(_stages(plans, hardware, known))
    console.print(_parts("Memory", plans, lambda p: p.memory, _gib))
    console.print(_parts("Time", plans, lambda p: p.seconds, _time))
    console.print(_thumbs(plans, known))
    if any(one.work.weights.share < 1 for one in plans.values()):
        console.print(f"[bold]frozen weights[/bold]: {PARTLY}")
    for name, sentence in MISLEADS.items():
        console.print(f"[bold]{name}[/bold]: {sentence}")


def _stages(
    plans: Mapping[str, StagePlan], hardware: Hardware, known: Mapping[str, Mapping[str, Any]]
) -> Table:
    """A row a stage and way of sharing; `took` and `held` are an earlier run's."""
    table = Table(title="What each stage will take")
    for column in ("stage", "tokens", "tokens/s", "time", "memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    extra = hardware.is_cpu
    for column in ("in a life", "took", "held") if extra else ("shared", "fits"):
        table.add_column(column, justify="right")
    for name, one in plans.items():
        for sharding, p in one.alone.items():
            row = [
                name,
                _count(p.tokens),
                _count(p.tokens / p.wall_s),
                _time(p.wall_s),
                _gib(p.memory_bytes),
            ]
            if extra:
                cost = known.get(name, {})
                row += [_gib(one.in_life)]
                row += [_time(cost["wall_s"]), _gib(cost["peak_rss_bytes"])] if cost else ["–", "–"]
            else:
                fits = p.memory_bytes <= hardware.memory_bytes
                row += [sharding if len(one.alone) > 1 else "–", "yes" if fits else "no"]
            table.add_row(*row)
    return table


def _parts(title: str, plans: Mapping[str, StagePlan], of: Any, written: Any) -> Table:
    """What takes it, a row a part, for the first way of sharing."""
    firsts: dict[str, Prediction] = {n: next(iter(p.alone.values())) for n, p in plans.items()}
    table = Table(title=f"{title}, by part")
    table.add_column("")
    for stage in firsts:
        table.add_column(stage, justify="right")
    for part in dict.fromkeys(part for p in firsts.values() for part in of(p)):
        found = [of(p).get(part) for p in firsts.values()]
        table.add_row(part, *("–" if amount is None else written(amount) for amount in found))
    return table


def _thumbs(plans: Mapping[str, StagePlan], known: Mapping[str, Mapping[str, Any]]) -> Table:
    """The rules, each beside what is reckoned here."""
    table = Table(title="Rules of thumb, and what is reckoned here")
    table.add_column("stage")
    table.add_column("rule")
    table.add_column("it says", justify="right")
    table.add_column("reckoned here", justify="right")
    table.add_column("held", justify="right")
    for name, one in plans.items():
        p = next(iter(one.alone.values()))
        thumb = rules(one.work.model, p.tokens)
        held = _gib(known[name]["peak_rss_bytes"]) if name in known else "–"
        size = one.work.model.parameters()
        table.add_row(name, "P = L(4d² + dV)", _count(thumb.parameters), _count(size), "–")
        table.add_row("", "28 P bytes", _gib(thumb.memory_bytes), _gib(p.memory_bytes), held)
        table.add_row("", "6 P N", f"{thumb.flops:.1e}", f"{p.flops:.1e}", "–")
    return table


def _count(number: float) -> str:
    """A number for people: ``940``, ``61.4k``, ``2.16M``, ``2.52B``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _gib(amount: float) -> str:
    """Bytes for people."""
    if amount < GIB:
        return f"{amount / 2**20:.0f} MiB"
    return f"{amount / GIB:.2f} GiB" if amount < 10 * GIB else f"{amount / GIB:.0f} GiB"


def _time(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"
