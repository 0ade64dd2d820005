"""The plots of a report: which figures are drawn, under which title, and what has to be said of them.

Knows runs, metric names and figures; how a line becomes SVG is the canvas's, and where a plot stands is the page's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tlt_verl.report.canvas import Line, Panel, Style, draw_lines, draw_stack, style, svg
from tlt_verl.report.figures import (
    ACCEPT_LEN,
    GENERATION_S,
    LENGTH,
    OTHER,
    PHASES,
    REWARD,
    STEP_S,
    Series,
    figure,
    generation_speed_up,
    phase_seconds,
    speed,
    step_speed_up,
    tokens_speed_up,
)
from tlt_verl.report.runs import Run

HALF_INCHES, WIDE_INCHES, THIRD_INCHES = (4.6, 2.3), (9.4, 2.1), (3.1, 2.3)
_IDLE_S, _TRAINED_S, _HARVEST = ("tlt/spot/idle_s",), ("tlt/spot/trained_s",), ("tlt/spot/harvest",)
_IDLE_PARTS = (("trained", Style("#009E73")), ("left idle", Style("#BDBDBD")))
_DRAFTER = (
    ("Drafter's version", "version", "tlt/drafter/version", "The oldest that serves; counts publications."),
    ("Drafter's loss", "loss", "tlt/drafter/loss", "Of the training, as the workers last reported it."),
    ("Drafter's accuracy", "share", "tlt/drafter/accept", "As the trainer reports it, on what it trains on."),
    ("Gate's accept length", "tokens", "tlt/gate/accept_len", "Of the newest weights, on held-out segments."),
)


@dataclass(frozen=True)
class Plot:
    """A drawing with its words; `legend` has a label and a look a line. `wide`: it takes the page's whole width."""

    title: str
    caption: str
    svg: str
    legend: Sequence[tuple[str, Style]]
    wide: bool


def plot(
    title: str,
    caption: str,
    panels: Sequence[Panel],
    legend: Sequence[tuple[str, Style]],
    size: tuple[float, float] = WIDE_INCHES,
    columns: int = 1,
) -> list[Plot]:
    """A plot of panels of that size, as a list of one; of none where there is no panel."""
    if not panels:
        return []
    prefix = f"p{zlib.crc32(title.encode()):08x}"
    drawing = svg(panels, prefix, size, columns)
    return [Plot(title, caption, drawing, tuple(legend), wide=size != HALF_INCHES)]


class Plots:
    """The plots of some runs, section by section; one that would be empty is left out.

    Args:
        runs: in the order of their colours.
        baseline: the one of them that speed-ups are over.
    """

    def __init__(self, runs: Sequence[Run], baseline: Run) -> None:
        self._runs, self._baseline = runs, baseline
        self._looks = {run.name: style(place) for place, run in enumerate(runs)}

    def learning(self) -> list[Plot]:
        """Reward, of training and of validation, and response length."""
        return [
            *self.lines("Reward", "reward", figure(*REWARD), "Mean over the step's responses."),
            *self.lines("Validation", "reward", lambda run: run.validation, "Mean reward of each validation."),
            *self.lines("Response length", "tokens", figure(*LENGTH), "Mean over the step's responses."),
        ]

    def speed(self) -> list[Plot]:
        """Accept length, times, tokens per second, and speed-ups over the baseline."""
        waited = "Seconds in which the trainer waited for responses."
        accept = "Tokens produced a verification, the bonus token included."
        return [
            *self.lines("Generation", "seconds", figure(*GENERATION_S), waited, bottom=0),
            *self.lines("Step", "seconds", figure(*STEP_S), "Validation is not in it.", bottom=0),
            *self.lines(
                "Tokens per second", "tokens/s", speed, "Response tokens over seconds of generation.", bottom=0
            ),
            *self.lines("Accept length", "tokens", figure(*ACCEPT_LEN), accept, bottom=0),
            *self._speed_ups(),
        ]

    def phases(self) -> list[Plot]:
        """Where each step's time went, a panel a run."""
        stacks, used = {}, set()
        for run in self._runs:
            seconds = {step: phase_seconds(metrics) for step, metrics in run.steps.items()}
            layers = []
            for phase in (*PHASES, OTHER):
                values = {step: of_step[phase.label] for step, of_step in seconds.items()}
                if any(values.values()):
                    layers.append(Line(phase.label, values, Style(phase.colour)))
            if layers:
                used |= {layer.label for layer in layers}
                stacks[run.name] = layers
        legend = [(phase.label, Style(phase.colour)) for phase in (*PHASES, OTHER) if phase.label in used]
        caption = "Seconds of each step by verl's timers; other is what no timer of a phase accounts for."
        return plot("Step time by phase", caption, _stacked("seconds", stacks), legend)

    def spot(self) -> list[Plot]:
        """What spot training did: idle and trained time, harvest, and the drafter; of no run where none trained."""
        trained = [run for run in self._runs if run.series(*_IDLE_S)]
        if not trained:
            return []
        stacks = {run.name: _idle_layers(run) for run in trained}
        caption = "Seconds in which a replica had nothing else to do, of all replicas together."
        plots = plot("Idle time", caption, _stacked("seconds", stacks), _IDLE_PARTS)
        share = "Trained over idle time; 1 is all of it."
        plots += self.lines("Harvest", "share", figure(*_HARVEST), share, bottom=0)
        for title, unit, key, caption in _DRAFTER:
            plots += self.lines(title, unit, figure(key), caption)
        return plots

    def _speed_ups(self) -> list[Plot]:
        others = [run for run in self._runs if run is not self._baseline]
        panels = []
        for title, ratios in (
            ("generation", generation_speed_up),
            ("tokens per second", tokens_speed_up),
            ("whole step", step_speed_up),
        ):
            found = [(run.name, values) for run in others if (values := ratios(run, self._baseline))]
            if drawn := [Line(name, values, self._looks[name]) for name, values in found]:
                panels.append(Panel("times as fast", draw_lines(drawn, bottom=0, level=1), title))
        caption = (
            f"Over {self._baseline.name}, at the same step. Generation and the whole step compare seconds, in which "
            "shorter responses count as well; tokens per second do not have that."
        )
        legend = [(run.name, self._looks[run.name]) for run in others]
        return plot("Speed-up", caption, panels, legend, THIRD_INCHES, columns=3)

    def lines(
        self, title: str, unit: str, values_of: Callable[[Run], Series], caption: str, bottom: float | None = None
    ) -> list[Plot]:
        """One panel, a line a run that has the figure."""
        drawn = [Line(run.name, values, self._looks[run.name]) for run in self._runs if (values := values_of(run))]
        panels = [Panel(unit, draw_lines(drawn, bottom))] if drawn else []
        return plot(title, caption, panels, [(line.label, line.style) for line in drawn], HALF_INCHES)


def _stacked(unit: str, stacks: Mapping[str, Sequence[Line]]) -> list[Panel]:
    """A panel a run, all as high as the highest column of any, so that they can be compared."""
    totals: dict[tuple[str, int], float] = {}
    for name, layers in stacks.items():
        for layer in layers:
            for step, value in layer.values.items():
                totals[name, step] = totals.get((name, step), 0.0) + value
    return [Panel(unit, draw_stack(layers, max(totals.values())), name) for name, layers in stacks.items()]


def _idle_layers(run: Run) -> list[Line]:
    """Idle time of a run's steps, in two: trained in and left."""
    idle_s, trained_s = run.series(*_IDLE_S), run.series(*_TRAINED_S)
    trained = {step: min(trained_s.get(step, 0.0), seconds) for step, seconds in idle_s.items()}
    left = {step: seconds - trained[step] for step, seconds in idle_s.items()}
    return [Line(label, values, look) for (label, look), values in zip(_IDLE_PARTS, (trained, left), strict=True)]
