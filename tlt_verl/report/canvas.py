"""Panels of lines and stacks as SVG that can stand inside a page. Knows matplotlib, which is imported with this module.

Knows nothing of runs or metrics. The same input gives the same bytes: no dates, and ids that follow from the content.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "tlt",
    "svg.fonttype": "none",  # text stays text: it can be searched, and the page is a third of the size
    "text.parse_math": False,  # a dollar sign in a run's name is one
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#44AA99",
    "#999933",
    "#332288",
)
_DASHES = ("solid", "dashed", "dotted")
_MANY = 150  # points of a line from which on they are not marked


@dataclass(frozen=True)
class Style:
    """How a line is told from others: names that matplotlib and CSS both know."""

    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Line:
    """One figure by step, and its look."""

    label: str
    values: Mapping[int, float]
    style: Style


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what is written along the y axis and above, and what draws into it."""

    ylabel: str
    draw: Callable[[Axes], None]
    title: str = ""
    xlabel: str = "step"


def style(place: int) -> Style:
    """The look of the so manieth line."""
    return Style(_COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)])


def draw_lines(
    drawn: Sequence[Line], bottom: float | None = None, level: float | None = None
) -> Callable[[Axes], None]:
    """Draws lines with a gap where a step has no value.

    Args:
        bottom: where the y axis begins; None: where the values do.
        level: a value to draw a thin line at, to compare with.
    """

    def draw(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color="#888888", linewidth=0.8)
        for line in drawn:
            steps = range(min(line.values), max(line.values) + 1) if line.values else range(0)
            values = [line.values.get(step, math.nan) for step in steps]
            marker = "o" if len(line.values) < _MANY else ""
            (drawing,) = axes.plot(list(steps), values, marker=marker, markersize=3, linewidth=1.3)
            drawing.set(color=line.style.colour, linestyle=line.style.dash)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)

    return draw


def draw_stack(layers: Sequence[Line], top: float) -> Callable[[Axes], None]:
    """Draws each step as a column of layers, the first at the foot; a step that no layer has is left out.

    Args:
        top: of the highest column of all panels that are to be compared.
    """

    def draw(axes: Axes) -> None:
        known = sorted({step for layer in layers for step in layer.values})
        steps = range(known[0], known[-1] + 1)
        edges = [step - 0.5 for step in (*steps, steps[-1] + 1)]
        foot = [0.0 if step in known else math.nan for step in steps]
        for layer in layers:
            head = [low + layer.values.get(step, 0.0) for low, step in zip(foot, steps, strict=True)]
            axes.stairs(head, edges, baseline=foot, fill=True, color=layer.style.colour)
            foot = head
        axes.set_ylim(0, 1.05 * top if top > 0 else 1)

    return draw


def svg(panels: Sequence[Panel], prefix: str, size: tuple[float, float], columns: int = 1) -> str:
    """The panels in one drawing, row by row, as an `<svg>` element.

    Args:
        prefix: of all ids in it, so that drawings of one page do not share any.
        size: width and height of a panel, inches.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        FigureCanvasSVG(figure)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in zip(places, panels, strict=False):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.set_axisbelow(True)
            panel.draw(axes)
            axes.set(ylabel=panel.ylabel, xlabel=panel.xlabel)
            axes.set_title(panel.title, loc="left", fontsize=9)
        for empty in list(figure.axes)[len(panels) :]:
            empty.set_visible(False)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata=_NO_METADATA)
    return _element(written.getvalue(), prefix)


def _element(document: bytes, prefix: str) -> str:
    """The root of an SVG document, without the prologue, ids and references to them prefixed."""
    root = minidom.parseString(document).documentElement
    assert root is not None
    for element in (root, *root.getElementsByTagName("*")):
        for name, value in list(element.attributes.items()):
            if name == "id":
                element.setAttribute(name, f"{prefix}-{value}")
            elif name == "xlink:href" and value.startswith("#"):
                element.setAttribute(name, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.setAttribute(name, value.replace("url(#", f"url(#{prefix}-"))
    for size in ("width", "height"):
        root.removeAttribute(size)  # the page's own style decides; viewBox keeps the shape
    return root.toxml()
