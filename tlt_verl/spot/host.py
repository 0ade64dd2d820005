"""What psutil says of this machine's cores, and whether those of one replica are idle. Knows nothing of NVML.

Processes float between cores, so no core is looked at by itself: what is counted is how many cores' worth of time was
left over, or was ours.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tlt_verl.spot.idle import Reading

FAMILY_S = 1.0
"""Children of our own processes are looked for this often: it means reading the whole process table."""

_ONLINE = Path("/sys/devices/system/cpu/online")


class CoreMeter:
    """Cores that were free for our work, between one measurement and the next.

    Free is what was idle on the allowed cores, and what our own processes and their children computed, on any core. A
    process that ended in between, or a child that was not known yet, counts as another's: the error is on the side of
    too little.

    Args:
        own_pids: our own processes; they may change and may have ended.
        allowed: ids of the cores that are looked at; None: the affinity mask of this process.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        own_pids: Callable[[], set[int]],
        allowed: set[int] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.allowed = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
        self._own_pids, self._clock = own_pids, clock
        self._at: float | None = None
        self._idle: dict[int, float] = {}
        self._own: dict[psutil.Process, float] = {}
        self._family: set[psutil.Process] = set()
        self._roots: set[int] = set()
        self._family_at = float("-inf")

    def restart(self) -> None:
        """Forget the last measurement: the next one begins a window."""
        self._at = None

    def measure(self) -> float | None:
        """Cores free since the last measurement, 0 to the number of allowed ones; None at the first one."""
        now, idle, own = self._clock(), idle_seconds(self.allowed), self._own_seconds()
        elapsed = 0.0 if self._at is None else now - self._at
        left = sum(_clamped(idle[core] - self._idle.get(core, idle[core]), elapsed) for core in idle)
        ours = sum(max(0.0, seconds - self._own.get(process, seconds)) for process, seconds in own.items())
        self._at, self._idle, self._own = now, idle, own
        return min((left + ours) / elapsed, float(len(idle))) if elapsed > 0 else None

    def _own_seconds(self) -> dict[psutil.Process, float]:
        """CPU seconds of each of our processes that is alive."""
        seconds = {}
        for process in self._own_family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = process.cpu_times()
                seconds[process] = times.user + times.system
        return seconds

    def _own_family(self) -> set[psutil.Process]:
        roots, now = self._own_pids(), self._clock()
        if roots != self._roots or now - self._family_at >= FAMILY_S:
            self._roots, self._family_at, self._family = set(roots), now, set()
            for pid in roots:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    process = psutil.Process(pid)
                    self._family |= {process, *process.children(recursive=True)}
        return self._family


_NO_WINDOW = Reading(False, "no window yet", "no_window", measuring=True)


class HostProbe:
    """Idle while as many cores are free as the replica owns, as `CoreMeter` counts them.

    An engine that spins while it has no request looks busy here, unless its processes stand among `own_pids`.

    Args:
        cores: that the replica owns, of the allowed ones.
        own_pids: our own processes, the children aside.
        allowed: ids of the cores that are looked at; None: the affinity mask of this process.
        window_s: readings less than this apart are one; one after a longer pause than ten windows only begins one,
            unless we train: then we were there all the time.
        tolerance: share of `cores` that may be missing. Large, because who trains does so at the lowest priority: what
            is asked is whether there is anything to get, not whether anybody would be disturbed.
        clock: seconds that never go back.

    Raises:
        ValueError: `cores` is not between 1 and the number of allowed ones.
    """

    name = "host"

    def __init__(
        self,
        cores: int,
        own_pids: Callable[[], set[int]],
        allowed: set[int] | None = None,
        window_s: float = 0.1,
        *,
        tolerance: float = 0.75,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = CoreMeter(own_pids, allowed, clock=clock)
        if not 1 <= cores <= len(self._meter.allowed):
            raise ValueError(f"cores: got {cores}, takes 1 to the {len(self._meter.allowed)} allowed ones")
        self._least, self._window_s, self._clock = cores * (1 - tolerance), window_s, clock
        self._last, self._at = _NO_WINDOW, float("-inf")
        self.training = False

    def read(self) -> Reading:
        """See `Probe`. Causes: no_window, utilisation."""
        now = self._clock()
        if now - self._at < self._window_s:
            return self._last
        if not self.training and now - self._at > 10 * self._window_s:
            self._meter.restart()
        self._at, self._last = now, self._judged(self._meter.measure())
        return self._last

    def _judged(self, free: float | None) -> Reading:
        if free is None:
            return _NO_WINDOW
        idle = free >= self._least
        figures = f"{free:.2f} cores are free, takes {self._least:.2f}"
        return Reading(idle, figures, "" if idle else "utilisation")


def idle_seconds(allowed: frozenset[int]) -> dict[int, float]:
    """Seconds since boot in which each allowed core had nothing to do, waiting for a disk included, by its id.

    Where the system lists other cores than those that are allowed (a container that counts its own from 0), all that it
    lists are taken.
    """
    times = psutil.cpu_times(percpu=True)
    ids = _online()
    if len(ids) != len(times):
        ids = list(range(len(times)))
    idle = {core: time.idle + getattr(time, "iowait", 0.0) for core, time in zip(ids, times, strict=True)}
    return {core: idle[core] for core in allowed} if allowed <= idle.keys() else idle


def _online() -> list[int]:
    """Ids of the cores that psutil lists, in its order."""
    try:
        spans = [span.partition("-") for span in _ONLINE.read_text(encoding="ascii").strip().split(",")]
        return [core for first, _, last in spans for core in range(int(first), int(last or first) + 1)]
    except (OSError, ValueError):
        return []


def _clamped(seconds: float, elapsed: float) -> float:
    """The kernel's idle time is not exact: it can step back, and forward by more than has passed."""
    return min(max(0.0, seconds), elapsed)


def family_of(pid: int | None) -> Callable[[], set[int]]:
    """Tells a process and all that descend from it; none of them when it has ended, or for None.

    Raises:
        psutil.NoSuchProcess: it has ended already.
    """
    process = None if pid is None else psutil.Process(pid)

    def family() -> set[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return (
                set() if process is None else {process.pid, *(child.pid for child in process.children(recursive=True))}
            )
        return set()

    return family
