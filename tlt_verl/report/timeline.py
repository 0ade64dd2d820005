"""What each replica and the policy did, and when: the `tlt-event` lines of a run's log, as spans of time.

    tlt-event {"t": 12345.678, "lane": "replica 0", "state": "training", "step": 3}

`t` is the node's monotonic clock in seconds; a lane is in a state from its event until its next one. The lines come
from many processes through one pipe, so they may be out of order, coloured, two in a line, or torn. Knows this format
and the states' names and colours; knows nothing of who writes the lines, nor how a plot is drawn. Clocks of different
nodes cannot be compared: a log is one node's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlt_verl.report.console import plain

MARK = "tlt-event"

# The states of a lane: how each is called in a legend, and its colour (Okabe and Ito's, which the colour-blind can tell
# apart, and greys). A replica is in "policy" while its device is the policy's or its engine sleeps.
REPLICA_STATES = {
    "generating": ("generating", "#0072B2"),
    "idle": ("idle", "#BDBDBD"),
    "training": ("training the drafter", "#009E73"),
    "yielding": ("yielding", "#000000"),
    "policy": ("policy update", "#E69F00"),
    "sync": ("weight sync", "#CC79A7"),
    "starting": ("starting", "#56B4E9"),
}
POLICY_STATES = {
    "update": ("policy update", "#E69F00"),
    "log_probs": ("policy's log-probs", "#F0E442"),
    "waiting": ("policy waits", "#EDEDED"),
}
STATES = REPLICA_STATES | POLICY_STATES

_LANE = re.compile(r"replica (\d+)|policy")
_REPEATED = re.compile(r"\[repeated (\d+)x across cluster\]")
_CUT = "cut off, or mixed with other output"
_NAMED_LINES = 5


@dataclass(frozen=True)
class Event:
    """From `t_s` on, `lane` is in `state`; `step` is the trainer's step as far as the lane knows it."""

    t_s: float
    lane: str
    state: str
    step: int | None


@dataclass(frozen=True)
class Span:
    """One stretch of one state, in seconds of the node's clock."""

    start_s: float
    end_s: float
    state: str

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass
class Reading:
    """What a log's event lines gave.

    `unread` has one entry a mark behind which there was no event: the line's number and why. `swallowed` counts the
    events that Ray's log deduplication left out.
    """

    events: list[Event] = field(default_factory=list)
    unread: list[tuple[int, str]] = field(default_factory=list)
    swallowed: int = 0

    def complaint(self) -> str:
        """What is missing from `events`, for a person; empty where nothing is."""
        parts = []
        if self.unread:
            named = [f"line {number} ({why})" for number, why in self.unread[:_NAMED_LINES]]
            more = len(self.unread) - len(named)
            end = f" and {more} more" if more else ""
            parts.append(f"{len(self.unread)} {MARK} lines could not be read: {', '.join(named)}{end}")
        if self.swallowed:
            parts.append(f"{self.swallowed} {MARK} lines were left out by Ray; run with RAY_DEDUP_LOGS=0")
        return "; ".join(parts)


def read_events(lines: Iterable[str]) -> Reading:
    """All events of a log, in the order of its lines."""
    reading = Reading()
    for number, line in enumerate(lines, 1):
        if MARK not in line:
            continue
        text = plain(line)
        for piece in text.split(MARK)[1:]:
            try:
                reading.events.append(_event(_first_object(piece)))
            except ValueError as error:
                reading.unread.append((number, str(error)))
        if repeated := _REPEATED.search(text):
            reading.swallowed += int(repeated[1]) - 1
    return reading


def _first_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` begins with; what follows it is other output."""
    try:
        record, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except json.JSONDecodeError:
        raise ValueError(_CUT) from None
    if not isinstance(record, dict):
        raise ValueError(_CUT)
    return record


def _event(record: Mapping[str, Any]) -> Event:
    """The event that a record describes; ValueError names the field that is wrong."""
    t, lane, state, step = (record.get(key) for key in ("t", "lane", "state", "step"))
    if not isinstance(t, float | int) or isinstance(t, bool) or not math.isfinite(t):
        raise ValueError(f"t is {t!r}, not seconds")
    if not isinstance(lane, str) or not _LANE.fullmatch(lane):
        raise ValueError(f"lane is {lane!r}, not 'replica <n>' or 'policy'")
    states = POLICY_STATES if lane == "policy" else REPLICA_STATES
    if not isinstance(state, str) or state not in states:
        raise ValueError(f"state is {state!r}; {lane} takes {', '.join(states)}")
    if step is not None and (not isinstance(step, int) or isinstance(step, bool)):
        raise ValueError(f"step is {step!r}, not a number or null")
    return Event(float(t), lane, state, step)


def idle_seconds(seconds: Mapping[str, float]) -> float:
    """How long a device had nothing else to do: left idle, training, or on the way out of training."""
    return sum(seconds.get(state, 0.0) for state in ("idle", "training", "yielding"))


def harvest(seconds: Mapping[str, float]) -> float | None:
    """The share of a device's idle time in which it trained; None where it was never idle.

    Args:
        seconds: seconds by state.
    """
    idle_s = idle_seconds(seconds)
    return seconds.get("training", 0.0) / idle_s if idle_s > 0 else None


class Timeline:
    """Events as spans a lane, cut into the trainer's steps.

    A step begins when the first lane says that it is at that step or a later one, and ends where the next one begins,
    so steps neither overlap nor leave time out. The last step ends with the log's last event.

    Args:
        events: at least one, in any order.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        if not events:
            raise ValueError("no events: nothing to make a timeline of")
        self._events = sorted(events, key=lambda event: event.t_s)  # stable: the log's order decides between equals
        self.end_s = self._events[-1].t_s
        self.lanes = sorted({event.lane for event in events}, key=_lane_order)
        self._windows = self._all_windows()
        self._spans = {lane: self._all_spans(lane) for lane in self.lanes}

    @property
    def steps(self) -> list[int]:
        """The steps that took any time, ascending."""
        return list(self._windows)

    def spans(self, lane: str) -> list[Span]:
        """All spans of a lane, in order; nothing is known of it before its first event."""
        return list(self._spans[lane])

    def step_window(self, step: int) -> tuple[float, float]:
        """Where a step begins and ends, in seconds of the node's clock. ValueError says which steps there are."""
        if step not in self._windows:
            known = f"the events have {'step' if len(self.steps) == 1 else 'steps'} {ranges(self.steps)}"
            raise ValueError(f"no step {step}: {known if self.steps else 'no event names a step'}")
        return self._windows[step]

    def is_last(self, step: int) -> bool:
        """Whether the log ends in this step, so that it may have gone on for longer."""
        return bool(self.steps) and step == self.steps[-1]

    def step_spans(self, step: int) -> dict[str, list[Span]]:
        """The spans of each lane within a step, cut at its ends."""
        start_s, end_s = self.step_window(step)
        return {lane: list(_cut(self._spans[lane], start_s, end_s)) for lane in self.lanes}

    def seconds(self, step: int) -> dict[str, dict[str, float]]:
        """Seconds by lane and state within a step; a state that a lane was not in is left out."""
        result: dict[str, dict[str, float]] = {}
        for lane, spans in self.step_spans(step).items():
            total = result.setdefault(lane, {})
            for span in spans:
                total[span.state] = total.get(span.state, 0.0) + span.seconds
        return result

    def harvest(self, step: int) -> dict[str, float | None]:
        """`harvest` of each replica in a step."""
        return {lane: harvest(seconds) for lane, seconds in self.seconds(step).items() if lane != "policy"}

    def _all_spans(self, lane: str) -> list[Span]:
        events = [event for event in self._events if event.lane == lane]
        ends = [*(event.t_s for event in events[1:]), self.end_s]
        spans = (Span(event.t_s, end_s, event.state) for event, end_s in zip(events, ends, strict=True))
        return [span for span in spans if span.seconds > 0]

    def _all_windows(self) -> dict[int, tuple[float, float]]:
        windows: dict[int, tuple[float, float]] = {}
        first_s: dict[int, float] = {}
        for event in self._events:
            if event.step is not None:
                first_s.setdefault(event.step, event.t_s)
        end_s = self.end_s
        for step in sorted(first_s, reverse=True):
            start_s = min(first_s[step], end_s)
            if start_s < end_s:
                windows[step] = (start_s, end_s)
            end_s = start_s
        return dict(sorted(windows.items()))


def _lane_order(lane: str) -> tuple[bool, int]:
    """Replicas by number, then the policy."""
    match = _LANE.fullmatch(lane)
    return lane == "policy", int(match[1]) if match and match[1] else 0


def _cut(spans: Iterable[Span], start_s: float, end_s: float) -> Iterator[Span]:
    """What of the spans lies between two moments."""
    for span in spans:
        begin_s, stop_s = max(span.start_s, start_s), min(span.end_s, end_s)
        if begin_s < stop_s:
            yield Span(begin_s, stop_s, span.state)


def overlap_s(first: Iterable[Span], second: Sequence[Span]) -> float:
    """Seconds in which a span of the one lies over a span of the other; spans of one kind do not overlap each other."""
    return sum(cut.seconds for span in first for cut in _cut(second, span.start_s, span.end_s))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `1-4, 6`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def seconds_table(timeline: Timeline, step: int) -> str:
    """Seconds by lane and state within a step, one row a lane; `unknown` is time before a lane's first event."""
    start_s, end_s = timeline.step_window(step)
    seconds = timeline.seconds(step)
    states = [state for state in STATES if any(state in of_lane for of_lane in seconds.values())]
    heads = [*states, "unknown", "total", "harvest"]
    lines = [f"{'lane':<12}" + "".join(f"{head:>12}" for head in heads)]
    for lane, of_lane in seconds.items():
        unknown_s = end_s - start_s - sum(of_lane.values())
        cells = [f"{of_lane[state]:.3f}" if state in of_lane else "-" for state in states]
        cells += [f"{unknown_s:.3f}" if unknown_s > 5e-4 else "-", f"{end_s - start_s:.3f}"]
        cells.append(percent(None if lane == "policy" else harvest(of_lane)))
        lines.append(f"{lane:<12}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share as it is printed; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}%"
