"""The coordinator's checkpoints on the disk, and the numbers that it told since the last one."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tlt_verl.drafter.checkpoint import Checkpoint, CheckpointWriter, latest, load_checkpoint
from tlt_verl.drafter.versions import newest_version
from tlt_verl.spot.coordination import Saved

_DISK_S = 300.0  # after which a disk that has not taken a checkpoint has failed
_REST = 20  # times what a checkpoint took, until the next one: writing them takes a twentieth of a core
_MOST_REST_S = 60.0


class Rest:
    """How long the next checkpoint waits, counted from the end of the last one.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._until = clock, -float("inf")

    def seconds(self) -> float:
        """What is left of it; 0 where the last checkpoint is long past."""
        return max(0.0, self._until - self._clock())

    @contextlib.contextmanager
    def after(self) -> Iterator[None]:
        """Around the writing of one."""
        begun = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            self._until = ended + min(_REST * (ended - begun), _MOST_REST_S)


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


def write_once(folder: Path, saved: Saved) -> None:
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
