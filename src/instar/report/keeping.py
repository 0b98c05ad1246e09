"""Learnt against forgotten: a table, and one point a method."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from instar.report.plots import COLOURS, INK, STYLE, inline


def as_markdown(record: dict[str, Any]) -> str:
    """The table, the best first.

    Args:
        record: What ``instar continual`` writes as ``table.json``.
    """
    head = "| method | old exams kept | new exam | of the best | worst old exam | bits per byte |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, row in ordered(record):
        kept, new, worst = row["kept"], row["learnt"], row["worst"]
        cells = [
            f"**{name}**" if row["passed"] else name,
            f"{kept['score']:.1%} ± {kept['stderr']:.1%}",
            f"{new['score']:.1%} ± {new['stderr']:.1%}",
            f"{row['of_best']:.0%}",
            f"{worst['exam']} {worst['left']:.0%}",
            f"{row['bits']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ordered(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The methods by the sum of what they kept and learnt; the start comes first."""
    rows = record["methods"].items()
    return sorted(
        rows, key=lambda row: (row[0] != "start", -row[1]["kept"]["score"] - row[1]["of_best"])
    )


def drawn(record: dict[str, Any]) -> Markup:
    """What each method learnt, over what it kept, with one standard error each way.

    Args:
        record: What ``instar continual`` writes as ``table.json``.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        told = []
        for name, row in ordered(record):
            if name == "start":
                continue
            kept, new = row["kept"], row["learnt"]
            x, y = 100 * kept["score"], 100 * new["score"]
            colour = COLOURS["train" if row["passed"] else "valid"]
            bars = {"xerr": 100 * kept["stderr"], "yerr": 100 * new["stderr"]}
            axes.errorbar(x, y, **bars, fmt="o", markersize=4, elinewidth=0.7, color=colour)
            place = {"xytext": (4, 4), "textcoords": "offset points"}
            axes.annotate(name, (x, y), fontsize=8, **place)
            told.append(f"{name} kept {x:.0f}% and learnt {y:.0f}%")
        least, share = record["bar"]
        best = max((row["learnt"]["score"] for _, row in ordered(record)), default=0.0)
        axes.axvline(100 * least, color=INK, linewidth=0.6, linestyle=":")
        axes.axhline(100 * share * best, color=INK, linewidth=0.6, linestyle=":")
        axes.set_xlabel("old exams kept (%)")
        axes.set_ylabel("new exam (%)")
        axes.margins(0.12)
        axes.grid()
        return inline(figure, f"Learnt against forgotten: {'; '.join(told)}")
