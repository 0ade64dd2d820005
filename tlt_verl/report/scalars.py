"""Reads the scalars that verl's `tensorboard` logger writes. Knows event files; knows no metric's name.

Needs the package `tensorboard`, which is imported with this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator


def read_event_files(files: Iterable[Path]) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step and its scalars, file by file in the order in which they were begun: one file is one attempt of a run.

    Values have float32's digits. A file that ends in the middle of a record, as a killed run's does, is read up to it.
    """
    attempts = []
    for file in files:
        scalars = EventAccumulator(str(file), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
        scalars.Reload()
        if scalars.Tags()[SCALARS]:
            attempts.append((scalars.FirstEventTimestamp(), file.name, scalars))
    for *_, scalars in sorted(attempts, key=lambda attempt: attempt[:2]):
        yield from sorted(_steps(scalars).items())


def _steps(scalars: EventAccumulator) -> dict[int, dict[str, float]]:
    steps: dict[int, dict[str, float]] = {}
    for tag in scalars.Tags()[SCALARS]:
        for event in scalars.Scalars(tag):
            steps.setdefault(event.step, {})[tag] = event.value
    return steps
