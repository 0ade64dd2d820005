"""The figures that runs are compared by, step by step: times, speeds and speed-ups. Knows verl's metric names.

Arithmetic on what the logs say; knows nothing of how a table or a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from tlt_verl.report.console import tokens_per_s
from tlt_verl.report.runs import Run

Series = dict[int, float]

REWARD = ("critic/score/mean", "critic/rewards/mean")
LENGTH = ("response_length/mean",)
ACCEPT_LEN = ("tlt/accept_len",)
GENERATION_S = ("timing_s/gen",)
STEP_S = ("timing_s/step",)
LAST_STEPS = 5


@dataclass(frozen=True)
class Phase:
    """A part of a step: its name in a legend, the timers that make it up, its colour."""

    label: str
    keys: tuple[str, ...]
    colour: str


PHASES = (
    Phase("generation", ("timing_s/gen",), "#0072B2"),
    Phase("reward", ("timing_s/reward",), "#8C6D31"),
    Phase("old log-probs", ("timing_s/old_log_prob",), "#F0E442"),
    Phase("reference log-probs", ("timing_s/ref",), "#56B4E9"),
    Phase("critic", ("timing_s/values", "timing_s/update_critic"), "#D55E00"),
    Phase("advantages", ("timing_s/adv",), "#009E73"),
    Phase("policy update", ("timing_s/update_actor",), "#E69F00"),
    Phase("weight sync", ("timing_s/update_weights",), "#CC79A7"),
    Phase("checkpoint", ("timing_s/save_checkpoint",), "#333333"),
)
OTHER = Phase("other", (), "#BDBDBD")


def figure(*keys: str) -> Callable[[Run], Series]:
    """The figure of a run that the first of the keys which a step has names."""
    return lambda run: run.series(*keys)


def speed(run: Run) -> Series:
    """Tokens of the responses per second of generation."""
    return run.computed(tokens_per_s)


def ratio(above: Mapping[int, float], below: Mapping[int, float]) -> Series:
    """One figure over another, at the steps that have both; a step at which `below` is 0 is left out."""
    return {step: above[step] / below[step] for step in below if step in above and below[step]}


def generation_speed_up(run: Run, baseline: Run) -> Series:
    """How many times as fast the run generates, by step: the baseline's seconds over the run's."""
    return ratio(baseline.series(*GENERATION_S), run.series(*GENERATION_S))


def tokens_speed_up(run: Run, baseline: Run) -> Series:
    """How many times as many tokens per second the run generates, by step."""
    return ratio(speed(run), speed(baseline))


def step_speed_up(run: Run, baseline: Run) -> Series:
    """How many times as fast the run's whole step is, by step: the baseline's seconds over the run's."""
    return ratio(baseline.series(*STEP_S), run.series(*STEP_S))


def middle(series: Mapping[int, float], last: int | None = None) -> float | None:
    """The median over the steps, or over so many of the last ones; None where there are none."""
    values = [series[step] for step in sorted(series)]
    return median(values[-last:] if last else values) if values else None


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step by phase; `other` is what of the step's time no phase accounts for, and not below 0.

    A step without a time of its own is as long as its phases.
    """
    seconds = {phase.label: sum(metrics.get(key, 0.0) for key in phase.keys) for phase in PHASES}
    total_s = sum(seconds.values())
    return seconds | {OTHER.label: max(0.0, metrics.get(STEP_S[0], total_s) - total_s)}
