"""The figures, as SVG text that takes its colour from the page around it, so that it is right in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import log10
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

_INK = "#010203"
"""Stands for the text colour of the page, until the SVG is written."""
_COLOURS = ("#2a7de1", "#e8743b", "#19a979", "#945ecf", "#c09000", "#ed4a7b", "#13a4b4")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.color": _INK,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One candidate in the plane of cost and quality."""

    label: str
    group: str
    """Points of one group share a colour."""
    milliseconds: float
    psnr: float


def pareto(points: Sequence[Point], psnr_blurred: float | None, size: str, salt: str = "pareto") -> str:
    """PSNR against latency; the line joins what nothing else beats in both.  ``salt`` differs on one page."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(f"latency at {size}, ms", "PSNR, dB")
        for colour, group in zip(cycle(_COLOURS), dict.fromkeys(point.group for point in points), strict=False):
            mine = [point for point in points if point.group == group]
            axes.scatter([p.milliseconds for p in mine], [p.psnr for p in mine], color=colour, label=group, zorder=3)
        best: list[Point] = []
        for point in sorted(points, key=lambda point: (point.milliseconds, -point.psnr)):
            if not best or point.psnr > best[-1].psnr:
                best.append(point)
        axes.plot([p.milliseconds for p in best], [p.psnr for p in best], color=_INK, alpha=0.4, linewidth=1, zorder=1)
        # Differences of thousandths of a dB must not look like cliffs, and the labels need room above.
        low, high = min(p.psnr for p in points), max(p.psnr for p in points)
        if psnr_blurred is not None:
            axes.axhline(psnr_blurred, color=_INK, alpha=0.4, linestyle=":")
            axes.text(1, psnr_blurred, "blurred input", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
            low, high = min(low, psnr_blurred), max(high, psnr_blurred)
        room = max(high - low, 0.1)
        axes.set_ylim(low - 0.15 * room, high + 1.0 * room)
        axes.set_xscale("log")
        _plain_log(axes, "x")
        axes.margins(x=0.08)
        axes.autoscale_view(scaley=False)
        _label(axes, points, high + 0.2 * room)
        if len({point.group for point in points}) > 1:  # else the legend would be taken for a point
            axes.legend(loc=(0.01, 0.14), frameon=False)
        return _svg(figure, salt)


def latency_by_size(series: Mapping[str, Mapping[float, float]]) -> str:
    """Milliseconds by megapixels, one line a candidate."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("megapixels", "latency, ms")
        for index, (label, values) in enumerate(series.items()):
            sizes = sorted(values)
            colour, marker = _COLOURS[index % len(_COLOURS)], "os^Dv"[index // len(_COLOURS) % 5]
            axes.plot(sizes, [values[size] for size in sizes], color=colour, marker=marker, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_log(axes, "x")
        _plain_log(axes, "y")
        axes.legend(loc="upper left", frameon=False, fontsize=9)
        return _svg(figure, "latency")


def curves(series: Mapping[str, Mapping[float, float]], x_label: str, y_label: str) -> str:
    """One line with markers for each of ``series``, x to y, on linear axes."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(x_label, y_label)
        for index, (label, values) in enumerate(series.items()):
            colour, marker = _COLOURS[index % len(_COLOURS)], "os^Dv"[index // len(_COLOURS) % 5]
            at = sorted(values)
            axes.plot(at, [values[x] for x in at], color=colour, marker=marker, markersize=4, label=label)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
        return _svg(figure, f"{x_label} {y_label}")


def shares(values: Mapping[str, float], title: str) -> str:
    """Horizontal bars of shares between 0 and 1."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, "", height=0.9 + 0.38 * len(values))
        axes.barh(list(values), [100 * value for value in values.values()], color=_COLOURS[0])
        for index, value in enumerate(values.values()):
            axes.annotate(f"{value:.0%}", (100 * value, index), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 105)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        return _svg(figure, "shares")


def for_file(svg: str) -> str:
    """The same figure as a file of its own, which an ``img`` shows in the colours that the reader prefers."""
    style = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
    return re.sub(r"(<svg[^>]*>)", rf"\1{style}", svg, count=1) + "\n"


def _axes(x_label: str, y_label: str, height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _label(axes: Axes, points: Sequence[Point], height: float) -> None:
    """Names in one row above the points, far enough apart to be read, each with a line to its point."""
    ordered = sorted(points, key=lambda point: point.milliseconds)
    low, high = map(log10, axes.get_xlim())
    gap = min(0.035, 1 / max(len(ordered), 1))
    at: list[float] = []
    for point in ordered:
        wanted = (log10(point.milliseconds) - low) / (high - low)
        at.append(max(wanted, at[-1] + gap) if at else wanted)
    # What was pushed over the right end pushes its left neighbours back.
    for index in range(len(at) - 1, -1, -1):
        at[index] = min(at[index], 1 - gap * (len(at) - 1 - index))
    for place, point in zip(at, ordered, strict=True):
        where = 10 ** (low + place * (high - low)), height
        style = {"arrowstyle": "-", "color": _INK, "alpha": 0.3, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate("", (point.milliseconds, point.psnr), where, arrowprops=style)
        axes.text(*where, point.label, rotation=50, fontsize=9, rotation_mode="anchor", va="center")


def _plain_log(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure, salt: str) -> str:
    # The salt keeps the ids of several figures on one page apart, and the same from run to run.
    with mpl.rc_context({"svg.hashsalt": salt}):
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Ids by which matplotlib names its parts are the same in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace(_INK, "currentColor").strip()
