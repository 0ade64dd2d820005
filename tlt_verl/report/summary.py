"""The table of runs, one row each, in Markdown and as cells. Knows its columns; knows nothing of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tlt_verl.report.figures import (
    ACCEPT_LEN,
    GENERATION_S,
    LAST_STEPS,
    LENGTH,
    REWARD,
    STEP_S,
    generation_speed_up,
    middle,
    speed,
    step_speed_up,
)
from tlt_verl.report.runs import Run


@dataclass(frozen=True)
class Column:
    """One figure of a run: how it is headed, computed from the run and the baseline, and written."""

    head: str
    digits: int
    value: Callable[[Run, Run], float | None]

    def cell(self, run: Run, baseline: Run) -> str:
        """The figure as it is printed; a dash where the run does not have it."""
        value = self.value(run, baseline)
        return "-" if value is None else f"{value:.{self.digits}f}"


def _reward(run: Run, place: int) -> float | None:
    values = list(run.series(*REWARD).values())
    return values[place] if values else None


COLUMNS = (
    Column("steps", 0, lambda run, _: len(run.steps)),
    Column("reward, first", 3, lambda run, _: _reward(run, 0)),
    Column("reward, last", 3, lambda run, _: _reward(run, -1)),
    Column("length", 1, lambda run, _: middle(run.series(*LENGTH))),
    Column("accept len", 2, lambda run, _: middle(run.series(*ACCEPT_LEN))),
    Column("gen s", 1, lambda run, _: middle(run.series(*GENERATION_S))),
    Column("step s", 1, lambda run, _: middle(run.series(*STEP_S))),
    Column("tokens/s", 1, lambda run, _: middle(speed(run))),
)
SPEED_UPS = (
    Column("gen speed-up", 2, lambda run, baseline: middle(generation_speed_up(run, baseline))),
    Column(f"gen, last {LAST_STEPS}", 2, lambda run, baseline: middle(generation_speed_up(run, baseline), LAST_STEPS)),
    Column("step speed-up", 2, lambda run, baseline: middle(step_speed_up(run, baseline))),
    Column(f"step, last {LAST_STEPS}", 2, lambda run, baseline: middle(step_speed_up(run, baseline), LAST_STEPS)),
)


def cells(runs: Sequence[Run], baseline: Run) -> list[list[str]]:
    """Heads, then a row a run; speed-ups only where there is something to compare."""
    columns = COLUMNS + (SPEED_UPS if len(runs) > 1 else ())
    rows = [[run.name, *(column.cell(run, baseline) for column in columns)] for run in runs]
    return [["run", *(column.head for column in columns)], *rows]


def explanation(runs: Sequence[Run], baseline: Run) -> str:
    """What the table's figures are."""
    text = "Medians over the steps; rewards are those of the first and of the last step."
    if len(runs) > 1:
        text += f" Speed-ups are {baseline.name}'s seconds over the run's, step by step, over the steps that both have."
    return text


def markdown(runs: Sequence[Run], baseline: Run) -> str:
    """The table in Markdown, aligned so that it can be read as it is, and its explanation."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in cells(runs, baseline)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *padded[1:]])} |"

    ruler = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(ruler), *map(line, rows[1:])]) + f"\n\n{explanation(runs, baseline)}\n"
