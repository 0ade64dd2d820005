"""What spot training brought: a run whose drafter trains beside the same run with the drafter frozen, step by step.

Idle time is a replica's `tlt-event` states idle, training and yielding together, trained time the state training, and
harvest trained over idle; accept length and the drafter's figures are verl's metrics of the step. A replica's events
carry the step after which its weights came, which is one less than that in which it generates with them: here all is
under verl's step. Knows the log's format and nothing else of ours, nor how a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tlt_verl.report.console import Column, is_training_step, parse_step
from tlt_verl.report.timeline import MARK, Reading, Timeline, harvest, idle_seconds, percent, ranges, read_events

ACCEPT_LEN = "tlt/accept_len"
NOT_DRAFTED = "tlt/draft_share/off"
SETTLING_STEPS = 2

_ACCEPT = (Column("trained", 9, 2, (ACCEPT_LEN,)), Column("frozen", 9, 2, (ACCEPT_LEN,)))
_DRAFTER = (
    Column("version", 9, 0, ("tlt/drafter/version",)),
    Column("loss", 9, 3, ("tlt/drafter/loss",)),
    Column("yield ms", 10, 1, ("tlt/spot/yield_ms_max",)),
)
_REPLICA_HEADS = (("idle s", 9), ("trained s", 11), ("harvest", 9))


@dataclass(frozen=True)
class Run:
    """One run's log: the metrics of each training step, and its events."""

    path: Path
    steps: dict[int, dict[str, float]]
    reading: Reading = field(repr=False)

    def complaint(self) -> str:
        """What the log should have and has not, for a person; empty where nothing is missing."""
        numbers = sorted(self.steps)
        absent = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
        parts = [f"no metric line of step {ranges(absent)}"] if absent else []
        parts += [complaint] if (complaint := self.reading.complaint()) else []
        return "; ".join(parts)


@dataclass(frozen=True)
class StepFigures:
    """One step of both runs; None, or no key, where a log does not have the figure.

    `replicas` has seconds by state for each replica of the run that trains, `metrics` that run's metrics.
    """

    step: int
    accept_trained: float | None
    accept_frozen: float | None
    replicas: dict[str, dict[str, float]]
    metrics: dict[str, float]


def read_run(path: Path) -> Run:
    """A run from its log. ValueError names the log that is not there or has no metrics to show."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such log")
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = list(file)
    steps = {step[0]: step[1] for line in lines if (step := parse_step(line)) and is_training_step(step[1])}
    if not steps:
        raise ValueError(f"{path}: no metric line of a training step")
    if all(accept_len(metrics) is None for metrics in steps.values()):
        raise ValueError(f"{path}: no step has {ACCEPT_LEN}; its rollouts were not tlt's")
    return Run(path, steps, read_events(lines))


def accept_len(metrics: Mapping[str, float]) -> float | None:
    """Accept length of a step; 1 where nothing was drafted: what a target produces with each pass by itself."""
    return metrics.get(ACCEPT_LEN, 1.0 if metrics.get(NOT_DRAFTED) == 1.0 else None)


def compare(trained: Run, frozen: Run) -> list[StepFigures]:
    """Both runs' steps, ascending. ValueError names the trained run's log if it has no events."""
    if not trained.reading.events:
        raise ValueError(f"{trained.path}: no {MARK} lines, so no idle time of a replica is known")
    timeline = Timeline(trained.reading.events)
    return [
        StepFigures(
            step=step,
            accept_trained=accept_len(trained.steps.get(step, {})),
            accept_frozen=accept_len(frozen.steps.get(step, {})),
            replicas=_replica_seconds(timeline, step - 1),
            metrics=trained.steps.get(step, {}),
        )
        for step in sorted(trained.steps.keys() | frozen.steps.keys())
    ]


def _replica_seconds(timeline: Timeline, step: int) -> dict[str, dict[str, float]]:
    if step not in timeline.steps:
        return {}
    return {lane: seconds for lane, seconds in timeline.seconds(step).items() if lane != "policy"}


def replica_names(figures: Sequence[StepFigures]) -> list[str]:
    """The replicas of any step, in the timeline's order."""
    return list(dict.fromkeys(name for step in figures for name in step.replicas))


def table(figures: Sequence[StepFigures]) -> str:
    """One row a step under two rows of heads: accept length of both runs, each replica's idle time, the drafter."""
    replicas = replica_names(figures)
    wide = sum(width for _, width in _REPLICA_HEADS)
    groups = " " * 5 + "accept length".rjust(18) + "".join(name.rjust(wide) for name in replicas)
    heads = "step".rjust(5) + "".join(column.head.rjust(column.width) for column in _ACCEPT)
    heads += "".join(head.rjust(width) for head, width in _REPLICA_HEADS) * len(replicas)
    heads += "".join(column.head.rjust(column.width) for column in _DRAFTER)
    return "\n".join([groups, heads, *(_row(step, replicas) for step in figures)])


def _row(figures: StepFigures, replicas: Sequence[str]) -> str:
    text = str(figures.step).rjust(5)
    text += _ACCEPT[0].cell(figures.accept_trained) + _ACCEPT[1].cell(figures.accept_frozen)
    text += "".join(_replica_cells(figures.replicas.get(name)) for name in replicas)
    return text + "".join(column.cell(column.value(figures.metrics)) for column in _DRAFTER)


def _replica_cells(seconds: Mapping[str, float] | None) -> str:
    cells = ("-", "-", "-")
    if seconds is not None:
        cells = (f"{idle_seconds(seconds):.2f}", f"{seconds.get('training', 0.0):.2f}", percent(harvest(seconds)))
    return "".join(cell.rjust(width) for cell, (_, width) in zip(cells, _REPLICA_HEADS, strict=True))


def summary(figures: Sequence[StepFigures]) -> str:
    """Accept length at both ends of each run, and the harvest of all replicas after the first steps."""
    lines = []
    for name, values in (
        ("trained", [(step.step, step.accept_trained) for step in figures]),
        ("frozen", [(step.step, step.accept_frozen) for step in figures]),
    ):
        known = [(step, value) for step, value in values if value is not None]
        (first, before), (last, after) = known[0], known[-1]
        lines.append(f"accept length, drafter {name}: {before:.2f} at step {first}, {after:.2f} at step {last}")
    return "\n".join([*lines, _harvest_line(figures[SETTLING_STEPS:])])


def _harvest_line(figures: Sequence[StepFigures]) -> str:
    head = f"harvest after the first {SETTLING_STEPS} steps:"
    shares = [
        (share, name, step.step, seconds)
        for step in figures
        for name, seconds in step.replicas.items()
        if (share := harvest(seconds)) is not None
    ]
    if not shares:
        return f"{head} no replica was idle"
    idle_s = sum(idle_seconds(seconds) for *_, seconds in shares)
    trained_s = sum(seconds.get("training", 0.0) for *_, seconds in shares)
    least, name, step, _ = min(shares, key=lambda share: share[0])
    total = f"{percent(trained_s / idle_s)} ({trained_s:.1f} s of {idle_s:.1f} s idle)"
    return f"{head} {total}; the least is {percent(least)}, {name} in step {step}"
