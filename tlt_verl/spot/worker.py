"""The spot worker's loop: wait until the device is idle, train, and be gone before anyone needs it.

    BUSY       the device is another's
    IDLE       all probes agree: take the segments, the policy's tensors, the master
    TRAINING   micro-steps and steps of the gate; between two of them the probes are read
    YIELDING   one of them said no: the device's memory is given back, the copy is handed in afterwards

Knows the probes, the learner and the links to the others; starts no process and imports neither Ray nor SGLang. What
goes wrong here is counted, said in the log with its cause, and costs the drafter's training at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from tlt_verl.board import Board, Phase, SpotState, now_ns
from tlt_verl.drafter.trainer import DrafterDiverged
from tlt_verl.segments import Segment
from tlt_verl.spot.gate import Verdict
from tlt_verl.spot.idle import IdleDetector
from tlt_verl.spot.learner import SpotLearner
from tlt_verl.spot.links import CopyRefused, LinkError, Links, Master, Policy
from tlt_verl.spot.process import between_looks
from tlt_verl.spot.rings import Rings
from tlt_verl.spot.window import Window

logger = logging.getLogger(__name__)

_POLL_S = 0.05  # while the device is another's: each look costs it 0.3 ms
_WAIT_S = 0.001
_RETRY_S = 5.0
_AGAIN_S = 0.25
_READ_AT_ONCE = 16  # segments
_REFRESH_S = 1.0  # between two looks at the rings while training
_AHEAD_S = 2.0  # behind the end of a window; by then the others of this step have handed in, too


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """When a spot worker does what.

    Args:
        gate_every_s: least training time between two judgements.
        train_per_gate: the same in times of what the last judgement took. 2: a third of idle time at most is judging.
        dtype: in which drafters serve.
        window_s: longest window; then the copy is handed in, and another window begins.
    """

    gate_every_s: float = 1.0
    train_per_gate: float = 2.0
    dtype: str = "bfloat16"
    window_s: float = 30.0


class SpotWorker:
    """One replica's spot worker.

    Args:
        board: the replica's; this writes the worker's fields.
        detector: says when the device is idle.
        learner: what is trained.
        rings: where segments come from.
        links: to the engine and the coordinator.
        settings: when.
        say: is told every change of state, for the run's log.
    """

    def __init__(
        self,
        board: Board,
        detector: IdleDetector,
        learner: SpotLearner,
        rings: Rings,
        links: Links,
        settings: WorkerSettings,
        say: Callable[[SpotState], None] = lambda state: None,
    ) -> None:
        self.board, self.learner, self.settings = board, learner, settings
        self._detector, self._rings, self._links, self._say = detector, rings, links, say
        self._master, self._serving_version = -1, 0
        self._serving: Mapping[str, torch.Tensor] | None = None
        self._judging: Generator[None, None, Verdict] | None = None
        self._candidate: dict[str, torch.Tensor] = {}
        self._since_gate_s, self._gate_s = 0.0, 0.0
        self._background = ThreadPoolExecutor(1, thread_name_prefix="tlt-spot-links")
        self._pending: deque[Future[Any]] = deque()  # calls to the others that have not been taken note of
        self._retry_at = 0.0
        self._has_device_since = 0  # by the board's clock; 0 while it is another's
        self._stopped_by = ""  # why training may not go on now; "" where it may
        self._policy_asked: Future[Policy | None] | None = None
        self._master_asked: Future[Master] | None = None
        self._look_ahead_at = math.inf
        self.failures: Counter[str] = Counter()
        """What kept it from training, by kind."""

    def run(self, stopped: Callable[[], bool]) -> None:
        """Loop until `stopped`, or until the replica has stopped."""
        self._enter(SpotState.BUSY)
        while not stopped() and self.board.phase != Phase.STOPPED:
            self.tick()
            time.sleep(between_looks(self.board, _POLL_S))
        self._background.shutdown(wait=True, cancel_futures=True)

    def tick(self) -> None:
        """Look once, and train for as long as the device is idle."""
        self._settle()
        if time.monotonic() < self._retry_at or not self._goes_on():
            self._look_ahead()
            return
        try:
            self._window()
        except LinkError as error:
            self._failed(error)
        except Exception as error:  # dies alone: the run goes on, the log and the counters say why
            self._master = -1  # its copy is of no use to anybody
            if not isinstance(error, DrafterDiverged):
                logger.exception("tlt: the spot worker failed")
            self._failed(error)

    def _window(self) -> None:
        """From idle to yielded. The device's memory is free again however this ends."""
        until, window = time.monotonic() + self.settings.window_s, Window(self.board)
        self._enter(SpotState.IDLE)
        self.board.windows += 1
        try:
            if self._prepare(window):
                self._enter(SpotState.TRAINING)
                self._train(until)
            else:
                self._retry_at = time.monotonic() + _AGAIN_S  # there may be more to learn from then
        finally:
            self._yield()
            window.report(self.learner.size.rows, self._stopped_by)
        self._hand_in()

    # --- idle: what training needs

    def _prepare(self, window: Window) -> bool:
        """Get segments, policy and master; whether there is something to train on and the device is still idle."""
        with window.preparing("rings"):
            if not self._read_rings() or not self._wait_for_pending():
                return False
        if self.learner.buffer.newest_version is None:
            return False
        with window.preparing("policy and master"):
            if not (self._take_policy_and_master() and self._goes_on()):
                return False
        self._has_device_since = now_ns()
        with window.preparing("device"):
            return self.learner.begin() and self._goes_on()

    def _read_rings(self) -> bool:
        """Take what the replicas have recorded; False where the device is needed before that is done."""
        fresh: list[Segment] = []
        while segments := self._rings.poll(_READ_AT_ONCE):
            fresh += segments
            if not self._goes_on():
                break
        if fresh:
            self.learner.add(fresh)
        return self._goes_on()

    def _take_policy_and_master(self) -> bool:
        """Both at the same time; False while too little is known to train.

        Only for the first policy is there anything to wait for. Until the tensors of a newer one are there the drafter
        learns against those of the one before: what it learns from at that moment was sampled from that one.
        """
        self._ask_policy()
        if self.learner.policy_version < 0 and not self._take_policy(wait=True):
            return False  # a hot vocabulary is chosen from its own head
        took = self._take_master()
        self._take_policy()
        return took

    def _ask_policy(self) -> None:
        """Ask for the policy's tensors, where they have changed, without waiting for them."""
        if self._policy_asked is None and self.learner.policy_version != self.board.policy_version:
            self._policy_asked = self._background.submit(self._links.policy)

    def _take_policy(self, *, wait: bool = False) -> bool:
        """Follow the policy that was asked for, if it has come; whether it has."""
        asked = self._policy_asked
        if asked is None or not (wait or asked.done()):
            return False
        self._policy_asked = None
        policy = asked.result()
        if policy is None:
            return False  # the next window asks again
        self.learner.follow(policy.version, policy.embed, policy.head)
        self._drop_judging()
        return True

    def _take_master(self) -> bool:
        """Load the newest master, and agree on a hot vocabulary; False while too little is known for one."""
        if self._master_asked is not None:
            asked, self._master_asked = self._master_asked, None
            self._load(asked.result())
        return self._load(self._links.fetch(self._master, self._serving_version))

    def _load(self, master: Master) -> bool:
        hot = master.hot
        if hot is None and self.learner.settings.hot_size != 0:
            proposed = self.learner.propose_hot()
            if proposed is None:
                return False
            hot = self._links.choose_hot(proposed)
        if master.state is not None:
            self.learner.load(master.state, hot)
            self._drop_judging()
        self.learner.hot = hot
        self._master = master.version
        if master.serving_version != self._serving_version:
            self._serving_version, self._serving = master.serving_version, master.serving
            self._drop_judging()
        return True

    def _look_ahead(self) -> None:
        """Fetch what the average became while the device is another's: the next window may be shorter than that takes.

        It is copied on the host, by a process that runs when no other wants to.
        """
        if time.monotonic() > self._look_ahead_at and not self._pending and self._master_asked is None:
            self._look_ahead_at = math.inf
            self._master_asked = self._background.submit(self._links.fetch, self._master, self._serving_version)

    # --- training

    def _train(self, until: float) -> None:
        """Micro-steps and steps of the gate in turn, until the device is needed."""
        refreshed = time.monotonic()
        while self._goes_on() and time.monotonic() < until:
            if time.monotonic() - refreshed > _REFRESH_S:
                refreshed = time.monotonic()
                if not self._read_rings():
                    return
            if self._take_policy() and not self.learner.begin():
                return
            if self._judging is not None or self._gate_is_due():
                self._judge()
                continue
            begun = now_ns()
            report = self.learner.micro_step()
            if report is None:
                self._retry_at = time.monotonic() + _AGAIN_S
                return
            board, idle_ns = self.board, self._idle_ns(begun)
            self._since_gate_s += idle_ns / 1e9
            board.trained_ns += idle_ns
            board.trained_tokens += report.tokens
            board.trained_steps += 1

    def _goes_on(self) -> bool:
        """Whether every probe still says that the device is idle."""
        self.board.worker_beat_ns = now_ns()
        decision = self._detector.update(time.monotonic())
        self._stopped_by = decision.reason if not decision.train else ""
        if not self.board.allowed:
            self._stopped_by = "the coordinator does not answer"
        return not self._stopped_by

    def _gate_is_due(self) -> bool:
        """A judgement is about the policy that samples now, and what the last one published has come about."""
        self._settle()
        waits = bool(self._pending) or self.learner.policy_version != self.board.policy_version
        settings = self.settings
        return not waits and self._since_gate_s >= max(settings.gate_every_s, settings.train_per_gate * self._gate_s)

    def _judge(self) -> None:
        """One step of the gate. Training waits for its end: candidate and trainer are the same until then."""
        begun = now_ns()
        if self._judging is None:
            self._candidate = self.learner.weights(getattr(torch, self.settings.dtype))
            self._judging, self._gate_s = self.learner.judging(self._candidate, self._serving), 0.0
        try:
            next(self._judging)
        except StopIteration as end:
            self._judged(end.value)
        idle_ns = self._idle_ns(begun)
        self._gate_s += idle_ns / 1e9
        self.board.judged_ns += idle_ns

    def _idle_ns(self, begun: int) -> int:
        """Time since `begun` until the device was asked for. None where that was before, after the last look."""
        ended, needed = now_ns(), self.board.needed_ns
        if needed > self.board.worker_beat_ns:
            ended = min(ended, needed)
        return max(0, ended - begun)

    def _judged(self, verdict: Verdict) -> None:
        self._judging, self._since_gate_s = None, 0.0
        self.board.gate_published, self.board.gate_rejected = self.learner.gate.published, self.learner.gate.rejected
        if verdict.candidate_accept_len is not None:
            self.board.gate_accept_micro = round(1e6 * verdict.candidate_accept_len)
        logger.info("tlt: gate: %s", verdict.reason)
        if verdict.published:
            candidate, hot, accept_len = self._candidate, self.learner.hot, verdict.candidate_accept_len or 0.0
            self._pending.append(self._background.submit(self._publish, candidate, hot, accept_len))

    def _publish(self, weights: dict[str, torch.Tensor], hot: torch.Tensor | None, accept_len: float) -> None:
        published = self._links.publish(weights, hot, accept_len)
        for replica, reason in published.rejected.items():
            logger.error("tlt: %s did not take drafter %d: %s", replica, published.version, reason)
        if published.serves:
            self._serving, self._serving_version = weights, published.version

    def _drop_judging(self) -> None:
        """What is being judged is not what would be published, or compared with."""
        if self._judging is not None:
            self._judging.close()
            self._judging = None

    # --- yielding

    def _yield(self) -> None:
        """Give the device back, and note how long that took from the moment at which it was asked for."""
        self._enter(SpotState.YIELDING)
        if self.learner.device.type != "cpu":
            self._drop_judging()  # it holds tensors of the device
        self.learner.release()
        board = self.board
        if self._has_device_since and board.needed_ns > self._has_device_since:
            board.yields += 1
            board.yield_ns_last = now_ns() - board.needed_ns
            board.yield_ns_max = max(board.yield_ns_max, board.yield_ns_last)
        self._has_device_since = 0
        self._note_losses()
        self._enter(SpotState.BUSY)

    def _note_losses(self) -> None:
        if reports := self.learner.reports:
            for name in ("loss", "ce", "accept"):
                mean = sum(getattr(report, name) for report in reports) / len(reports)
                setattr(self.board, f"{name}_micro", round(1e6 * mean))

    def _hand_in(self) -> None:
        """Send the copy to the average, in the background."""
        learner = self.learner
        if self._master < 0:
            learner.tokens = 0  # of a copy that is of no use
        if not learner.tokens:
            return
        state, tokens, base = learner.state(copies=False), learner.tokens, self._master  # no window before that is done
        last = learner.reports[-1]
        report = {"loss": last.loss, "ce": last.ce, "accept": last.accept}
        learner.tokens = 0
        self._pending.append(self._background.submit(self._submit, base, state, tokens, report))
        self._look_ahead_at = time.monotonic() + _AHEAD_S

    def _submit(self, base: int, state: dict[str, Any], tokens: int, report: dict[str, float]) -> None:
        """The next window fetches what the average became, unless it is this copy itself."""
        try:
            version = self._links.submit(base, state, tokens, report)
        except CopyRefused:
            self._master = -1
            raise
        self._master = version if version == base + 1 else -1
        self.board.master_version = version

    def _settle(self) -> None:
        """Take note of how the calls to the others ended that have."""
        while self._pending and self._pending[0].done():
            if (error := self._pending.popleft().exception()) is not None:
                self._failed(error)

    def _wait_for_pending(self) -> bool:
        """Wait for the calls to the others while the device is idle; whether all have ended, and well."""
        while self._pending and self._goes_on():
            self._settle()
            time.sleep(_WAIT_S)
        return not self._pending and time.monotonic() >= self._retry_at

    def _failed(self, error: BaseException) -> None:
        kinds = ((LinkError, "link"), (DrafterDiverged, "diverged"))
        kind = next((kind for of, kind in kinds if isinstance(error, of)), type(error).__name__)
        self.failures[kind] += 1
        self.board.failures += 1
        self._retry_at = time.monotonic() + _RETRY_S
        logger.error("tlt: the drafter's training pauses for %.0f s (%s): %s", _RETRY_S, kind, error)

    def _enter(self, state: SpotState) -> None:
        if self.board.state != state:
            self.board.state = state
            self._say(state)
