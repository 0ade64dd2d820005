"""The process of a spot worker: a Ray actor that builds the worker and runs its loop in a thread.

Beside the replica's server on the same node, with the replica's device, at the lowest priority that the host has: where
cores are shared, the kernel gives it only what nobody else wants.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlt_verl.board import Board, Phase, SpotState
from tlt_verl.spot.idle import EngineProbe, IdleDetector, PhaseProbe, device_probe
from tlt_verl.spot.learner import LearnerSettings, SpotLearner
from tlt_verl.spot.process import started, yield_to_all
from tlt_verl.spot.ray_links import RayLinks
from tlt_verl.spot.rings import Rings
from tlt_verl.spot.worker import SpotWorker, WorkerSettings

logger = logging.getLogger(__name__)

EVENT = "tlt-event"

_STATE_BYTES = 16  # of a parameter: itself, its two moments, and the one that serves


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What a spot worker is started with.

    Args:
        replica: its number.
        board: the replica's board.
        policy: folder into which the engine writes the policy's tensors, one file for each of its `ranks`.
        rings: what the names of the job's rings begin with.
        device: where it trains, in torch's spelling.
        server: process of the replica's server, whose children are the engine's.
        visible: one entry of CUDA_VISIBLE_DEVICES, None on the CPU.
        cores: of the host that the replica owns; the worker computes with as many threads.
        least_free_bytes: device memory that training takes.
        idle_s: see `IdleDetector`.
        config: the drafter's `config.json`.
        learner, worker: settings.
    """

    replica: int
    board: str
    policy: str
    ranks: int
    rings: str
    device: str
    server: int
    visible: str | None
    cores: int
    least_free_bytes: int
    idle_s: float
    config: Mapping[str, Any]
    learner: LearnerSettings
    worker: WorkerSettings


def say_event(lane: str, state: str, step: int | None) -> None:
    """Print the line of the run's log from which `tlt_verl.report.timeline` draws."""
    said = {"t": round(time.monotonic(), 6), "lane": lane, "state": state, "step": step}
    print(f"{EVENT} {json.dumps(said)}", flush=True)


def say(replica: int, state: str, board: Board) -> None:
    """Print what a replica does from now on."""
    say_event(f"replica {replica}", state, board.step if board.step >= 0 else None)


def replica_state(board: Board) -> str:
    """What a replica does, in the timeline's words, as its board says it."""
    phase = Phase(board.phase)
    if phase is Phase.GENERATE:
        return "generating" if board.requests else "idle"
    return {Phase.STARTING: "starting", Phase.SYNC: "sync"}.get(phase, "policy")


class SpotService:
    """The actor around one `SpotWorker`.

    Args:
        options: of the worker.
        weights: of the drafter to begin with.
        coordinator: the job's.
    """

    def __init__(self, options: ServiceOptions, weights: Mapping[str, torch.Tensor], coordinator: Any) -> None:
        logging.basicConfig(level=logging.INFO)
        yield_to_all()
        torch.set_num_threads(options.cores)
        self._options, self._board = options, Board(Path(options.board))
        own_pids = {os.getpid()}
        probes = (
            PhaseProbe(self._board),
            EngineProbe(self._board),
            device_probe(
                options.visible,
                cores=options.cores,
                least_free_bytes=options.least_free_bytes,
                own_pids=lambda: own_pids,
                engine=options.server,
            ),
        )
        self._detector = IdleDetector(probes, options.idle_s)
        self._worker = SpotWorker(
            self._board,
            self._detector,
            SpotLearner(options.config, weights, options.learner, options.device),
            Rings(options.rings),
            RayLinks(
                *(options.replica, self._board, coordinator),
                *(Path(options.policy), options.ranks, int(options.config["vocab_size"])),
                _STATE_BYTES * sum(tensor.numel() for tensor in weights.values()),
            ),
            options.worker,
            self._say,
        )
        self._thread = threading.Thread(target=self._run, name="tlt-spot", daemon=True)
        self._thread.start()
        print(started(f"spot worker of replica {options.replica}"), flush=True)

    def report(self) -> dict[str, Any]:
        """Whether the loop runs, and counts by cause: readings that were not idle, ends of training, failures."""
        return {
            "alive": self._thread.is_alive(),
            "not_idle": dict(self._detector.causes),
            "stops": dict(self._detector.stops),
            "failures": dict(self._worker.failures),
        }

    def _run(self) -> None:
        try:
            self._worker.run(lambda: False)  # it ends with its process
        except Exception:
            logger.exception("tlt: the spot worker of replica %d has ended", self._options.replica)

    def _say(self, state: SpotState) -> None:
        """Print what the replica does now: training and yielding are this process's to say."""
        name = {SpotState.TRAINING: "training", SpotState.YIELDING: "yielding", SpotState.BUSY: ""}.get(state)
        if name is not None:
            say(self._options.replica, name or replica_state(self._board), self._board)
