"""A replica's side of spot training: the board, the spot worker's actor, and what verl is doing on the device.

Lives in the server's actor. The server tells it of every request and every call of verl's life cycle; it writes the
board, and looks after the spot worker and the coordinator from tasks of their own, so that nothing that happens to them
is waited for by a rollout. Neither is given the server's handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform

from tlt_verl.board import SERVER_FIELDS, WORKER_FIELDS, Board, Phase, now_ns
from tlt_verl.config import TLTConfig
from tlt_verl.drafter.checkpoint import load_checkpoint
from tlt_verl.spot.coordinator import create
from tlt_verl.spot.learner import LearnerSettings
from tlt_verl.spot.process import between_looks
from tlt_verl.spot.service import ServiceOptions, SpotService, replica_state, say
from tlt_verl.spot.subscriber import Receive, Subscriber
from tlt_verl.spot.worker import WorkerSettings

logger = logging.getLogger(__name__)

_BEAT_S = 0.5
_LOOK_S = 0.05
_REPORT_S = 2.0
_ANSWER_S = 10.0
_RESTART_S = 5.0
_START_S = 120.0  # an actor's process imports torch, on cores that others want
_LEAST_FREE_BYTES = 2 << 30
_KEPT = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
    "VERL_PLATFORM",
)
"""Variables of the server's environment that its spot worker needs: Ray would set some of them for no device."""


class SpotHost:
    """Spot training at one replica.

    Args:
        replica: its number.
        board: of the replica; this writes the server's fields.
        start_worker: starts a spot worker's actor.
        find_coordinator: returns the coordinator's handle.
        receive: takes a drafter (`Subscriber`).
        share_policy: lets the engine write the policy's tensors, and returns the policy's version.
        sleeps: whether the engine gives its memory back while the policy has the device.
    """

    def __init__(
        self,
        replica: int,
        board: Board,
        start_worker: Callable[[Any], Any],
        find_coordinator: Callable[[], Any],
        receive: Receive,
        share_policy: Callable[[], Awaitable[int]],
        sleeps: bool,
    ) -> None:
        self.board = board
        self._replica, self._start_worker, self._find_coordinator = replica, start_worker, find_coordinator
        self._share_policy, self._sleeps = share_policy, sleeps
        self._drafters = Subscriber(str(replica), receive, lambda: self.is_awake)
        self._idle_since: int | None = None
        self._said = ""
        self._aborted = False
        self._worker: Any = None
        self._workers_coordinator: Any = None
        self._sharing: asyncio.Future[int] | None = None
        self._coordinator: Any = None
        self._starts = 0
        self._failures: Counter[str] = Counter()
        self._said_by_coordinator: dict[str, float] = {}
        self._said_by_worker: dict[str, Any] = {}
        tasks = {"coordinator": self._call_coordinator, "worker": self._look_after_worker, "policy": self._share}
        self._tasks = [asyncio.create_task(self._for_ever(what, task)) for what, task in tasks.items()]
        board.step = -1

    # --- what the server tells

    def request_begins(self) -> None:
        """A request has come; whoever trains gives the device back."""
        if self.board.phase != Phase.GENERATE and not self._aborted:
            self.board.phase = Phase.GENERATE  # verl does not say when a validation begins
        if self.board.requests == 0:
            self.board.needed_ns = now_ns()
        self.board.requests += 1
        self._note()

    def request_ends(self) -> None:
        """A request has been answered, or has failed."""
        self.board.requests -= 1
        self._note()

    def phase(self, phase: Phase) -> None:
        """Verl does something else on this device now. From SYNC to GENERATE requests wait at the engine."""
        if phase in (Phase.SYNC, Phase.GENERATE):
            self._aborted = phase is Phase.SYNC
        if phase != self.board.phase:
            if phase is not Phase.GENERATE:
                self.board.needed_ns = now_ns()
            self.board.phase = phase
            self._drafters.has_news.set()
        self._note()

    def weights_came(self, step: int) -> None:
        """The policy's weights of this step are there; where requests were aborted for them, they go on later."""
        self.board.step = step
        if not self._aborted:
            self.phase(Phase.GENERATE)

    @property
    def is_awake(self) -> bool:
        """Whether the engine has its memory, so that a drafter can be published into it."""
        return not self._sleeps or self.board.phase == Phase.GENERATE

    def coordinator_metrics(self) -> dict[str, float]:
        """What the coordinator said of itself last."""
        return self._said_by_coordinator

    def state(self) -> dict[str, Any]:
        """The board, the time that is still running included, and what worker and host counted by cause."""
        values: dict[str, Any] = self.board.values((*SERVER_FIELDS, *WORKER_FIELDS))
        if self._idle_since is not None:
            values["idle_ns"] += now_ns() - self._idle_since
        counts = {name: self._said_by_worker.get(name, {}) for name in ("not_idle", "stops", "failures")}
        counts["host"] = self._failures + Counter(drafter=self._drafters.lost)
        own = {"worker_starts": self._starts, "host_failures": counts["host"].total()}
        return values | own | {"counts": counts}

    def _note(self) -> None:
        """Keep the time in which the device was idle, and say what has changed."""
        now, is_idle = now_ns(), self.board.phase == Phase.GENERATE and self.board.requests == 0
        if is_idle and self._idle_since is None:
            self._idle_since = now
        elif not is_idle and self._idle_since is not None:
            self.board.idle_ns += now - self._idle_since
            self._idle_since = None
        state = replica_state(self.board)
        if state != self._said:
            self._said = state
            say(self._replica, state, self.board)

    # --- worker and coordinator

    async def _for_ever(self, what: str, task: Callable[[], Awaitable[None]]) -> None:
        """Do this again and again, once verl has begun. It waits itself; after a failure it pauses."""
        while True:
            try:
                if self.board.phase == Phase.STARTING:
                    await asyncio.sleep(_LOOK_S)
                else:
                    await task()
            except Exception as error:  # the rollout goes on; counted, said, and tried again
                self._failures[what] += 1
                logger.error(
                    "tlt: spot training of replica %d pauses (%s): %s: %s",
                    *(self._replica, what, type(error).__name__, error),
                )
                await asyncio.sleep(_RESTART_S)

    async def _call_coordinator(self) -> None:
        """Tell the coordinator how this replica is, and take the drafter that it lacks."""
        try:
            if self._coordinator is None:
                self._coordinator = await asyncio.to_thread(self._find_coordinator)
            self._said_by_coordinator = await self._drafters.beat(self._coordinator)
        except BaseException as error:
            self.board.allowed = 0
            if isinstance(error, ActorDiedError):
                self._coordinator = None  # for good. Otherwise Ray starts it again, unless its last handle is dropped
            raise
        self.board.allowed = 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drafters.has_news.wait(), between_looks(self.board, _BEAT_S))

    async def _look_after_worker(self) -> None:
        """See to it that there is a worker, once there is a coordinator."""
        await asyncio.sleep(_REPORT_S if self._worker is not None else _BEAT_S)
        if self._coordinator is None:
            return
        if self._worker is not None and self._workers_coordinator is not self._coordinator:
            worker, self._worker = self._worker, None
            ray.kill(worker)
            raise RuntimeError("its coordinator has ended for good; another worker is started for the new one")
        if self._worker is None:
            self._workers_coordinator = self._coordinator
            self._worker = await asyncio.to_thread(self._start_worker, self._workers_coordinator)
            self._starts += 1
        try:
            self._said_by_worker = await asyncio.wait_for(self._worker.report.remote(), _START_S)
        except (RayError, TimeoutError) as error:
            self._said_by_worker = {"alive": False}
            logger.error("tlt: the spot worker of replica %d does not answer: %s", self._replica, error)
        if not self._said_by_worker["alive"]:
            worker, self._worker = self._worker, None
            ray.kill(worker)
            raise RuntimeError("its worker has ended; another one is started")

    async def _share(self) -> None:
        """Say that this server lives, and let the engine write the policy's tensors when the worker asks for them."""
        self.board.beat_ns = now_ns()
        wanted = self.board.share_wanted
        if wanted != self.board.share_given:
            is_whole = self.board.phase == Phase.GENERATE  # while weights come in, they are of two versions
            self.board.share_version = await self._shared() if is_whole else -1
            self.board.share_given = wanted
        await asyncio.sleep(between_looks(self.board, _LOOK_S))

    async def _shared(self) -> int:
        """The policy's version that the engine writes. The wait has a bound; the call is not cancelled: the engine's
        answer to it would be taken for that to the next one.

        Raises:
            TimeoutError: no answer in time. The next call waits for the same one.
        """
        if self._sharing is None:
            self._sharing = asyncio.ensure_future(self._share_policy())
        done, _ = await asyncio.wait({self._sharing}, timeout=_ANSWER_S)
        if not done:
            raise TimeoutError(f"the engine did not answer in {_ANSWER_S:g} s")
        asked, self._sharing = self._sharing, None
        return asked.result()


def actor_options(node_id: str, env: dict[str, str]) -> dict[str, Any]:
    """Ray's options of a spot worker's actor: on this node, without a claim on resources, never restarted by Ray."""
    strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    return {
        "scheduling_strategy": strategy,
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": 0,
        "max_concurrency": 4,
        "runtime_env": {"env_vars": env},
    }


def spot_host(server: Any, options: TLTConfig, drafters: Path, start: Path, board: Board) -> SpotHost:
    """Spot training at the replica of this server.

    Args:
        server: the `TLTHttpServer`, in whose actor this runs.
        drafters: the replica's folder of publications.
        start: the drafter's folder that the engine begins with.
    """
    checkpoint = load_checkpoint(start)
    service = _service_options(server, options, board, drafters, checkpoint.config)

    def find_coordinator() -> Any:
        return create(coordinator_name(), folder=drafters / "coordinator", start=start)

    def start_worker(coordinator: Any) -> Any:
        node = ray.get_runtime_context().get_node_id()
        env = {name: os.environ[name] for name in _KEPT if name in os.environ}
        actor = ray.remote(SpotService).options(**actor_options(node, env))
        return actor.remote(service, checkpoint.weights, coordinator)

    return SpotHost(
        *(server.replica_rank, board, start_worker, find_coordinator),
        *(server.receive_drafter, server.share_policy, server.config.free_cache_engine),
    )


def job_prefix() -> str:
    """What the names of this job's rings and boards begin with: no two jobs on a node share it."""
    return f"{_job()}-"


def coordinator_name() -> str:
    """Of this job's coordinator among Ray's actors."""
    return f"tlt-spot-{_job()}"


def _job() -> str:
    context = ray.get_runtime_context()
    return hashlib.sha256(f"{context.gcs_address} {context.get_job_id()}".encode()).hexdigest()[:8]


def _service_options(
    server: Any, options: TLTConfig, board: Board, drafters: Path, config: dict[str, Any]
) -> ServiceOptions:
    spot, gate, on_cpu = options.spot, options.gate, get_platform().device_name == "cpu"
    learner = LearnerSettings(
        step_s=spot.yield_ms / 1e3,
        most_rows=spot.micro_batch_tokens,
        lr=spot.lr,
        buffer_bytes=round(spot.buffer_gb * 2**30),
        held_out=gate.held_out,
        gate_tokens=gate.tokens,
        hot_size=options.drafter.hot_vocab,
        always_hot=tuple(_ends(server.model_config)),
        num_steps=max(strategy.num_steps for strategy in options.strategy.parsed() if strategy.drafter == "eagle"),
        least=gate.least,
        seed=server.replica_rank,
    )
    return ServiceOptions(
        replica=server.replica_rank,
        board=str(board.path),
        policy=str(drafters),
        ranks=server.config.tensor_model_parallel_size,
        rings=job_prefix(),
        device=get_platform().device_name,
        server=os.getpid(),
        visible=None if on_cpu else os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0],
        cores=_cores_of_a_replica(),
        least_free_bytes=_LEAST_FREE_BYTES,
        idle_s=spot.idle_ms / 1e3,
        config=config,
        learner=learner,
        worker=WorkerSettings(gate_every_s=gate.every_s, dtype=server.config.dtype),
    )


def _ends(model_config: Any) -> set[int]:
    """The tokens that end a response, whatever is frequent."""
    ends = {model_config.tokenizer.eos_token_id}
    for config in (model_config.hf_config, model_config.generation_config):
        found = getattr(config, "eos_token_id", None)
        ends |= set(found) if isinstance(found, list | tuple) else {found}
    return ends - {None}


def _cores_of_a_replica() -> int:
    """Cores of this host that one replica owns: as many as an engine computes with, or its share of the host's."""
    allowed = len(os.sched_getaffinity(0))
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(allowed, int(told)) if told.isdigit() and int(told) > 0 else max(1, allowed // 2)
