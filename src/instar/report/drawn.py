"""Drawings written by hand as SVG: whose labels may be in any script, and are only text.

The page's own fonts show them, which matplotlib could not measure; colours are the page's
variables, so that they follow it into dark mode.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

ROW = 44.0
BAR = 26.0
LEFT, MIDDLE, RIGHT = 160.0, 640.0, 280.0
"""Widths of the steps' names, of the flow and of what is told beside it."""

THINNEST = 1.5
"""What was dropped is drawn at least so wide, or a few in a million could not be seen."""

TOLD = 2
"""Rules that are named beside a step; the others are added up."""


@dataclass(frozen=True)
class Step:
    """One step of a flow.

    Attributes:
        name: What it is called.
        came: How much came.
        went: How much went on.
        lost: Reason to how much it took away, the largest first.
    """

    name: str
    came: int
    went: int
    lost: Mapping[str, int] = field(default_factory=dict)


def waterfall(steps: Sequence[Step], unit: str) -> Markup:
    """A flow from top to bottom: what is kept goes on, what is lost ends where it was lost.

    Widths are in proportion, all steps on one scale.

    Args:
        steps: In order; at least one.
        unit: Of what, such as ``documents``.
    """
    scale = MIDDLE / max(1, *(step.went + sum(step.lost.values()) for step in steps))
    parts = list[Markup]()
    for index, step in enumerate(steps):
        parts.append(_row(step, index * ROW + 6, scale))
        if index:
            parts.append(_between(step.came * scale, index * ROW + 6))
    last = steps[-1]
    foot = len(steps) * ROW
    parts.append(_between(last.went * scale, foot + 6))
    parts.append(_rect(LEFT, foot + 6, last.went * scale, "kept", f"{last.went:,} {unit} kept"))
    parts.append(_label(LEFT - 10, foot + 6 + BAR / 2, "kept", "end strong"))
    share = f" ({percent(last.went, steps[0].came)})" if steps[0].came else ""
    parts.append(_label(LEFT + MIDDLE + 14, foot + 6 + BAR / 2, f"{last.went:,}{share}", "strong"))
    told = f"{steps[0].came:,} {unit} came, {last.went:,} were kept"
    return _svg(LEFT + MIDDLE + RIGHT, foot + ROW - 8, told, parts, "flow")


def _row(step: Step, top: float, scale: float) -> Markup:
    """A step: its name, what it let pass, what it took away and why, what it added."""
    kept = step.came - sum(step.lost.values())
    added = step.went - kept
    parts = [
        _label(LEFT - 10, top + BAR / 2, shorten(step.name, 20), "end", step.name),
        _rect(LEFT, top, kept * scale, "kept", f"{step.name}: {kept:,} went on"),
    ]
    if added:
        place = LEFT + kept * scale
        parts.append(_rect(place, top, added * scale, "added", f"{step.name}: {added:,} added"))
    at = LEFT + step.went * scale
    for reason, count in step.lost.items():
        width = max(count * scale, THINNEST)
        parts.append(_rect(at, top, width, "lost", f"{step.name}: {reason}, {count:,}"))
        at += width
    told = [
        f"−{count:,} {shorten(reason, 22)} ({percent(count, step.came)})"
        for reason, count in step.lost.items()
    ]
    told = [f"+{added:,} added", *told] if added else told
    if len(told) > TOLD:
        rest = sum(list(step.lost.values())[TOLD - 1 - bool(added) :])
        told[TOLD - 1 :] = [f"−{rest:,} by {len(told) - TOLD + 1} other rules"]
    for line, text in enumerate(told):
        y = top + BAR / 2 + 15 * (line - (len(told) - 1) / 2)
        parts.append(_label(LEFT + MIDDLE + 14, y, text, "loss", "; ".join(step.lost)))
    return Markup("").join(parts)


def _between(width: float, bottom: float) -> Markup:
    """A pale band that leads from the step before into the next."""
    if width <= 0:
        return Markup("")
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="band"/>'
    ).format(LEFT, bottom - (ROW - BAR), width, ROW - BAR)


def histogram(counts: Mapping[int, int], span: range, told: str) -> Markup:
    """Upright bars over powers of two.

    Args:
        counts: Bit length of a size to how many have it.
        span: Bit lengths along the axis, the same for charts to be compared.
        told: What it shows, for those who hear the page.
    """
    width, height = 260.0, 96.0
    step = width / len(span)
    most = max(1, *counts.values())
    parts = list[Markup]()
    for index, bits in enumerate(span):
        count = counts.get(bits, 0)
        tall = max(height * count / most, THINNEST) if count else 0.0
        title = f"{1 << bits >> 1:,} to {(1 << bits) - 1:,} characters: {count:,}"
        parts.append(_rect(index * step + 1, 8 + height - tall, step - 2, "kept", title, tall))
        if index % max(1, len(span) // 6) == 0:
            x = index * step
            parts.append(_label(x + 1, height + 22, _short(1 << bits >> 1), "axis"))
    parts.append(
        Markup('<line x1="0" x2="{0:.0f}" y1="{1:.0f}" y2="{1:.0f}" class="rule"/>').format(
            width, height + 8
        )
    )
    return _svg(width, height + 32, told, parts, "histogram")


def shorten(text: str, columns: int) -> str:
    """The beginning of a text, with an ellipsis if need be; Chinese characters count as two."""
    taken = 0
    for place, character in enumerate(text):
        taken += 1 + (unicodedata.east_asian_width(character) in "WF")
        if taken > columns:
            return text[:place] + "…"
    return text


def percent(part: int, whole: int) -> str:
    """A share in percent; what is something, or not all, is never rounded to nothing or all."""
    if part == whole and whole:
        return "100%"
    share = 100 * part / whole if whole else 0.0
    if part and share < 0.1:
        return "< 0.1%"
    return "> 99.9%" if share > 99.9 else f"{share:.1f}%"


def _short(number: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def _rect(x: float, y: float, width: float, kind: str, title: str, height: float = BAR) -> Markup:
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}">'
        "<title>{}</title></rect>"
    ).format(x, y, max(width, 0), height, kind, title)


def _label(x: float, y: float, text: str, kind: str, title: str = "") -> Markup:
    hint = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<text x="{:.1f}" y="{:.1f}" dy=".35em" class="{}">{}{}</text>').format(
        x, y, kind, hint, text
    )


def _svg(width: float, height: float, told: str, parts: Sequence[Markup], kind: str) -> Markup:
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {:.0f} {:.0f}" class="{}" role="img"'
        ' aria-label="{}">{}</svg>'
    ).format(width, height, kind, told, Markup("\n").join(parts))
