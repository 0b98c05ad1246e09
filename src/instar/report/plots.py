"""Small charts as inline SVG: text stays text, and ink follows the page into dark mode."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour, which is not known while drawing."""

COLOURS = {"train": "#3a86c8", "valid": "#e07a2f"}
"""Strong enough on white, soft enough on black; told apart in grey and by colour-blind eyes."""

POINTS = 300
"""More points than this are averaged away: a line of 300 is as fine as the eye can see."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "instar",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: ``train`` or ``valid``; decides its colour.
        steps: Optimizer steps.
        values: One a step.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]


def curve(lines: Sequence[Line], title: str, unit: str, stage: str) -> Markup:
    """A quantity over the steps of training; noisy ones get a running mean on top.

    Args:
        lines: The curves, none of them empty.
        title: What is drawn.
        unit: Unit of the vertical axis; may be empty.
        stage: Whose training it is; told to those who hear the page.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            steps, values = _thin(line.steps), _thin(line.values)
            colour = COLOURS[line.label]
            few = len(values) < 8
            if line.label == "train" and len(values) >= 40:
                axes.plot(steps, values, color=colour, alpha=0.4, linewidth=0.8)
                reach = len(values) // 20
                steps, values = steps[reach:-reach], _running_mean(values, reach)
            axes.plot(
                steps,
                values,
                color=colour,
                label=line.label,
                linewidth=1.6,
                marker="o" if few or line.label == "valid" else None,
                markersize=3.5,
            )
        axes.set_title(f"{title} ({unit})" if unit else title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.locator_params(nbins=5)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        last = ", ".join(f"{line.label} ends at {line.values[-1]:.3g}" for line in lines)
        return inline(figure, f"{title} over the steps of {stage}: {last}")


@dataclass(frozen=True)
class Stretch:
    """One stage's part of a timeline.

    Attributes:
        label: Name of the stage.
        times: Seconds since it began.
        values: One a time.
    """

    label: str
    times: Sequence[float]
    values: Sequence[float]


def timeline(stretches: Sequence[Stretch], title: str, unit: str) -> Markup:
    """A quantity over the whole life, one stage behind the other.

    Args:
        stretches: The stages' parts, none of them empty.
        title: What is drawn.
        unit: Unit of the vertical axis.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.9), layout="constrained")
        axes = figure.subplots()
        whole = sum(stretch.times[-1] for stretch in stretches)
        scale, clock = (60, "min") if whole > 180 else (1, "s")
        highest = max(max(stretch.values) for stretch in stretches)
        begin = 0.0
        for place, stretch in enumerate(stretches):
            times = (begin + _thin(stretch.times)) / scale
            end = begin + stretch.times[-1]
            if place % 2 == 0:
                axes.axvspan(begin / scale, end / scale, color=INK, alpha=0.06, linewidth=0)
            values = _thin(stretch.values)
            alone = "o" if len(values) == 1 else None
            axes.plot(times, values, color=COLOURS["train"], linewidth=1.3, marker=alone)
            wide = stretch.times[-1] > 0.045 * whole
            if wide:
                middle = (begin + end) / 2 / scale
                axes.text(middle, 1.2 * highest, stretch.label, ha="center", va="top", fontsize=8)
            begin = end
        axes.set_title(f"{title} ({unit})", loc="left", fontsize=10)
        axes.set_xlabel(clock)
        axes.set_xlim(0, begin / scale)
        axes.set_ylim(0, 1.25 * highest or 1.0)
        axes.grid(axis="y")
        axes.locator_params(axis="y", nbins=5)
        told = ", ".join(f"{s.label} at most {max(s.values):,.3g}" for s in stretches)
        return inline(figure, f"{title} in {unit} over the whole life: {told}")


def bars(labels: Sequence[str], values: Sequence[float], title: str, unit: str) -> Markup:
    """One bar a stage, its value written beside it.

    Args:
        labels: Names of the stages.
        values: One a stage.
        title: What is drawn.
        unit: Unit of the values.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 0.5 + 0.28 * len(labels)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh(range(len(labels)), values, color=COLOURS["train"], height=0.62)
        axes.bar_label(drawn, [f"{value:,.3g}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.14)
        axes.set_title(f"{title} ({unit})", loc="left", fontsize=10)
        told = "; ".join(f"{k} {v:,.3g}" for k, v in zip(labels, values, strict=True))
        return inline(figure, f"{title} in {unit}: {told}")


def _thin(values: Sequence[float]) -> np.ndarray:
    """At most ``POINTS`` means of neighbours."""
    array = np.asarray(values, dtype=float)
    if len(array) <= POINTS:
        return array
    return np.array([part.mean() for part in np.array_split(array, POINTS)])


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Means of ``reach`` neighbours on both sides, where there are so many: ``2 reach`` fewer.

    Windows that shrink or lean over near the ends would bend the curve there.
    """
    width = 2 * reach + 1
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def inline(figure: Figure, description: str) -> Markup:
    """The drawing as an element that can stand in a page among others of its kind."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style element would reach out of its drawing, and the page chooses the font.
    for unwanted in (
        r"<metadata>.*?</metadata>",
        r"<style.*?</style>",
        r" font-family: [^;\"]*;",
        r'\s(width|height)="[\d.]+pt"',
    ):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    # Names must be unique on a page; only markers and clip paths are ever referred to.
    svg = re.sub(r'\sid="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)
    own = f"c{zlib.crc32((description + svg).encode()):08x}"
    svg = re.sub(r'(id="|#)([mp][0-9a-f]{10})', rf"\g<1>{own}\g<2>", svg)
    label = escape(description)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return Markup(svg.replace(INK, "currentColor").strip())
