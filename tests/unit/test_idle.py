"""The probes of the board and of the host's cores, and the detector's truth table. NVML's probe: test_nvml_*.py."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tlt_verl.board import Board, Phase, now_ns
from tlt_verl.spot.host import CoreMeter, HostProbe, idle_seconds
from tlt_verl.spot.idle import EngineProbe, IdleDetector, PhaseProbe, Reading, device_probe

pytestmark = pytest.mark.alone  # what is free on a core is what others leave

# --- the board's probes -----------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> Board:
    board = Board.create("idle", tmp_path)
    board.phase, board.beat_ns = Phase.GENERATE, now_ns()
    return board


@pytest.mark.parametrize("phase", Phase)
def test_only_generate_leaves_the_device_to_the_rollout(board: Board, phase: Phase) -> None:
    board.phase = phase
    reading = PhaseProbe(board).read()
    assert reading.idle is (phase is Phase.GENERATE)
    assert reading.reason == f"verl's phase is {phase.name}"
    assert reading.cause == ("" if reading.idle else "phase")


def test_a_phase_that_is_none_is_an_error(board: Board) -> None:
    board.phase = 99
    with pytest.raises(ValueError, match="99 is not a valid Phase"):
        PhaseProbe(board).read()


@pytest.mark.parametrize(
    ("requests", "busy", "cause", "reason"),
    [
        (0, 0, "", "no requests"),
        (1, 0, "requests", "1 requests run or wait"),
        (7, 1, "requests", "7 requests run or wait"),
        (0, 1, "engine_busy", "the scheduler is busy (engine_busy 1)"),
        (-1, 0, "requests", "-1 requests run or wait"),  # a front that lost count is not idle
    ],
)
def test_the_engine_is_idle_without_requests(board: Board, requests: int, busy: int, cause: str, reason: str) -> None:
    board.requests, board.engine_busy = requests, busy
    assert EngineProbe(board).read() == Reading(cause == "", reason, cause)


@pytest.mark.parametrize("kind", [EngineProbe, PhaseProbe])
@pytest.mark.parametrize(("age_s", "stale"), [(0, False), (4.9, False), (5.1, True), (-4.9, False), (-5.1, True)])
def test_a_server_that_no_longer_beats_is_not_believed(board: Board, kind: type, age_s: float, stale: bool) -> None:
    board.beat_ns = 10**12
    reading = kind(board, clock_ns=lambda: 10**12 + round(age_s * 1e9)).read()
    assert reading.idle is not stale
    if stale:
        assert reading == Reading(False, f"the server's last heartbeat is {age_s:.1f} s old, takes 5 s", "stale")


def test_a_board_that_nobody_has_written_is_stale(tmp_path: Path) -> None:
    assert EngineProbe(Board.create("new", tmp_path), clock_ns=lambda: 10**12).read().cause == "stale"


# --- the host's cores -------------------------------------------------------------------------------------------------

SPIN = "import os\nos.sched_setaffinity(0, {%d})\nprint('on', flush=True)\nwhile True: pass\n"
WITH_CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n"
PATIENCE_S = 60.0  # other processes may have the machine meanwhile


@pytest.fixture
def core() -> int:
    return max(os.sched_getaffinity(0))


def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    yield process
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.wait(10)
    process.stdout.close()


@pytest.fixture
def spinner(core: int) -> Iterator[subprocess.Popen[str]]:
    yield from started(SPIN % core)


@pytest.fixture
def parent_of_spinner(core: int) -> Iterator[subprocess.Popen[str]]:
    yield from started(WITH_CHILD, SPIN % core)


def nothing() -> set[int]:
    return set()


def test_a_core_on_which_another_spins_is_not_free(spinner: subprocess.Popen[str], core: int) -> None:
    probe = HostProbe(1, nothing, {core}, window_s=0.3)
    assert probe.read() == Reading(False, "no window yet", "no_window", measuring=True)
    time.sleep(0.4)
    reading = probe.read()
    assert (reading.idle, reading.cause) == (False, "utilisation")
    assert reading.reason.endswith("cores are free, takes 0.25")


def test_what_we_compute_ourselves_is_free(spinner: subprocess.Popen[str], core: int) -> None:
    """Idle beside it: the same core, asked by one who owns the spinner and by one who does not."""
    ours = HostProbe(1, lambda: {spinner.pid}, {core}, tolerance=0.6)
    theirs = HostProbe(1, nothing, {core}, tolerance=0.6)
    saw: list[tuple[bool, bool]] = []
    until = time.monotonic() + PATIENCE_S
    while (True, False) not in saw and time.monotonic() < until:
        time.sleep(0.2)
        saw.append((ours.read().idle, theirs.read().idle))
    assert (True, False) in saw
    assert (False, True) not in saw


@pytest.mark.parametrize("whose", ["spinner", "parent_of_spinner"])
def test_our_cpu_time_is_counted_with_our_childrens(whose: str, core: int, request: pytest.FixtureRequest) -> None:
    pid = request.getfixturevalue(whose).pid
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family)

    ours, theirs = CoreMeter(lambda: {pid}, {core}), CoreMeter(nothing, {core})
    assert ours.measure() is None and theirs.measure() is None
    begun, before = time.monotonic(), spent()
    time.sleep(1.0)
    with_ours, without = ours.measure(), theirs.measure()
    share = (spent() - before) / (time.monotonic() - begun)
    assert with_ours is not None and without is not None
    assert share > 0.1  # the spinner ran
    assert with_ours - without == pytest.approx(share, abs=0.1)
    assert 0 <= without <= with_ours <= 1


def test_processes_that_come_and_go_are_survived(core: int) -> None:
    own: set[int] = set()
    meter = CoreMeter(lambda: own, {core})
    for process in started(SPIN % core):
        time.sleep(0.5)
        meter.measure()
        own.add(process.pid)
        time.sleep(0.1)
        free = meter.measure()
        assert free is not None and free < 0.5  # what it computed before it was ours
        time.sleep(0.1)
        meter.measure()
    time.sleep(0.05)
    free = meter.measure()
    assert free is not None and 0 <= free <= 1  # what it had computed is not taken back
    own.add(2**22 + 1)
    time.sleep(0.05)
    assert meter.measure() is not None


def test_readings_within_a_window_are_one_and_a_pause_begins_a_new_one(core: int) -> None:
    now = 100.0
    probe = HostProbe(1, nothing, {core}, window_s=0.1, clock=lambda: now)
    causes = []
    for step in (0, 0.09, 0.02, 0.05, 0.06, 1.5, 0.2):
        now += step
        reading = probe.read()
        causes.append("measured" if reading.reason.endswith("takes 0.25") else reading.cause)
    assert causes == ["no_window"] * 2 + ["measured"] * 3 + ["no_window", "measured"]
    probe.training = True  # a micro-step may be longer than a window: it was ours
    now += 1.5
    assert probe.read().cause != "no_window"


def test_idle_time_is_of_the_allowed_cores() -> None:
    cores = os.sched_getaffinity(0)
    for core in cores:
        assert idle_seconds(frozenset({core})).keys() == {core}
    before = idle_seconds(frozenset(cores))
    assert before.keys() == cores and all(seconds > 0 for seconds in before.values())
    assert idle_seconds(frozenset({4096})).keys() >= cores  # numbers of another namespace: all that there are


@pytest.mark.parametrize(("cores", "allowed"), [(0, {0}), (2, {0}), (10**6, None)])
def test_more_cores_than_are_allowed_are_refused(cores: int, allowed: set[int] | None) -> None:
    with pytest.raises(ValueError, match=f"cores: got {cores}, takes 1 to the "):
        HostProbe(cores, nothing, allowed)


def test_a_cpu_device_is_the_hosts_cores() -> None:
    probe = device_probe(None, cores=1, least_free_bytes=0, own_pids=nothing)
    assert isinstance(probe, HostProbe) and probe.name == "host"


# --- the detector -----------------------------------------------------------------------------------------------------


class Scripted:
    """A probe that says what it is told to, and counts how often it was asked."""

    def __init__(self, name: str, idle: bool = True) -> None:
        self.name, self.idle, self.reads = name, idle, 0
        self.error: Exception | None = None
        self.measuring = False

    def read(self) -> Reading:
        self.reads += 1
        if self.error is not None:
            raise self.error
        cause = "" if self.idle else f"{self.name}'s cause"
        return Reading(self.idle, f"{self.name} said so", cause, self.measuring)


class Told(Scripted):
    """One that must know whether we train."""

    training = False

    def read(self) -> Reading:
        self.seen = self.training
        return super().read()


NAMES = ("phase", "engine", "device")


@pytest.mark.parametrize("waited_s", [0.0, 0.125, 0.25, 5.0])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("idle", itertools.product([False, True], repeat=3))
def test_the_truth_table(idle: tuple[bool, bool, bool], training: bool, waited_s: float) -> None:
    probes = [Scripted(name) for name in NAMES]
    detector = IdleDetector(probes, idle_s=0.25)
    detector.update(10.0)
    for probe, says in zip(probes, idle, strict=True):
        probe.idle, probe.reads = says, 0
    decision = detector.update(10.0 + waited_s, training)
    first = idle.index(False) if False in idle else None
    assert decision.train is detector.training is (first is None and waited_s >= 0.25)
    if first is not None:
        name = NAMES[first]
        assert (decision.probe, decision.cause, decision.reason) == (name, f"{name}'s cause", f"{name} said so")
        assert decision.idle_s == 0
        assert detector.causes == {decision.cause: 1}
        assert detector.stops == ({decision.cause: 1} if training else {})
    else:
        assert decision.idle_s == pytest.approx(waited_s)
        assert decision.cause == ("" if decision.train else "waiting")
        assert not detector.causes and not detector.stops
    assert [probe.reads for probe in probes] == [int(first is None or place <= first) for place in range(3)]


def run(detector: IdleDetector, times: list[float]) -> list[bool]:
    return [detector.update(at).train for at in times]


@pytest.mark.parametrize("name", NAMES)
def test_any_one_ends_it_at_once_and_the_wait_begins_anew(name: str) -> None:
    probes = {each: Scripted(each) for each in NAMES}
    detector = IdleDetector(list(probes.values()), idle_s=0.2)
    assert run(detector, [0.0, 0.1, 0.2, 0.3]) == [False, False, True, True]
    probes[name].idle = False
    assert run(detector, [0.301]) == [False]
    probes[name].idle = True
    assert run(detector, [0.31, 0.5, 0.511]) == [False, False, True]
    assert detector.stops == {f"{name}'s cause": 1}


def test_one_objection_while_waiting_begins_the_wait_anew() -> None:
    probe = Scripted("device")
    detector = IdleDetector([probe], idle_s=1.0)
    trained = []
    for tenth in range(40):
        probe.idle = tenth % 9 != 8  # never a whole second
        trained.append(detector.update(tenth / 10).train)
    assert not any(trained)
    assert detector.causes == {"device's cause": 4} and not detector.stops


def test_a_probe_that_is_still_measuring_keeps_training_from_starting_and_not_the_wait() -> None:
    """What it measures lies inside the wait: it would be waited for twice."""
    probe = Scripted("host")
    detector = IdleDetector([Scripted("engine"), probe], idle_s=0.2)
    probe.idle, probe.measuring = False, True
    assert run(detector, [0.0, 0.1, 0.25]) == [False, False, False]
    assert detector.update(0.26).idle_s == pytest.approx(0.26)
    probe.idle, probe.measuring = True, False
    assert run(detector, [0.3]) == [True]
    probe.idle, probe.measuring = False, True  # while we train, it is an objection like any other
    assert run(detector, [0.4]) == [False]
    assert detector.stops == {"host's cause": 1}
    probe.idle, probe.measuring = True, False
    assert run(detector, [0.5, 0.71]) == [False, True]


def test_without_a_wait_training_may_start_at_once_and_time_that_goes_back_begins_anew() -> None:
    assert IdleDetector([Scripted("device")], idle_s=0).update(5.0).train
    detector = IdleDetector([Scripted("device")], idle_s=1.0)
    assert run(detector, [10.0, 11.0, 9.0, 9.9, 10.0]) == [False, True, False, False, True]


def test_a_probe_that_fails_is_not_idle_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    probe = Scripted("device")
    detector = IdleDetector([Scripted("phase"), probe], idle_s=0)
    assert detector.update(0.0).train
    for error in (OSError("gone"), OSError("gone"), ValueError("gone")):
        probe.error = error
        with caplog.at_level(logging.ERROR):
            decision = detector.update(1.0)
        assert (decision.train, decision.probe, decision.cause) == (False, "device", "probe_error")
        assert decision.reason == f"{type(error).__name__}: gone"
    assert [record.exc_info is not None for record in caplog.records] == [True, True]
    assert detector.causes == {"probe_error": 3} and detector.stops == {"probe_error": 1}
    probe.error = None
    assert detector.update(2.0).train


@pytest.mark.parametrize("overruled", [None, False])
def test_a_probe_is_told_whether_we_train(overruled: bool | None) -> None:
    """By the detector's last decision, or by the caller, who may not have started."""
    probe = Told("device")
    detector = IdleDetector([probe], idle_s=0.2)
    seen: list[bool] = []
    for at in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6):
        probe.idle = at < 0.5
        detector.update(at, overruled)
        seen.append(probe.seen)
    assert seen == [False, False, *[overruled is None] * 3, False]
