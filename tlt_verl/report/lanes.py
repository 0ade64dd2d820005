"""Draws one step of a run's timeline: a row a lane, a colour a state. Knows the timeline; the canvas makes it SVG."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from tlt_verl.report.canvas import Panel, Style
from tlt_verl.report.plots import WIDE_INCHES, Plot, plot
from tlt_verl.report.runs import Run
from tlt_verl.report.timeline import STATES, Timeline

_MOST_SPANS = 2000  # a page is read in a browser; scripts/plot_timeline.py draws any number
_ROW_INCHES, _FRAME_INCHES = 0.4, 1.0


def timelines(runs: Sequence[Run]) -> list[Plot]:
    """The last step of each run's timeline that the log has the whole of; runs without events are left out."""
    return [drawing for run in runs if run.events for drawing in _timeline(run)]


def _timeline(run: Run) -> list[Plot]:
    title, timeline = f"Timeline of {run.name}", Timeline(run.events)
    whole = [step for step in timeline.steps if not timeline.is_last(step)] or timeline.steps
    if not whole:
        return []
    step = whole[-1]
    spans = [span for of_lane in timeline.step_spans(step).values() for span in of_lane]
    if len(spans) > _MOST_SPANS:
        text = f"Step {step} has {len(spans)} spans, too many for a page; scripts/plot_timeline.py draws it."
        return [Plot(title, text, svg="", legend=(), wide=True)]
    start_s, end_s = timeline.step_window(step)
    end = " (the log ends in it)" if timeline.is_last(step) else ""
    caption = f"Who did what while the weights of step {step} served, {end_s - start_s:.1f} s{end}."
    used = {span.state for span in spans}
    labels = dict(STATES[state] for state in STATES if state in used)
    panel = Panel("", lambda axes: draw_lanes(axes, timeline, step), xlabel="seconds since the step's start")
    size = (WIDE_INCHES[0], _FRAME_INCHES + _ROW_INCHES * len(timeline.lanes))
    return plot(title, caption, [panel], [(label, Style(colour)) for label, colour in labels.items()], size)


def draw_lanes(axes: Axes, timeline: Timeline, step: int) -> None:
    """The first lane on top; short states over long ones, yielding at least a line wide."""
    start_s, end_s = timeline.step_window(step)
    spans = timeline.step_spans(step)
    for row, of_lane in enumerate(spans.values()):
        for state in {span.state: None for span in of_lane}:
            bars = [(span.start_s - start_s, span.seconds) for span in of_lane if span.state == state]
            wide, over = (0.75, 3) if state == "yielding" else (0.0, 2)
            colour = STATES[state][1]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolor=colour, edgecolor=colour, linewidth=wide, zorder=over)
    axes.set(yticks=range(len(spans)), yticklabels=list(spans), ylim=(len(spans) - 0.5, -0.5))
    axes.set(xlim=(0, end_s - start_s))
