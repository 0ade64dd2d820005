"""The spot coordinator: one Ray actor a job around the master of the drafter, its publications and its checkpoints.

Knows Ray, the replicas' server actors, files and time; what a merge is stands in `coordination`. It is on the way of no
rollout. When its process is killed, Ray starts it again and it goes on from the last checkpoint of this job; workers
and servers outlive that, see `Coordination.recover`. Servers have to register again: the answers to `submit` and
`publish` say when.

State crosses Ray as dicts of torch tensors on the CPU. Whatever takes long runs in a thread, so that calls are answered
while a disk is slow or a server hangs; every such wait has a bound. A full or read-only disk costs checkpoints only.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from tlt_verl.drafter import DrafterError, is_untrained
from tlt_verl.drafter.checkpoint import Checkpoint, CheckpointWriter, latest, load_checkpoint, weights_problem
from tlt_verl.drafter.eagle import tensor_shapes
from tlt_verl.drafter.versions import newest_version
from tlt_verl.spot.coordination import Coordination, Saved, SubmissionRefused

logger = logging.getLogger(__name__)

Weights = Mapping[str, torch.Tensor]

_DISK_S, _TELL_S = 300.0, 5.0  # after which a disk that has not taken a checkpoint, or a few numbers, has failed


def create(
    name: str, *, folder: str | Path, start: str | Path, namespace: str | None = None, answer_s: float = 75.0
) -> Any:
    """The handle of a job's coordinator, which is started if there is none of this name.

    The process that starts it owns it: it ends with that process, so let the one that runs the trainer do it.

    Args:
        name, namespace: of the actor. No namespace is the caller's.
        folder: on this node, for the coordinator's own checkpoints, by which it survives being killed.
        start: the drafter's folder (`load_checkpoint`) that the engines begin with.
        answer_s: that a server may take to receive a drafter.
    """
    actor = ray.remote(SpotCoordinator).options(
        name=name, namespace=namespace, get_if_exists=True, num_cpus=0, max_restarts=-1, max_concurrency=256
    )
    return actor.remote(str(folder), str(start), uuid.uuid4().hex, answer_s)


@dataclass
class _Server:
    """A replica's server actor, and the version of the drafter that was sent to it; 0 for none."""

    handle: Any
    serves: int


@dataclass(frozen=True, eq=False)
class _Publication:
    """A drafter that passed the gate."""

    version: int
    weights: Mapping[str, torch.Tensor]
    hot: torch.Tensor | None
    accept_len: float | None


class SpotCoordinator:
    """What the actor is made of. Made by `create`.

    Args:
        folder: for its own checkpoints.
        start: the drafter's folder that the engines begin with.
        run: names this job, so that an earlier one's checkpoints in the folder are left alone.
        answer_s: that a server may take to receive a drafter.

    Raises:
        DrafterError: the start is no drafter.
    """

    def __init__(self, folder: str, start: str, run: str, answer_s: float) -> None:
        torch.set_num_threads(1)  # the cores are the rollout's and the policy's
        self._disk = Disk(Path(folder), run)
        self._errors: set[str] = set()
        self._checkpoint_errors = 0
        self._answer_s = answer_s
        self._servers: dict[str, _Server] = {}
        self._waiting: _Publication | None = None  # passed the gate, and no server has taken it yet
        self._state, self._publishing = asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_saving = self._has_changed = False
        self._coordination = self._restored() or Coordination(load_checkpoint(start), serves=not is_untrained(start))
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._coordination.recover(self._disk.told())
            logger.warning("tlt: the spot coordinator is back, at version %d", self._coordination.version)

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
            `version` and `share`, or the kind in `refused` and its `reason`; and whether the replica is `registered`.
        """
        known = {"registered": replica in self._servers}
        async with self._state:
            try:
                merge = await asyncio.to_thread(self._coordination.merge, base, state, tokens, report)
            except SubmissionRefused as refused:
                logger.error("tlt: what replica %s trained was not merged: %s", replica, refused)
                return {"refused": refused.kind, "reason": str(refused), **known}
            await self._tell()
        self._keep_soon()
        return {"version": merge.version, "share": merge.share, **known}

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

    async def register(self, replica: str, server: Any, serves: int = 0) -> None:
        """Send publications to this server from now on, and the present one if it lacks that. Again is allowed.

        Args:
            replica: its name.
            server: handle of an actor with `receive_drafter(version, config, weights, hot)`, which gives None or the
                reason why it did not take the drafter.
            serves: the version that it received last; 0 while it drafts with what its engine began with.
        """
        self._servers[replica] = _Server(server, serves)
        self._in_background(self._catch_up(replica))

    async def publish(
        self, replica: str, weights: Weights, hot: torch.Tensor | None, accept_len: float | None
    ) -> dict[str, Any]:
        """Send a drafter that passed the gate to every server, all at once. One publication at a time.

        A server that does not answer in time, or is dead, gets no more of them until it registers again. A drafter that
        none takes (their engines may be asleep) does not serve yet; it waits for the first server that registers.

        Args:
            replica: whose worker trained it.
            weights: the drafter's tensors, as they are to serve.
            hot: the hot vocabulary, which must be the chosen one; where none was chosen, this one is.
            accept_len: tokens per verification, as the gate measured them.

        Returns:
            `version`, of this drafter; `rejected`, reasons by replica; `serves`, False where no server has taken it.
            Or the kind in `refused` (`shape`, `nan`, `hot`, ...) and its `reason`. And whether the replica is
            `registered`.
        """
        known = {"registered": replica in self._servers}
        async with self._publishing:
            if refused := await self._unfit(weights, hot):
                logger.error("tlt: the drafter of replica %s was not published: %s", replica, refused["reason"])
                return refused | known
            async with self._state:
                version = self._coordination.next_serving()
                await self._tell()
            self._waiting = _Publication(version, weights, hot, accept_len)
            rejected = await self._send(dict(self._servers), self._waiting)
        return {"version": version, "rejected": rejected, "serves": self._waiting is None, **known}

    async def _unfit(self, weights: Weights, hot: torch.Tensor | None) -> dict[str, str] | None:
        if problem := await asyncio.to_thread(weights_problem, weights, self._coordination.config):
            return {"refused": problem.kind, "reason": f"its {problem.text}"}
        try:
            chosen = await self.choose_hot(hot)
        except ValueError as error:
            return {"refused": "hot", "reason": str(error)}
        if chosen is not None and (hot is None or not torch.equal(hot, chosen)):
            return {"refused": "hot", "reason": "its hot vocabulary is not the one that was chosen for all"}
        return None

    async def _catch_up(self, replica: str) -> None:
        """Send what serves to a server that lacks it."""
        async with self._publishing:
            server, master, due = self._servers.get(replica), self._coordination, self._waiting
            if due is None and master.to_send and master.serving is not None:
                due = _Publication(master.serving_version, master.serving, master.hot, master.serving_accept_len)
            if server is None or due is None or server.serves >= due.version:
                return
            for reason in (await self._send({replica: server}, due)).values():
                logger.error("tlt: replica %s did not take drafter %d: %s", replica, due.version, reason)

    async def _send(self, servers: Mapping[str, _Server], drafter: _Publication) -> dict[str, str]:
        """Why each server that does not serve this drafter now does not, by replica. It serves if one does."""
        once = await asyncio.to_thread(ray.put, dict(drafter.weights))
        answers = await asyncio.gather(*(self._ask(replica, drafter, once) for replica in servers))
        rejected = {replica: why for replica, why in zip(servers, answers, strict=True) if why is not None}
        if drafter is self._waiting and len(rejected) < len(servers):
            async with self._state:
                published = self._coordination.published
                await asyncio.to_thread(published, drafter.weights, drafter.version, drafter.accept_len)
            self._waiting = None
            self._keep_soon()
        return rejected

    async def _ask(self, replica: str, drafter: _Publication, weights: Any) -> str | None:
        server = self._servers[replica]
        what = (drafter.version, self._coordination.config, weights, drafter.hot)
        try:
            sent = server.handle.receive_drafter.remote(*what)
            reason = await asyncio.wait_for(sent, self._answer_s)
        except RayTaskError as error:
            return f"it raised {error.cause}"
        except (RayError, asyncio.TimeoutError) as error:
            if self._servers.get(replica) is server:
                del self._servers[replica]
            return f"it is gone: {error}" if isinstance(error, RayError) else f"no answer in {self._answer_s:g} s"
        server.serves = drafter.version if reason is None else server.serves
        return reason

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
            await asyncio.to_thread(_write_once, Path(folder), saved)
        except (OSError, RuntimeError, ValueError) as error:
            self._failed_to_keep(error)
            return f"{type(error).__name__}: {error}"
        return None

    async def load(self, folder: str) -> str | None:
        """Go on from what `save` wrote, before training begins; what served then is sent to the servers.

        Returns:
            None, or why everything stays as it was.
        """
        async with self._publishing, self._state:
            try:
                checkpoint = await asyncio.to_thread(load_checkpoint, latest(folder) or folder)
                restored = Coordination.from_checkpoint(checkpoint)
            except (OSError, DrafterError) as error:
                return str(error)
            if tensor_shapes(restored.config) != tensor_shapes(self._coordination.config):
                return f"{folder} holds a drafter of other sizes than the one that serves"
            restored.continue_numbers(self._coordination.told())
            self._coordination, self._waiting = restored, None
            await self._tell()
        self._keep_soon()
        await asyncio.gather(*(self._catch_up(replica) for replica in list(self._servers)))
        return None

    async def metrics(self) -> dict[str, float]:
        """Counters since the job's start, and the last report, under the names of verl's logger."""
        return self._coordination.metrics() | {"tlt/spot/checkpoint_errors": float(self._checkpoint_errors)}

    async def _tell(self) -> None:
        """Keep the numbers before anybody is told them."""
        try:
            await asyncio.wait_for(asyncio.to_thread(self._disk.tell, self._coordination.told()), _TELL_S)
        except (OSError, asyncio.TimeoutError) as error:
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
                self._has_changed = False
                async with self._state:
                    saved = self._coordination.checkpoint()
                try:
                    await asyncio.to_thread(self._disk.keep, saved)
                except Exception as error:  # of the disk, in any of torch's and safetensors' types: training goes on
                    self._failed_to_keep(error)
        finally:
            self._is_saving = False

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


class Disk:
    """A coordinator's own folder: its checkpoints, and `told.json` with the numbers that were told since the last one.

    It is made when it is first written to. What a job of another name (`run`) left there is not read.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run
        self._writer: CheckpointWriter | None = None
        self._number = -1
        self._telling = threading.Lock()

    def told(self) -> dict[str, int]:
        """What this job's `tell` kept last; empty where there is nothing that can be read."""
        try:
            told = json.loads((self._folder / "told.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return told["numbers"] if told.get("run") == self._run else {}

    def tell(self, numbers: Mapping[str, int]) -> None:
        """Keep numbers. A process that is killed loses nothing; a machine that is switched off may.

        Raises:
            OSError: they are not kept; also where the disk has not taken earlier ones yet.
        """
        if not self._telling.acquire(blocking=False):
            raise BlockingIOError(errno.EAGAIN, f"{self._folder} has not taken the numbers before these yet")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch = self._folder / "told.json.new"
            scratch.write_text(json.dumps({"run": self._run, "numbers": dict(numbers)}), encoding="utf-8")
            scratch.replace(self._folder / "told.json")
        finally:
            self._telling.release()

    def newest(self) -> Checkpoint | None:
        """The last checkpoint of this job."""
        if (found := latest(self._folder)) is None:
            return None
        checkpoint = load_checkpoint(found)
        return checkpoint if checkpoint.info.get("run") == self._run else None

    def keep(self, saved: Saved) -> None:
        """Write a checkpoint; return when it is on the disk, or raise why it is not."""
        if self._writer is None:
            self._writer = CheckpointWriter(self._folder)
        self._number = max(self._number + 1, _next_number(self._folder))
        _save(self._writer, saved, self._number, run=self._run)
        self._writer.wait(_DISK_S)


def _write_once(folder: Path, saved: Saved) -> None:
    """Write a checkpoint that replaces what is in the folder, and leave it to other writers."""
    writer = CheckpointWriter(folder, keep=1)
    try:
        _save(writer, saved, _next_number(folder))
    finally:
        writer.close(_DISK_S)


def _save(writer: CheckpointWriter, saved: Saved, number: int, **more: str) -> None:
    info = {**saved.info, **more}
    writer.save(saved.config, saved.weights, saved.trainer_state, version=number, info=info, hot=saved.hot)


def _next_number(folder: Path) -> int:
    newest = newest_version(folder)
    return 0 if newest is None else newest + 1
