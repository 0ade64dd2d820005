"""The runs that a report is of: the metrics of each training step, from verl's console log or its TensorBoard events.

Knows where a run's folder keeps them, and what a resumed or torn run looks like; knows nothing of what is made of the
figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tlt_verl.report.console import is_training_step, parse_step, validation_reward
from tlt_verl.report.timeline import Event, ranges, read_events

LOG = "train.log"
EVENT_FILES = "*tfevents*"
_TAKES = f"a report takes a log of verl's console output, a folder with {LOG}, or a folder with TensorBoard event files"

Record = tuple[int, dict[str, float]]


class ReportError(ValueError):
    """No report can be made of what was given; the message names the file and the cure."""


@dataclass(frozen=True)
class Run:
    """One run.

    `steps` has the metrics of each training step, ascending; `validation` the mean reward of each validation by step;
    `events` the timeline's; `notes` what a reader of the figures has to know of how they were read, one sentence each.
    """

    name: str
    path: Path
    steps: dict[int, dict[str, float]]
    validation: dict[int, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list, repr=False)
    notes: tuple[str, ...] = ()

    def series(self, *keys: str) -> dict[int, float]:
        """A figure by step: the first of the keys that a step has; steps without a finite one are left out."""
        return self.computed(lambda metrics: next((metrics[key] for key in keys if key in metrics), None))

    def computed(self, figure: Callable[[dict[str, float]], float | None]) -> dict[int, float]:
        """A figure by step, computed from the step's metrics; steps without a finite one are left out."""
        values = ((step, figure(metrics)) for step, metrics in self.steps.items())
        return {step: value for step, value in values if value is not None and math.isfinite(value)}

    def keys(self, *prefixes: str) -> list[str]:
        """The keys of any step that begin with one of the prefixes, sorted."""
        return sorted({key for metrics in self.steps.values() for key in metrics if key.startswith(prefixes)})


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs that a command line names, `PATH` or `NAME=PATH` each, in its order.

    A run without a name takes its folder's; where two would be called the same, their files' without the suffix.
    Raises ReportError.
    """
    named = [_split(argument) for argument in arguments]
    folders = [name or _printable(_folder(path).name) for name, path in named]
    names = [
        _printable(path.stem) if name is None and path.is_file() and folders.count(folder) > 1 else folder
        for (name, path), folder in zip(named, folders, strict=True)
    ]
    for name, (_, path) in zip(names, named, strict=True):
        if names.count(name) > 1:
            raise ReportError(f"{path}: another run is called {name!r}, too; give it a name of its own: NAME={path}")
    return [read_run(name, path) for name, (_, path) in zip(names, named, strict=True)]


def read_run(name: str, path: Path) -> Run:
    """The run of a log or of a folder. Raises ReportError when it has no training step."""
    source = _source(path)
    if isinstance(source, Path):
        return _from_log(name, source)
    return _from_event_files(name, path, source)


def _split(argument: str) -> tuple[str | None, Path]:
    """Name and path of an argument; a path may have an equals sign of its own."""
    name, equals, path = argument.partition("=")
    if not equals or not name or "/" in name or Path(argument).exists():
        return None, Path(argument)
    return _printable(name), Path(path)


def _folder(path: Path) -> Path:
    resolved = path.resolve()
    return resolved if path.is_dir() else resolved.parent


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)


def _source(path: Path) -> Path | list[Path]:
    """The log of a run, or its event files."""
    if path.is_file():
        return [path] if path.match(EVENT_FILES) else path
    if not path.is_dir():
        raise ReportError(f"{path}: there is no such file or folder; {_TAKES}")
    if (path / LOG).is_file():
        return path / LOG
    if event_files := sorted(file for file in path.glob(EVENT_FILES) if file.is_file()):
        return event_files
    logs = sorted(path.glob("*.log"))
    if len(logs) == 1:
        return logs[0]
    if logs:
        raise ReportError(f"{path}: which of its logs? Give one of {', '.join(log.name for log in logs)} itself")
    raise ReportError(f"{path}: no run in this folder; {_TAKES}{_below(path)}")


def _below(folder: Path) -> str:
    """Where runs are one folder further down, for the end of an error."""
    found = {file.parent for pattern in (LOG, EVENT_FILES) for file in folder.glob(f"*/{pattern}")}
    return f"; there are runs in {', '.join(map(str, sorted(found)))}" if found else ""


def _from_log(name: str, log: Path) -> Run:
    records: list[Record] = []

    def lines(file: Iterable[str]) -> Iterator[str]:
        for line in file:
            if (record := parse_step(line)) is not None:
                records.append(record)
            yield line

    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            reading = read_events(lines(file))
    except OSError as error:
        raise ReportError(f"{log}: cannot be read: {error.strerror}") from error
    steps, notes = _joined(records)
    if not steps:
        why = "is console in trainer.logger, and did the run complete a step?"
        raise ReportError(f"{log}: no metric line of a training step (step:N - training/global_step:N - ...); {why}")
    events = reading.events
    if events and _resumptions(records):
        events = []
        notes.append("no timeline is drawn: the log has more than one attempt, whose steps cannot be told apart")
    if complaint := reading.complaint():
        notes.append(complaint)
    return Run(name, log, steps, _validations(records), events, tuple(notes))


def _from_event_files(name: str, path: Path, files: Sequence[Path]) -> Run:
    try:
        from tlt_verl.report.scalars import read_event_files
    except ImportError as error:
        cure = "pip install tlt-verl[report], or give the run's console log"
        raise ReportError(f"{path}: its TensorBoard event files need the package {error.name}: {cure}") from error
    try:
        records = list(read_event_files(files))
    except OSError as error:
        raise ReportError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    if not records:
        why = "verl writes them with tensorboard in trainer.logger, after the first step"
        raise ReportError(f"{path}: its TensorBoard event files have no scalars; {why}")
    steps, notes = _joined(records)
    if not steps:
        why = "are they of a training run of verl?"
        raise ReportError(f"{path}: its TensorBoard scalars have no training step (training/global_step); {why}")
    return Run(name, path, steps, _validations(records), notes=tuple(notes))


def _validations(records: Iterable[Record]) -> dict[int, float]:
    found = {step: reward for step, metrics in records if (reward := validation_reward(metrics)) is not None}
    return dict(sorted(found.items()))


def _resumptions(records: Iterable[Record]) -> list[int]:
    """The steps at which the run went on from an earlier one, in the order in which they were logged."""
    numbers = [step for step, metrics in records if is_training_step(metrics)]
    return [after for before, after in pairwise(numbers) if after <= before]


def _joined(records: Iterable[Record]) -> tuple[dict[int, dict[str, float]], list[str]]:
    """The training steps, ascending, the later of two with one number; and what has to be said of them."""
    training = [(step, metrics) for step, metrics in records if is_training_step(metrics)]
    steps = dict(sorted(dict(training).items()))
    if not steps:
        return {}, []
    notes = []
    logged = Counter(step for step, _ in training)
    if twice := [step for step in steps if logged[step] > 1]:
        notes.append(f"{_steps(twice)} logged more than once (a resumed run): the later values are taken")
    if older := [step for step in steps if step > training[-1][0]]:
        notes.append(f"{_steps(older)} logged only before the run was resumed at step {_resumptions(training)[-1]}")
    if absent := sorted(set(range(1, max(steps) + 1)) - set(steps)):
        cure = "lines were torn, or an earlier attempt has them in another log: put both into one file, in their order"
        notes.append(f"no metrics of step {ranges(absent)} ({cure})")
    return steps, notes


def _steps(numbers: Sequence[int]) -> str:
    return f"step {numbers[0]} was" if len(numbers) == 1 else f"steps {ranges(numbers)} were"
