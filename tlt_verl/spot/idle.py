"""Whether the device that a spot worker shares with its replica is idle, and who says that it is not.

Four probes answer for one thing each: verl's phase, the engine, and the device, through NVML or through the machine's
cores. `IdleDetector` asks them and decides. Nothing here starts or stops training, and nothing here knows torch, verl,
sglang or ray: what verl and the engine do stands on the replica's board.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tlt_verl.board import Board, Phase, now_ns
from tlt_verl.spot.nvml import Device, DeviceError, Sample

if TYPE_CHECKING:
    from tlt_verl.spot.host import HostProbe

logger = logging.getLogger(__name__)

Pids = Callable[[], set[int]]
Clock = Callable[[], float]

GIB = 1024**3


@dataclass(frozen=True)
class Reading:
    """What one probe saw.

    Args:
        idle: whether this probe has no objection.
        reason: names the thing and the figure.
        cause: of not being idle, a key that does not change with the figure; "" where idle.
        measuring: it cannot say yet, and will; `idle` is False.
    """

    idle: bool
    reason: str
    cause: str = ""
    measuring: bool = False


class Probe(Protocol):
    """One thing that can be busy."""

    name: str

    def read(self) -> Reading:
        """What it sees now, or saw within its window."""


@runtime_checkable
class KnowsTraining(Protocol):
    """A probe that must know whether we train on the device; `IdleDetector` tells it before each reading."""

    training: bool


class _BoardProbe:
    """What the replica's server and engine say; nothing that is said by a server that no longer lives is believed.

    Args:
        board: the replica's.
        stale_s: age of the server's last heartbeat from which on the board is not believed.
        clock_ns: the board's clock.
    """

    def __init__(self, board: Board, *, stale_s: float = 5.0, clock_ns: Callable[[], int] = now_ns) -> None:
        self._board, self._stale_s, self._clock_ns = board, stale_s, clock_ns

    def read(self) -> Reading:
        """See `Probe`. Causes: stale, and those of the class."""
        age_s = (self._clock_ns() - self._board.beat_ns) / 1e9
        if abs(age_s) > self._stale_s:
            return Reading(
                False, f"the server's last heartbeat is {age_s:.1f} s old, takes {self._stale_s:g} s", "stale"
            )
        return self._said()

    def _said(self) -> Reading:
        raise NotImplementedError


class PhaseProbe(_BoardProbe):
    """Idle while verl leaves the device to the rollout (GENERATE). Cause: phase. Arguments as of `_BoardProbe`.

    Raises:
        ValueError: by `read`: the board's phase is none of `Phase`.
    """

    name = "phase"

    def _said(self) -> Reading:
        phase = Phase(self._board.phase)
        idle = phase is Phase.GENERATE
        return Reading(idle, f"verl's phase is {phase.name}", "" if idle else "phase")


class EngineProbe(_BoardProbe):
    """Idle while no request runs or waits and the scheduler has nothing to do. Causes: requests, engine_busy."""

    name = "engine"

    def _said(self) -> Reading:
        requests, busy = self._board.requests, self._board.engine_busy
        if requests != 0:
            return Reading(False, f"{requests} requests run or wait", "requests")
        if busy != 0:
            return Reading(False, f"the scheduler is busy (engine_busy {busy})", "engine_busy")
        return Reading(True, "no requests")


class NvmlProbe:
    """Idle while the device has room for training and nobody but ourselves and the vouched for computes on it.

    | asked                        | while not training               | while training                     |
    |------------------------------|----------------------------------|------------------------------------|
    | free memory                  | below `least_free_bytes`: memory | the same, with what we hold        |
    | utilisation                  | at most `most_utilisation`: idle | the same                           |
    | shares of others             | above it: other_process          | the same                           |
    | utilisation, less the known  | above it: utilisation            | not asked: ours is told late       |
    | where no shares are told     | utilisation above it, or, where  | a process that was not on the      |
    |                              | that is not told either, any     | device before we trained:          |
    |                              | other process: other_process     | other_process                      |

    A process that is there and does not compute, such as a colocated policy's worker, does not block, but on MIG, where
    NVML tells nothing of utilisation. While we train, shares are used only once the driver has told any and has listed
    us: in a container with process ids of its own we could stand there under another one. What we hold is left out, and
    memory is not asked for, where it cannot be told. Graphics and MPS clients show in the utilisation only. Where NVML
    fails, the device is not idle, and it is tried again every `retry_s`.

    Args:
        device: one entry of CUDA_VISIBLE_DEVICES, see `tlt_verl.spot.nvml.Device`.
        least_free_bytes: device memory that training takes.
        own_pids: the processes that train.
        engine_pids: processes that other probes vouch for: the engine's, and on MIG a colocated policy's.
        most_utilisation: percent that is still nobody.
        window_s: readings less than this apart are one.
        retry_s: time between attempts to reach NVML again.
        clock: seconds that never go back.

    Raises:
        ValueError: the entry is malformed or names several devices; by `read` where NVML only then answers.
    """

    name = "nvml"

    def __init__(
        self,
        device: str,
        least_free_bytes: int,
        own_pids: Pids,
        *,
        engine_pids: Pids = set,
        most_utilisation: int = 10,
        window_s: float = 0.1,
        retry_s: float = 1.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.training = False
        self.least_free_bytes, self.most_utilisation = least_free_bytes, most_utilisation
        self._own_pids, self._engine_pids = own_pids, engine_pids
        self._window_s, self._retry_s, self._clock = window_s, retry_s, clock
        self._residents: set[int] = set()  # on the device when we last did not train
        self._names_us = False
        self._last: Reading | None = None
        self._next = float("-inf")
        self.device = Device(device, clock=clock)
        self.error: DeviceError | None = None
        """NVML's, while it does not answer."""
        try:
            self.device.open()
        except DeviceError as error:
            self._failed(error)

    def read(self) -> Reading:
        """See `Probe`. Causes: nvml_error, memory, other_process, utilisation."""
        if self._last is not None and self._clock() < self._next:
            return self._last
        try:
            sample = self.device.sample()
        except DeviceError as error:
            return self._failed(error)
        self.error = None
        return self._keep(self._judged(sample), self._window_s)

    def _failed(self, error: DeviceError) -> Reading:
        self.error = error
        return self._keep(Reading(False, str(error), "nvml_error"), self._retry_s)

    def _keep(self, reading: Reading, for_s: float) -> Reading:
        self._last, self._next = reading, self._clock() + for_s
        return reading

    def _judged(self, sample: Sample) -> Reading:
        own, listed = self._own_pids(), set(sample.processes or ())
        known = own | self._engine_pids()
        self._names_us |= bool(own & listed)
        objection = self._memory(sample, own) or self._computing(sample, known, listed - known)
        self._residents = listed & self._residents if self.training else listed
        return objection or Reading(True, f"{self.device.uuid} has room and nobody else computes there")

    def _memory(self, sample: Sample, own: set[int]) -> Reading | None:
        free = sample.free_bytes
        if free is None:
            return None
        if self.training:
            held = [bytes_ for pid, bytes_ in (sample.processes or {}).items() if pid in own]
            if not held or None in held:
                return None
            free += sum(bytes_ or 0 for bytes_ in held)
        if free >= self.least_free_bytes:
            return None
        what = "free or ours" if self.training else "free"
        figures = f"{free / GIB:.2f} GiB {what}, takes {self.least_free_bytes / GIB:.2f} GiB"
        return Reading(False, f"{self.device.uuid} has {figures}", "memory")

    def _computing(self, sample: Sample, known: set[int], strangers: set[int]) -> Reading | None:
        if sample.utilisation is not None and sample.utilisation <= self.most_utilisation:
            return None
        if sample.shares is None or (self.training and not (sample.shares and self._names_us)):
            return self._by_presence(sample, strangers)
        others = {pid: share for pid, share in sample.shares.items() if pid not in known}
        if sum(others.values()) > self.most_utilisation:
            pid = max(others, key=lambda each: others[each])
            return self._over("other_process", f"other processes, {pid} most,", sum(others.values()))
        rest = (sample.utilisation or 0) - sum(share for pid, share in sample.shares.items() if pid in known)
        if not self.training and rest > self.most_utilisation:
            return self._over("utilisation", "others than training and the engine", rest)
        return None

    def _by_presence(self, sample: Sample, strangers: set[int]) -> Reading | None:
        if not self.training and sample.utilisation is not None:
            return self._over("utilisation", "processes", sample.utilisation)
        new = strangers - self._residents if self.training else strangers
        if not new:
            return None
        how = "came to" if self.training else "is on"
        reason = f"process {min(new)} {how} {self.device.uuid}, which does not tell who computes"
        return Reading(False, reason, "other_process")

    def _over(self, cause: str, who: str, percent: int) -> Reading:
        return Reading(False, f"{who} compute {percent}% of {self.device.uuid}, takes {self.most_utilisation}%", cause)


def device_probe(
    device: str | None,
    *,
    cores: int,
    least_free_bytes: int,
    own_pids: Pids,
    engine: int | None = None,
    allowed: set[int] | None = None,
) -> NvmlProbe | HostProbe:
    """The probe of a device: NVML's of a CUDA device, the host's of a CPU device or where there is no NVML (said once).

    NVML that is there but fails at this moment gets its probe, which is not idle until NVML answers.

    Args:
        device: one entry of CUDA_VISIBLE_DEVICES; None: the CPU.
        engine: process of the replica's server; it and all that descend from it are the engine's.

    Other arguments as of the two probes.

    Raises:
        ValueError: see the two probes.
    """
    from tlt_verl.spot.host import HostProbe, family_of  # needs what stands above

    if device is not None:
        probe = NvmlProbe(device, least_free_bytes, own_pids, engine_pids=family_of(engine))
        if probe.error is None or not probe.error.absent:
            return probe
        _warn_once(f"NVML is not here: {probe.error}. The machine's cores stand for device {device}")
    root = set() if engine is None else {engine}  # the engine answers for itself; the probe finds the children
    return HostProbe(cores, lambda: own_pids() | root, allowed)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@dataclass(frozen=True)
class Decision:
    """What follows from the readings of one moment.

    Args:
        train: whether training may start, or go on.
        idle_s: for how long every probe has been idle; 0 where one is not.
        probe: the one that was not idle, or "".
        cause: see `Reading`; "waiting" while all are idle, but not for long enough; "" where `train`.
        reason: see `Reading`.
    """

    train: bool
    idle_s: float
    probe: str = ""
    cause: str = ""
    reason: str = ""


class IdleDetector:
    """Decides from all probes: all of them agree before training starts, any one of them ends it at once.

    | phase    | engine   | device   | all idle for  | train              |
    |----------|----------|----------|---------------|--------------------|
    | not idle | not read | not read |               | no: phase's cause  |
    | idle     | not idle | not read |               | no: engine's cause |
    | idle     | idle     | not idle |               | no: device's cause |
    | idle     | idle     | measures |               | no: device's cause |
    | idle     | idle     | idle     | below idle_s  | no: waiting        |
    | idle     | idle     | idle     | idle_s and on | yes                |

    A reading that is not idle begins the wait anew. One that is still being measured does not, unless we train already:
    then it ends that like any other. A probe that raises is not idle, cause "probe_error", and is logged
    once for each message.

    Args:
        probes: in the order in which they are read, cheapest first; reading stops at the first that is not idle.
        idle_s: time without interruption before training starts.
    """

    def __init__(self, probes: Sequence[Probe], idle_s: float) -> None:
        self._probes, self._idle_s = tuple(probes), idle_s
        self._told = {probe for probe in probes if isinstance(probe, KnowsTraining)}  # asking a protocol takes long
        self._idle_since: float | None = None
        self._logged: set[str] = set()
        self.training = False
        self.causes: Counter[str] = Counter()
        """Readings that were not idle, by cause."""
        self.stops: Counter[str] = Counter()
        """Of these, the ones that ended training."""

    def update(self, now: float, training: bool | None = None) -> Decision:
        """Read the probes and decide.

        Args:
            now: seconds of a clock that never goes back.
            training: whether we train at this moment; None: as the last decision said.
        """
        self.training = self.training if training is None else training
        measuring = None
        for probe in self._probes:
            reading = self._read(probe)
            if reading.measuring and not self.training:
                measuring = (probe.name, reading)
            elif not reading.idle:
                return self._stop(probe.name, reading)
        if self._idle_since is None or now < self._idle_since:
            self._idle_since = now
        idle_s = now - self._idle_since
        if measuring is not None:
            name, reading = measuring
            self.causes[reading.cause] += 1
            return Decision(False, idle_s, name, reading.cause, reading.reason)
        self.training = idle_s >= self._idle_s
        if self.training:
            return Decision(True, idle_s)
        return Decision(False, idle_s, cause="waiting", reason=f"idle for {idle_s:.3f} s, takes {self._idle_s:g} s")

    def _stop(self, name: str, reading: Reading) -> Decision:
        self.causes[reading.cause] += 1
        if self.training:
            self.stops[reading.cause] += 1
        self.training, self._idle_since = False, None
        return Decision(False, 0.0, name, reading.cause, reading.reason)

    def _read(self, probe: Probe) -> Reading:
        if probe in self._told:
            probe.training = self.training
        try:
            return probe.read()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if (told := f"{probe.name}: {message}") not in self._logged:
                self._logged.add(told)
                logger.exception("the probe %s failed and counts as not idle", probe.name)
            return Reading(False, message, "probe_error")
