"""The spot coordinator: one Ray actor a job around the master of the drafter, its publications and its checkpoints.

Knows Ray, files and time; what a merge is stands in `coordination`. It is on the way of no rollout, and calls nobody:
the replicas' servers ask it, twice a second, and are told of a drafter that they lack (`Subscriber` is their side). So
it holds no server's handle, with which Ray would import verl and SGLang here. When its process is killed, Ray starts it
again and it goes on from the last checkpoint of this job; workers and servers outlive that, see
`Coordination.recover`, and it knows them again when they ask.

State crosses Ray as dicts of torch tensors on the CPU. Whatever takes long runs in a thread, so that calls are answered
while a disk is slow, and at the lowest priority, because workers hand in when the policy begins; every such wait has a
bound. A full or read-only disk costs checkpoints only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from tlt_verl.drafter import DrafterError, is_untrained
from tlt_verl.drafter.checkpoint import latest, load_checkpoint, weights_problem
from tlt_verl.drafter.eagle import tensor_shapes
from tlt_verl.spot.coordination import Coordination, SubmissionRefused
from tlt_verl.spot.disk import Disk, Rest, write_once
from tlt_verl.spot.process import started, yield_to_all

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Weights = Mapping[str, torch.Tensor]

_TELL_S = 5.0  # after which a disk that has not taken a few numbers has failed
_SILENT_S = 10.0  # after which a server that asks no more is forgotten
_POLL_S = 0.02
_THREADS = 8  # some may hang on a slow disk


def create(
    name: str, *, folder: str | Path, start: str | Path, namespace: str | None = None, answer_s: float = 75.0
) -> Any:
    """The handle of a job's coordinator, which is started if there is none of this name.

    The process that starts it owns it: it ends with that process: the first server that looks for it.

    Args:
        name, namespace: of the actor. No namespace is the caller's.
        folder: on this node, for the coordinator's own checkpoints, by which it survives being killed.
        start: the drafter's folder (`load_checkpoint`) that the engines begin with.
        answer_s: that a publication waits for the servers to receive a drafter.
    """
    actor = ray.remote(SpotCoordinator).options(
        name=name, namespace=namespace, get_if_exists=True, num_cpus=0, max_restarts=-1, max_concurrency=256
    )
    return actor.remote(str(folder), str(start), name, answer_s)


@dataclass(frozen=True)
class _Server:
    """What a replica's server said last. See `SpotCoordinator.beat`."""

    serves: int
    awake: bool
    refused: tuple[int, str]
    heard_s: float = field(default_factory=time.monotonic)

    def owes(self, version: int) -> bool:
        """Whether it has neither taken nor refused this version."""
        return max(self.serves, self.refused[0]) < version

    def problem(self, version: int) -> str | None:
        """Why it does not serve this version, or a newer one; None if it does."""
        if self.serves >= version:
            return None
        return self.refused[1] if self.refused[0] >= version else "its engine is asleep"


@dataclass(eq=False)
class _Publication:
    """A drafter for the servers. `stored` is a reference to its weights and `hot`, while a server lacks it."""

    version: int
    weights: Weights
    hot: torch.Tensor | None
    accept_len: float | None
    serves: bool = False
    stored: Any = None


class SpotCoordinator:
    """What the actor is made of. Made by `create`.

    Args:
        folder: for its own checkpoints.
        start: the drafter's folder that the engines begin with.
        run: names this job, so that an earlier one's checkpoints in the folder are left alone.
        answer_s: that a publication waits for the servers to receive a drafter.

    Raises:
        DrafterError: the start is no drafter.
    """

    def __init__(self, folder: str, start: str, run: str, answer_s: float) -> None:
        torch.set_num_threads(1)  # the cores are the rollout's and the policy's
        self._disk = Disk(Path(folder), run)
        self._errors: set[str] = set()
        self._checkpoint_errors = 0
        self._answer_s = answer_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tlt-coordinator", initializer=yield_to_all)
        self._servers: dict[str, _Server] = {}
        self._owing: dict[str, int] = {}  # versions for which a publication has waited in vain
        self._state, self._publishing, self._storing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_saving = self._has_changed = False
        self._rest = Rest()
        self._coordination = self._restored() or Coordination(load_checkpoint(start), serves=not is_untrained(start))
        told = self._disk.told()
        if told or ray.get_runtime_context().was_current_actor_reconstructed:
            self._coordination.recover(told)
            logger.warning("tlt: the spot coordinator is back, at version %d", self._coordination.version)
        self._newest = self._serving()
        print(started("spot coordinator"), flush=True)

    def _restored(self) -> Coordination | None:
        try:
            checkpoint = self._disk.newest()
            return None if checkpoint is None else Coordination.from_checkpoint(checkpoint)
        except (OSError, DrafterError) as error:
            self._failed_to_keep(error)
            return None

    async def fetch(self, version: int = -1, serving_version: int = 0) -> dict[str, Any]:
        """`Coordination.fetch`: what a window of training begins with."""
        async with self._state:
            return self._coordination.fetch(version, serving_version)

    async def submit(
        self, replica: str, base: int, state: Mapping[str, Any], tokens: int, report: Mapping[str, float]
    ) -> dict[str, Any]:
        """Merge a trained copy into the master (`Coordination.merge`).

        Args:
            replica: that it was trained on.

        Returns:
            `version` and `share`, or the kind in `refused` and its `reason`.
        """
        async with self._state:
            try:
                merge = await self._in_thread(self._coordination.merge, base, state, tokens, report)
            except SubmissionRefused as refused:
                logger.error("tlt: what replica %s trained was not merged: %s", replica, refused)
                return {"refused": refused.kind, "reason": str(refused)}
            await self._tell()
        self._keep_soon()
        return {"version": merge.version, "share": merge.share}

    async def choose_hot(self, hot: torch.Tensor | None) -> torch.Tensor | None:
        """`Coordination.choose_hot`: int64 [Vh], the first that was proposed; None while there is none.

        Raises:
            ValueError: the proposal is no hot vocabulary.
        """
        async with self._state:
            chosen = self._coordination.choose_hot(hot)
        if hot is not None:
            self._keep_soon()
        return chosen

    async def beat(
        self, replica: str, serves: int, awake: bool = True, refused: tuple[int, str] = (0, "")
    ) -> dict[str, Any]:
        """A replica's server says how it is, and is told what it lacks. Who no longer asks is forgotten.

        Args:
            replica: its name.
            serves: the version of the drafter that it received last; 0 while it drafts with what its engine began with.
            awake: whether its engine can take a drafter now.
            refused: the newest version that it did not take, and why. It is offered newer ones only.

        Returns:
            `metrics`; and in `due` None, or the `version`, `config` and `drafter` that it is to receive, the last a
            reference to the weights and the hot vocabulary.
        """
        server = self._servers[replica] = _Server(serves, awake, refused)
        if not server.owes(self._owing.get(replica, 0)):
            self._owing.pop(replica, None)
        newest, due = self._newest, None
        if newest is not None and server.owes(newest.version):
            due = await self._offer(newest) if awake else None
        elif newest is not None:
            if serves == newest.version and not newest.serves:
                self._in_background(self._now_serves(newest))
            if not any(other.owes(newest.version) for other in self._heard().values()):
                newest.stored = None
        return {"metrics": await self.metrics(), "due": due}

    async def _offer(self, drafter: _Publication) -> dict[str, Any]:
        async with self._storing:
            if drafter.stored is None:
                drafter.stored = await self._in_thread(ray.put, (dict(drafter.weights), drafter.hot))
            return {"version": drafter.version, "config": self._coordination.config, "drafter": drafter.stored}

    async def publish(
        self, replica: str, weights: Weights, hot: torch.Tensor | None, accept_len: float | None
    ) -> dict[str, Any]:
        """Offer a drafter that passed the gate to every server, all at once. One publication at a time.

        It waits until all that are known have answered, or are forgotten; once for a server that does not answer in
        time. A drafter that none takes (their engines may be asleep) does not serve yet; the first server that can
        takes it.

        Args:
            replica: whose worker trained it.
            weights: the drafter's tensors, as they are to serve.
            hot: the hot vocabulary, which must be the chosen one; where none was chosen, this one is.
            accept_len: tokens per verification, as the gate measured them.

        Returns:
            `version`, of this drafter; `rejected`, reasons by replica; `serves`, False where no server has taken it.
            Or the kind in `refused` (`shape`, `nan`, `hot`, ...) and its `reason`.
        """
        async with self._publishing:
            if refused := await self._unfit(weights, hot):
                logger.error("tlt: the drafter of replica %s was not published: %s", replica, refused["reason"])
                return dict(refused)
            async with self._state:
                # perhaps of a predecessor whose numbers were not kept
                seen = max((max(s.serves, s.refused[0]) for s in self._servers.values()), default=0)
                version = self._coordination.next_serving(seen)
                await self._tell()
            drafter = _Publication(version, weights, hot, accept_len)
            await self._offer(drafter)  # what cannot be stored is the publisher's error
            self._newest = drafter
            rejected = await self._answers(drafter)
        return {"version": version, "rejected": rejected, "serves": drafter.serves}

    async def _unfit(self, weights: Weights, hot: torch.Tensor | None) -> dict[str, str] | None:
        if problem := await self._in_thread(weights_problem, weights, self._coordination.config):
            return {"refused": problem.kind, "reason": f"its {problem.text}"}
        try:
            chosen = await self.choose_hot(hot)
        except ValueError as error:
            return {"refused": "hot", "reason": str(error)}
        if chosen is not None and (hot is None or not torch.equal(hot, chosen)):
            return {"refused": "hot", "reason": "its hot vocabulary is not the one that was chosen for all"}
        return None

    async def _answers(self, drafter: _Publication) -> dict[str, str]:
        """Wait for the servers; why each that does not serve this drafter now does not, by replica."""
        version, end = drafter.version, time.monotonic() + self._answer_s
        asked = self._heard()
        while (late := self._late(asked, version)) and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        self._owing |= dict.fromkeys(late, version)
        heard = self._heard()
        if any(server.serves == version for server in heard.values()):
            await self._now_serves(drafter)
        problems = {replica: heard[replica].problem(version) for replica in asked if replica in heard}
        problems |= dict.fromkeys(asked.keys() - heard.keys(), f"it has not asked for {_SILENT_S:g} s")
        problems |= {replica: f"no answer in {self._answer_s:g} s" for replica in asked if replica in self._owing}
        return {replica: problem for replica, problem in problems.items() if problem is not None}

    def _late(self, asked: Iterable[str], version: int) -> list[str]:
        """Who has not answered, of those for whom no earlier publication has waited in vain."""
        heard = self._heard()
        waited_for = [replica for replica in asked if replica in heard and replica not in self._owing]
        return [replica for replica in waited_for if heard[replica].awake and heard[replica].owes(version)]

    def _heard(self) -> dict[str, _Server]:
        """The servers that ask, without those that no longer do."""
        since = time.monotonic() - _SILENT_S
        self._servers = {replica: server for replica, server in self._servers.items() if server.heard_s > since}
        self._owing = {replica: version for replica, version in self._owing.items() if replica in self._servers}
        return dict(self._servers)

    async def _now_serves(self, drafter: _Publication) -> None:
        """A server has taken this drafter, the first or another one."""
        async with self._state:
            if drafter is not self._newest or drafter.serves:
                return
            published = self._coordination.published
            await self._in_thread(published, drafter.weights, drafter.version, drafter.accept_len)
            drafter.serves = True
        self._keep_soon()

    def _serving(self) -> _Publication | None:
        """What an engine that has just started lacks; None where it lacks nothing."""
        master = self._coordination
        if not master.to_send or master.serving is None:
            return None
        return _Publication(master.serving_version, master.serving, master.hot, master.serving_accept_len, True)

    async def save(self, folder: str) -> str | None:
        """Write a checkpoint that `load` reads, beside one of verl's. Complete or not there, also after a crash.

        Args:
            folder: of the drafter's versions, on this node; made if it is not there.

        Returns:
            None, or why it is not written. That is counted, and no reason to stop.
        """
        async with self._state:
            saved = self._coordination.checkpoint()
        try:
            await self._in_thread(write_once, Path(folder), saved)
        except (OSError, RuntimeError, ValueError) as error:
            self._failed_to_keep(error)
            return f"{type(error).__name__}: {error}"
        return None

    async def load(self, folder: str) -> str | None:
        """Go on from what `save` wrote, before training begins; what served then is sent to the servers.

        Returns:
            None, or why everything stays as it was.
        """
        async with self._publishing:
            async with self._state:
                try:
                    checkpoint = await self._in_thread(load_checkpoint, latest(folder) or folder)
                    restored = Coordination.from_checkpoint(checkpoint)
                except (OSError, DrafterError) as error:
                    return str(error)
                if tensor_shapes(restored.config) != tensor_shapes(self._coordination.config):
                    return f"{folder} holds a drafter of other sizes than the one that serves"
                restored.continue_numbers(self._coordination.told())
                self._coordination = restored
                self._newest = self._serving()
                await self._tell()
            self._keep_soon()
            for replica, why in (await self._answers(self._newest) if self._newest else {}).items():
                logger.error("tlt: replica %s did not take drafter %d: %s", replica, restored.serving_version, why)
        return None

    async def metrics(self) -> dict[str, float]:
        """Counters since the job's start, and the last report, under the names of verl's logger."""
        return self._coordination.metrics() | {"tlt/spot/checkpoint_errors": float(self._checkpoint_errors)}

    async def _tell(self) -> None:
        """Keep the numbers before anybody is told them."""
        try:
            await asyncio.wait_for(self._in_thread(self._disk.tell, self._coordination.told()), _TELL_S)
        except TimeoutError:
            self._failed_to_keep(TimeoutError(f"the disk has not taken the numbers in {_TELL_S:g} s"))
        except OSError as error:
            self._failed_to_keep(error)

    def _keep_soon(self) -> None:
        """Write a checkpoint in the background; changes while one is being written make one more."""
        self._has_changed = True
        if not self._is_saving:
            self._is_saving = True
            self._in_background(self._keep())

    async def _keep(self) -> None:
        try:
            while self._has_changed:
                await asyncio.sleep(self._rest.seconds())
                self._has_changed = False
                async with self._state:
                    saved = self._coordination.checkpoint()
                with self._rest.after():
                    try:
                        await self._in_thread(self._disk.keep, saved)
                    except Exception as error:  # the disk's, in any of torch's and safetensors' types: training goes on
                        self._failed_to_keep(error)
        finally:
            self._is_saving = False

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop alone does not keep it
        task.add_done_callback(self._tasks.discard)

    def _failed_to_keep(self, error: BaseException) -> None:
        self._checkpoint_errors += 1
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)  # without a name that changes
        if text not in self._errors:
            self._errors.add(text)
            logger.error("tlt: no checkpoint of the drafter, training goes on: %s: %s", type(error).__name__, error)
