"""Plots of what the engine chose, step by step: who drafted, and which strategy the tuner took at which batch sizes.

Knows the names of these metrics, `tlt/draft_share/<drafter>` and `tlt/tuner/<batch sizes>/<strategy>`, all of them
shares; any other metric of the tuner is a line of its own, which is not drawn here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tlt_verl.report.canvas import Line, Panel, Style, draw_stack, style
from tlt_verl.report.plots import THIRD_INCHES, WIDE_INCHES, Plot, plot
from tlt_verl.report.runs import Run

DRAFT_SHARE, TUNER = "tlt/draft_share/", "tlt/tuner/"
_OFF = Style("#BDBDBD")


def draft_shares(runs: Sequence[Run]) -> list[Plot]:
    """Who drafted the tokens, a panel a run."""
    looks = _looks(key.removeprefix(DRAFT_SHARE) for run in runs for key in run.keys(DRAFT_SHARE))
    panels = [panel for run in runs for panel in _panel(run, run.name, DRAFT_SHARE, looks)]
    caption = "Share of the step's tokens by who drafted them; off: nobody did."
    return plot("Who drafts", caption, panels, list(looks.items()), WIDE_INCHES)


def strategies(runs: Sequence[Run]) -> list[Plot]:
    """What the tuner took, a panel a run and range of batch sizes."""
    paths = [key.removeprefix(TUNER).split("/", 1) for run in runs for key in run.keys(TUNER)]
    nested = [path for path in paths if len(path) == 2]
    looks = _looks(strategy for _, strategy in nested)
    panels = [
        panel
        for run in runs
        for sizes in sorted({sizes for sizes, _ in nested}, key=natural)
        for panel in _panel(run, f"{run.name}, batch size {sizes}", f"{TUNER}{sizes}/", looks)
    ]
    caption = "Share of the engine's steps at these batch sizes by the strategy that they ran with; gaps: none were."
    return plot("The tuner's choices", caption, panels, list(looks.items()), THIRD_INCHES, columns=3)


def tuner_figures(runs: Sequence[Run]) -> list[str]:
    """The tuner's metrics that are of no batch sizes, sorted."""
    return sorted({key for run in runs for key in run.keys(TUNER) if "/" not in key.removeprefix(TUNER)})


def natural(key: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers within a key as numbers."""
    parts = [part for part in re.split(r"([0-9]+)", key) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _looks(labels: Iterable[str]) -> dict[str, Style]:
    """A look for each label: grey for none, the others in the order of their names."""
    known = set(labels)
    looks = {label: style(place) for place, label in enumerate(sorted(known - {"off"}, key=natural))}
    return looks | ({"off": _OFF} if "off" in known else {})


def _panel(run: Run, title: str, prefix: str, looks: dict[str, Style]) -> list[Panel]:
    """A panel of the shares under a prefix, in a list; an empty one where the run has none."""
    layers = [Line(label, values, look) for label, look in looks.items() if (values := run.series(prefix + label))]
    return [Panel("share", draw_stack(layers, top=1.0), title)] if layers else []
