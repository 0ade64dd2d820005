"""One page of shared memory a replica: what the server, the engine and the spot worker say of themselves right now.

Knows the page's fields and who writes each; nothing of what follows from them. Every field has one writer, and is eight
aligned bytes, so a reader sees the old value or the new one. Nobody waits and nobody is asked: a spot worker looks at
the page between two micro-steps, and a request that has just arrived is already there. Times are CLOCK_MONOTONIC, which
all processes of a node share and nobody sets back.
"""

from __future__ import annotations

import mmap
import os
import time
from enum import IntEnum
from pathlib import Path

SHM = Path("/dev/shm")
_MAGIC = 0x544C545F424F4144  # "TLT_BOAD"


class Phase(IntEnum):
    """What verl is doing on the replica's device.

    STARTING: nothing yet. GENERATE: the rollout has the device, whether or not it has requests. SYNC: weights come in.
    POLICY: the colocated policy has the device, or the engine sleeps. STOPPED: the replica has ended.
    """

    STARTING = 0
    GENERATE = 1
    SYNC = 2
    POLICY = 3
    STOPPED = 4


class SpotState(IntEnum):
    """What the spot worker is doing."""

    STARTING = 0
    BUSY = 1  # the device is not its
    IDLE = 2  # the device is idle, and the worker gets ready
    TRAINING = 3
    YIELDING = 4


# Who writes a field: the server's actor, the engine's scheduler (rank 0), or the spot worker.
SERVER_FIELDS = (
    *("requests", "phase", "step", "beat_ns", "needed_ns", "allowed", "idle_ns"),
    *("share_given", "share_version"),
)
ENGINE_FIELDS = ("engine_busy", "policy_version")
WORKER_FIELDS = (
    "state",
    "worker_beat_ns",
    "trained_ns",
    "trained_tokens",
    "trained_steps",
    "windows",
    "yields",
    "yield_ns_max",
    "yield_ns_last",
    "master_version",
    "failures",
    "loss_micro",
    "ce_micro",
    "accept_micro",
    "gate_published",
    "gate_rejected",
    "gate_accept_micro",
    "judged_ns",
    "share_wanted",
)
_FIELDS = ("magic", *SERVER_FIELDS, *ENGINE_FIELDS, *WORKER_FIELDS)
_PLACES = {name: place for place, name in enumerate(_FIELDS)}


class Board:
    """The page of one replica, read and written as attributes.

        requests        at the replica's front: running and queued
        phase           of `Phase`
        step            the trainer's global step, -1 where the replica was not told
        beat_ns         when the server last said that it lives
        needed_ns       when the device was last asked for: the first request, or another phase
        allowed         1 while the coordinator answers
        idle_ns         time in which the replica had its device and no request
        share_given     the last `share_wanted` for which the engine was asked to write the policy's tensors
        share_version   of the policy whose tensors it writes; set before `share_given`
        engine_busy     1 from a batch's result until the scheduler finds nothing to do
        policy_version  of the weights that the engine computes with
        state           of `SpotState`; the rest are the worker's counters since its start, floats in millionths
        share_wanted    a counter too: how often the worker has asked for the policy's tensors

    Args:
        path: of the file, which `create` has made.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no board.
    """

    path: Path
    _words: memoryview

    def __init__(self, path: Path) -> None:
        object.__setattr__(self, "path", path)
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size != mmap.PAGESIZE:
                raise ValueError(f"{path} is no board: it has not the size of a page")
            page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        words = memoryview(page).cast("q")
        if words[0] != _MAGIC:
            raise ValueError(f"{path} is no board")
        object.__setattr__(self, "_words", words)

    @classmethod
    def create(cls, name: str, folder: Path = SHM) -> Board:
        """A new page, `folder/tlt-<name>.board`, mode 0600; one of a dead process is replaced.

        Raises:
            OSError: no room for a page, or no such folder.
        """
        path = folder / f"tlt-{name}.board"
        unnamed = path.with_suffix(".board.new")
        fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(fd, 0, mmap.PAGESIZE)
            os.pwrite(fd, _MAGIC.to_bytes(8, "little"), 0)
            unnamed.rename(path)
        except OSError:
            unnamed.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return cls(path)

    def __getattr__(self, name: str) -> int:
        try:
            return self._words[_PLACES[name]]
        except KeyError:
            raise AttributeError(f"a board has no field {name}; its fields are {', '.join(_FIELDS[1:])}") from None

    def __setattr__(self, name: str, value: int) -> None:
        if name not in _PLACES or name == "magic":
            raise AttributeError(f"a board has no field {name}; its fields are {', '.join(_FIELDS[1:])}")
        self._words[_PLACES[name]] = value

    def values(self, fields: tuple[str, ...]) -> dict[str, int]:
        """Some fields, each as it is at the moment it is read."""
        return {name: self._words[_PLACES[name]] for name in fields}


def now_ns() -> int:
    """The board's clock."""
    return time.monotonic_ns()
