"""The spot worker's loop: when it trains, how it leaves, what it hands in, and that nothing makes it raise.

Board, rings, probes, learner, gate and coordination are the real ones. Bounds are in steps: a request that comes inside
a step is seen before the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sampled_target import one_thread
from test_spot_learner import CONFIG, POLICY, SEGMENTS, H, NotedLearner, NotedLinks, same, weights

from tlt_verl.board import Board, Phase, SpotState, now_ns
from tlt_verl.drafter.checkpoint import Checkpoint
from tlt_verl.segments import SegmentWriter
from tlt_verl.spot import worker as worker_module
from tlt_verl.spot.coordination import Coordination
from tlt_verl.spot.idle import EngineProbe, IdleDetector, PhaseProbe, Reading
from tlt_verl.spot.learner import LearnerSettings, SpotLearner
from tlt_verl.spot.links import Policy
from tlt_verl.spot.rings import Rings
from tlt_verl.spot.worker import SpotWorker, WorkerSettings

FOR_EVER = 1e9
GATE_NOW = WorkerSettings(gate_every_s=1e-6, train_per_gate=0.0, window_s=FOR_EVER)


class Until:
    """A probe that objects once so many micro-steps were counted: to whom the device is, is decided between two."""

    name = "until"

    def __init__(self, board: Board) -> None:
        self._board, self.steps = board, 0

    def read(self) -> Reading:
        idle = self._board.trained_steps < self.steps
        return Reading(idle, f"{self._board.trained_steps} steps", "" if idle else "steps")


class Written:
    """A probe whose readings are written down; the last one stays."""

    name = "written"

    def __init__(self, *readings: bool) -> None:
        self._readings = list(readings)

    def read(self) -> Reading:
        idle = self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]
        return Reading(idle, "as written", "" if idle else "written")


class Meanwhile:
    """A probe during whose reading a request comes, once the worker trains: those before it have been read."""

    name = "meanwhile"

    def __init__(self) -> None:
        self.stage: Stage | None = None

    def read(self) -> Reading:
        if self.stage is not None and self.stage.board.state == SpotState.TRAINING and not self.stage.board.requests:
            self.stage.request()
        return Reading(True, "not looked at", "")


@cache
def start() -> Checkpoint:
    return Checkpoint(Path("start"), CONFIG, weights(), None, None, 0)


class Stage:
    """One replica with its worker. `segments=()` has nothing to learn from."""

    def __init__(
        self, folder: Path, *probes: Any, segments: Any = SEGMENTS, settings: Any = None, **learner: Any
    ) -> None:
        self.board = Board.create("stage", folder)
        self.board.phase, self.board.allowed = Phase.GENERATE, 1
        self.writer = SegmentWriter("stage", hidden_width=H, slots=64, slot_tokens=256, folder=folder)
        self.write(segments)
        self.coordination, self.until = Coordination(start(), serves=False), Until(self.board)
        self.links, self.rings = NotedLinks(self.coordination), Rings("stage", folder)
        self.states, self.said = list[SpotState](), dict[SpotState, Callable[[], None]]()
        options = {"step_s": 10.0, "most_rows": 256, "held_out": 0.3, "gate_tokens": 600, "least": 1.0}
        self.learner = NotedLearner(CONFIG, weights(), LearnerSettings(**options | learner))
        board_probes = (PhaseProbe(self.board, stale_s=3600), EngineProbe(self.board, stale_s=3600))
        self.worker = SpotWorker(
            self.board,
            IdleDetector((*board_probes, *probes, self.until), 0.0),
            self.learner,
            self.rings,
            self.links,
            settings or WorkerSettings(gate_every_s=FOR_EVER, window_s=FOR_EVER),
            self.say,
        )

    def say(self, state: SpotState) -> None:
        self.states.append(state)
        self.said.get(state, lambda: None)()

    def write(self, segments: Any) -> None:
        for segment in segments:
            self.writer.write(segment)

    def tick(self, steps: int = 0) -> int:
        """Look once; the device is idle for so many steps. Returns how many there were."""
        before = self.board.trained_steps
        self.until.steps, self.board.beat_ns = before + steps, now_ns()
        self.worker.tick()
        return self.board.trained_steps - before

    def settle(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        """Look, with the device another's, until what was sent off has ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            self.tick()
            time.sleep(0.001)

    def train_until(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        """Train, a step a window, for as long as it takes."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            self.tick(1)

    def request(self) -> None:
        self.board.needed_ns = now_ns()
        self.board.requests = 1

    def next_policy(self) -> None:
        """The policy's next version, and what it sampled."""
        self.board.policy_version += 1
        version = self.board.policy_version
        self.links.now = Policy(version, POLICY.embed + 0.01 * version, POLICY.head)
        self.write(replace(s, policy_version=version, request_id=f"{version}-{s.request_id}") for s in SEGMENTS[:20])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker_module, "_RETRY_S", 0.0)
    monkeypatch.setattr(worker_module, "_AGAIN_S", 0.0)
    with one_thread():
        yield


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.writer.close()


# --- when it trains ---------------------------------------------------------------------------------------------------

OBJECTIONS = {
    "starting": {"phase": Phase.STARTING},
    "sync": {"phase": Phase.SYNC},
    "policy": {"phase": Phase.POLICY},
    "a request": {"requests": 1},
    "the engine": {"engine_busy": 1},
    "no coordinator": {"allowed": 0},
}


@pytest.mark.parametrize("objection", OBJECTIONS)
def test_it_does_nothing_while_one_says_no_and_trains_when_all_agree(stage, objection):
    was = stage.board.values(tuple(OBJECTIONS[objection]))
    for field, value in OBJECTIONS[objection].items():
        setattr(stage.board, field, value)
    assert [stage.tick(5) for _ in range(3)] == [0, 0, 0]
    assert stage.links.calls == [] and stage.states == [] and stage.board.windows == 0
    for field, value in was.items():
        setattr(stage.board, field, value)
    assert stage.tick(5) == 5
    assert stage.board.worker_beat_ns > 0


def test_a_server_that_is_silent_is_not_believed(stage):
    stage.until.steps, stage.board.beat_ns = 5, now_ns() - 2 * 3600 * 10**9
    stage.worker.tick()
    assert stage.board.trained_steps == 0


@pytest.mark.parametrize("agree", [0, 1, 2, 3, 5, 8, 20])
def test_any_probe_ends_it_at_once(tmp_path, agree):
    """It is asked in the tick, while the worker gets ready, and before each step."""
    stage = Stage(tmp_path, Written(*[True] * agree, False))
    steps = stage.tick(50)
    assert steps < max(agree, 1) and (steps > 0 or agree < 20)
    assert stage.states[-2:] == ([SpotState.YIELDING, SpotState.BUSY] if agree else [])
    assert stage.tick(50) == 0


@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_request_inside_a_step_is_seen_before_the_next(stage, number):
    stage.learner.during = lambda: stage.request() if stage.board.trained_steps == number - 1 else None
    assert stage.tick(100) == number
    assert stage.states == [SpotState.IDLE, SpotState.TRAINING, SpotState.YIELDING, SpotState.BUSY]
    assert stage.board.state == SpotState.BUSY and stage.board.yields == 1
    assert stage.board.yield_ns_max == stage.board.yield_ns_last > 0
    assert stage.tick(100) == 0
    stage.board.requests = 0
    assert stage.tick(4) == 4


@pytest.mark.parametrize("call", ["policy", "fetch", "choose_hot"])
def test_a_request_while_it_gets_ready_is_seen_before_the_first_step(stage, call):
    stage.links.during[call] = stage.request
    assert stage.tick(100) == 0
    assert stage.board.state == SpotState.BUSY and SpotState.TRAINING not in stage.states
    assert stage.board.yields == 0, "it never had the device"
    assert "submit" not in stage.links.names()


def test_a_coordinator_that_is_gone_ends_it(stage):
    def lost() -> None:
        stage.board.allowed = 0

    stage.learner.during = lost
    assert stage.tick(100) == 1
    stage.learner.during = lambda: None
    assert stage.tick(100) == 0
    stage.board.allowed = 1
    assert stage.tick(4) == 4


def test_with_nothing_to_learn_from_it_takes_no_device(tmp_path):
    stage = Stage(tmp_path, segments=())
    assert [stage.tick(5) for _ in range(3)] == [0, 0, 0]
    assert SpotState.TRAINING not in stage.states and stage.links.names().count("submit") == 0


@pytest.mark.parametrize("what", ["nothing", "only what is held out"])
def test_with_nothing_to_learn_from_the_log_and_the_counters_are_quiet(tmp_path, what, monkeypatch):
    """It looks every 10 ms, and a replica may be idle for minutes before there is more. Between two looks it pauses."""
    monkeypatch.setattr(worker_module, "_AGAIN_S", 3600.0)
    stage = Stage(tmp_path, segments=(), hot_size=0)
    if what != "nothing":
        stage.write(segment for segment in SEGMENTS if stage.learner.buffer.is_held_out(segment.prompt_id))
    for _ in range(20):
        assert stage.tick(5) == 0
    assert stage.board.windows <= 1 and len(stage.states) <= 4


# --- what it hands in -------------------------------------------------------------------------------------------------


def test_what_was_learnt_is_handed_in_and_the_next_window_goes_on_from_it(stage):
    for merged, steps in enumerate((5, 7, 40), 1):
        assert stage.tick(steps) == steps
        stage.settle(lambda merged=merged: stage.coordination.merged == merged)
        assert same(stage.coordination.state()["drafter"], stage.learner.state()["drafter"])
    assert stage.coordination.state()["steps"] == stage.board.trained_steps == 52
    assert stage.coordination.tokens == stage.board.trained_tokens > 0
    assert [call[1] for call in stage.links.calls if call[0] == "submit"] == [0, 1, 2]
    assert stage.links.names().count("policy") == 1, "the policy has not changed"
    assert stage.worker.failures == {} and stage.board.master_version in (2, 3)
    assert stage.board.loss_micro > 0 and stage.board.trained_ns > 0


def test_a_step_that_began_when_a_request_had_come_is_not_trained_time(tmp_path):
    """On cores that others want such a step takes seconds, none of which the device was idle."""
    meanwhile = Meanwhile()
    stage = Stage(tmp_path, meanwhile)
    meanwhile.stage = stage
    assert stage.tick(5) == 1 and stage.board.yields == 1
    assert stage.board.trained_ns == 0 and stage.board.trained_tokens > 0
    stage.writer.close()


def test_a_long_window_ends_by_itself_and_another_begins(tmp_path):
    stage = Stage(tmp_path, settings=WorkerSettings(gate_every_s=FOR_EVER, window_s=0.2))
    first, second = stage.tick(10**6), stage.tick(10**6)
    assert first > 0 and second > 0
    stage.settle(lambda: stage.coordination.merged == 2)
    assert stage.coordination.state()["steps"] == first + second


def another_worker(stage: Stage) -> int:
    """It has trained on from the master as it is, and hands in. From how many tokens it has learnt."""
    learner = SpotLearner(CONFIG, weights(), LearnerSettings(step_s=10.0, seed=7))
    learner.add(SEGMENTS[:10])
    learner.follow(POLICY.version, POLICY.embed, POLICY.head)
    learner.load(stage.coordination.state(), stage.coordination.hot)
    assert learner.begin() and learner.micro_step()
    stage.coordination.merge(stage.coordination.version, learner.state(), learner.tokens)
    return learner.tokens


def test_what_another_worker_merged_between_two_windows_is_fetched(stage):
    stage.tick(5)
    stage.settle(lambda: stage.coordination.merged == 1)
    another_worker(stage)
    wanted = stage.coordination.state()["drafter"]
    assert not same(stage.learner.state()["drafter"], wanted)
    assert stage.tick(1) == 1
    assert same(stage.learner.loaded, wanted)


def test_an_average_with_another_worker_is_fetched(stage):
    """The other one was faster with the same base: what the master became is not this worker's copy."""
    stage.learner.during = lambda: another_worker(stage) if stage.coordination.merged == 0 else None
    stage.tick(5)
    stage.settle(lambda: stage.coordination.merged == 2)
    wanted = stage.coordination.state()["drafter"]
    stage.learner.during = lambda: None
    stage.tick(1)
    assert [call[1] for call in stage.links.calls if call[0] == "fetch"] == [-1, -1]
    assert same(stage.learner.loaded, wanted)


def test_what_the_average_became_is_fetched_while_the_device_is_anothers(stage, monkeypatch):
    """And not again in the window, where nothing has changed since."""
    monkeypatch.setattr(worker_module, "_AHEAD_S", 0.0)
    stage.learner.during = lambda: another_worker(stage) if stage.coordination.merged == 0 else None
    stage.tick(5)
    stage.settle(lambda: stage.coordination.merged == 2)
    stage.settle(lambda: stage.links.names().count("fetch") == 2)
    wanted, loaded = stage.coordination.state()["drafter"], stage.learner.loaded
    assert not same(loaded, wanted), "nothing is loaded before the device is idle"
    states = []
    fetch = stage.links.fetch
    stage.links.fetch = lambda *has: states.append(answer := fetch(*has)) or answer
    stage.learner.during = lambda: None
    stage.tick(1)
    assert same(stage.learner.loaded, wanted)
    assert [master.state for master in states] == [None]


def test_the_policys_tensors_are_asked_for_when_it_has_changed(stage):
    stage.tick(3)
    stage.next_policy()
    stage.train_until(lambda: stage.learner.policy_version == 1)
    assert stage.links.names().count("policy") == 2
    assert stage.learner.buffer.newest_version == 1


def test_it_trains_on_while_a_new_policys_tensors_are_on_their_way_and_judges_when_they_are_there(tmp_path):
    stage, come = Stage(tmp_path, settings=GATE_NOW), threading.Event()
    stage.train_until(lambda: stage.learner.gate.published == 1)
    stage.settle(lambda: stage.coordination.serving_version == 1)
    stage.next_policy()
    stage.links.during["policy"] = lambda: come.wait(60)
    judged = stage.learner.gate.published + stage.learner.gate.rejected
    assert stage.tick(5) == 5 and stage.learner.policy_version == 0
    assert stage.learner.gate.published + stage.learner.gate.rejected == judged
    come.set()
    stage.train_until(lambda: stage.learner.gate.published + stage.learner.gate.rejected > judged)
    assert stage.learner.policy_version == 1


def test_the_loop_ends_with_its_replica_and_what_was_learnt_is_in(stage):
    def stop() -> None:
        if stage.board.trained_steps == 6:
            stage.board.phase = Phase.STOPPED

    stage.learner.during, stage.until.steps, stage.board.beat_ns = stop, 100, now_ns()
    stage.worker.run(lambda: False)
    assert stage.coordination.state()["steps"] == stage.board.trained_steps == 7
    assert stage.board.state == SpotState.BUSY
