#!/usr/bin/env python
"""Takes the device away from a spot worker at random moments, and looks at how fast it goes and at what it keeps.

    scripts/check_yield.py [--preemptions 200] [--hidden 576] [--vocab 4096] [--yield-ms 50] [--seed 0]
                           [--device cpu|cuda]

The worker is the real one in a process of its own, with its probes, rings, learner and a coordination; what stands in
for the replica is this script, which writes the board as a server does. Prints one JSON object:

    yield_ms        p50, p99, max from the request's arrival to the moment at which the worker has given the device
                    back; of the slowest five also which pre-emption it was
    steps           of the optimizer at the end, and the micro-steps that were counted: equal, if none was lost
    loss            first and last mean of 32 steps, and the largest jump across a pre-emption
    rss_mb          of the worker while the device is another's, after each tenth of the pre-emptions
    device_mb       the same of a GPU's memory, by NVML; what is left is CUDA's own context
    training_mb     the most that NVML saw of it while the worker trained
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from tlt_verl.board import Board, Phase, SpotState, now_ns
from tlt_verl.drafter.checkpoint import Checkpoint
from tlt_verl.drafter.eagle import drafter_config
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.segments import Segment, SegmentWriter
from tlt_verl.spot.coordination import Coordination
from tlt_verl.spot.idle import EngineProbe, IdleDetector, PhaseProbe
from tlt_verl.spot.learner import LearnerSettings, SpotLearner
from tlt_verl.spot.links import Master, Policy, Published
from tlt_verl.spot.nvml import Device
from tlt_verl.spot.rings import Rings
from tlt_verl.spot.worker import SpotWorker, WorkerSettings

IDLE_S = 0.02
STATE_TOKENS = 24
HEAD_SCALE = 0.04


class LocalLinks:
    """Links to a coordination in the same process: what is measured is the worker, not Ray."""

    def __init__(self, coordination: Coordination, policy: Policy) -> None:
        self.coordination, self._policy = coordination, policy

    def policy(self) -> Policy:
        """See `Links`, as all of these."""
        return self._policy

    def fetch(self, version: int, serving_version: int) -> Master:
        """The master."""
        answer = self.coordination.fetch(version, serving_version)
        names = ("version", "state", "hot", "serving_version", "serving")
        return Master(**{name: answer.get(name) for name in names})

    def choose_hot(self, hot: torch.Tensor) -> torch.Tensor:
        """The hot vocabulary."""
        return self.coordination.choose_hot(hot)

    def submit(self, base: int, state: Any, tokens: int, report: Any) -> int:
        """Merge a copy."""
        return self.coordination.merge(base, copy.deepcopy(state), tokens, report).version

    def publish(self, weights: Any, hot: Any, accept_len: float) -> Published:
        """Nobody serves here."""
        version = self.coordination.next_serving()
        self.coordination.published(weights, version, accept_len)
        return Published(version, {})


def sizes(hidden: int) -> dict[str, Any]:
    """Of a Llama with this hidden size, as SmolLM2's are in proportion: heads of 64, four at least."""
    heads = max(hidden // 64, 4)
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads // 2,
        "rms_norm_eps": 1e-5,
    }


def policy_of(hidden: int, vocab: int) -> Policy:
    """Embedding and head, tied, in the scale of a trained model's: features of unit variance give 20 nats or so."""
    embed = (HEAD_SCALE * torch.randn(vocab, hidden, generator=torch.Generator().manual_seed(0))).bfloat16()
    return Policy(0, embed, embed)


def segments(hidden: int, vocab: int, count: int) -> list[Segment]:
    """Responses of a made-up language: the next token follows from the last two, and the feature says which it is."""
    generator, made = torch.Generator().manual_seed(1), []
    embed = policy_of(hidden, vocab).embed
    for number in range(count):
        tokens = torch.randint(0, STATE_TOKENS, (2,), generator=generator).tolist()
        for _ in range(int(torch.randint(40, 200, (1,), generator=generator))):
            tokens.append((3 * tokens[-1] + tokens[-2] + 1) % STATE_TOKENS)
        T, ids = len(tokens) - 1, torch.tensor(tokens, dtype=torch.int32)
        hidden_states = (embed[ids[1:].long()].float() / HEAD_SCALE).bfloat16()
        logprobs = torch.zeros(T, dtype=torch.float16)
        made.append(Segment(0, f"r{number}", number, 0, 2, True, ids[:-1].clone(), hidden_states, logprobs))
    return made


def work(board_path: Path, rings: str, options: argparse.Namespace, out: Any) -> None:
    """The spot worker's process."""
    hidden, vocab, yield_ms = options.hidden, options.vocab, options.yield_ms
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = drafter_config({**sizes(hidden), "vocab_size": vocab})
    weights = EagleDrafter(config).state_dict()
    start = Checkpoint(Path("start"), config, weights, None, None, 0)
    board = Board(board_path)
    links = LocalLinks(Coordination(start, serves=False), policy_of(hidden, vocab))
    worker = SpotWorker(
        board,
        IdleDetector((PhaseProbe(board), EngineProbe(board)), IDLE_S),
        SpotLearner(
            config, weights, LearnerSettings(step_s=yield_ms / 1e3, num_steps=3, always_hot=(0,)), options.device
        ),
        Rings(rings),
        links,
        WorkerSettings(gate_every_s=1.0, dtype="bfloat16"),
    )
    losses: list[tuple[int, float]] = []  # window, loss
    micro_step = worker.learner.micro_step

    def noted() -> Any:
        report = micro_step()
        if report is not None:
            losses.append((board.windows, report.loss))
        return report

    worker.learner.micro_step = noted  # type: ignore[method-assign]
    worker.run(lambda: False)
    state = links.coordination.fetch(-1, 0)["state"]
    out.send({"steps": state["steps"], "losses": losses, "failures": dict(worker.failures)})


class Memory:
    """What a process holds, MB; of a GPU's memory, by NVML, where it trains on one."""

    def __init__(self, pid: int, device: str) -> None:
        self._process = psutil.Process(pid)
        self._device = Device("0") if device == "cuda" else None
        self.resident: list[float] = []
        self.on_device: list[float] = []
        self.training = 0.0

    def note_busy(self) -> None:
        """The device is another's."""
        self.resident.append(self._process.memory_info().rss / 2**20)
        if self._device is not None:
            self.on_device.append(self._held())

    def note_training(self) -> None:
        """The worker trains."""
        if self._device is not None:
            self.training = max(self.training, self._held())

    def report(self) -> dict[str, Any]:
        """For the JSON object."""
        found: dict[str, Any] = {"rss_mb": _tenths(self.resident)}
        return found | ({"device_mb": _tenths(self.on_device), "training_mb": self.training} if self._device else {})

    def _held(self) -> float:
        assert self._device is not None
        return ((self._device.sample().processes or {}).get(self._process.pid) or 0) / 2**20


def _tenths(values: list[float]) -> list[int]:
    return [round(values[len(values) * tenth // 10 - 1]) for tenth in range(1, 11)]


def preempt(board: Board, memory: Memory, count: int, seed: int) -> tuple[list[float], int]:
    """Let requests come at random moments; yield times in ms, and how often the worker was between two windows."""
    moments, times, missed = random.Random(seed), [], 0
    started_by = time.monotonic() + 120
    while board.state == SpotState.STARTING and time.monotonic() < started_by:
        board.beat_ns = now_ns()
        time.sleep(0.05)
    while len(times) < count:
        deadline = time.monotonic() + 20
        while board.state != SpotState.TRAINING and time.monotonic() < deadline:
            board.beat_ns = now_ns()
            time.sleep(0.001)
        memory.note_training()
        time.sleep(moments.uniform(0, 0.3))
        board.beat_ns = now_ns()
        before = board.yields
        board.needed_ns = now_ns()
        board.requests = 1
        while board.state != SpotState.BUSY and time.monotonic() < deadline:
            time.sleep(0.0005)
        if board.state != SpotState.BUSY:
            raise SystemExit("check_yield: the worker did not yield in 20 s")
        if board.yields > before:
            times.append(board.yield_ns_last / 1e6)
        else:
            missed += 1  # it was between two windows
        time.sleep(0.01)
        memory.note_busy()
        board.requests = 0
    return times, missed


def jumps(losses: list[tuple[int, float]]) -> float:
    """Largest change of the mean loss from the last eight steps before a pre-emption to the first eight behind it."""
    windows: dict[int, list[float]] = {}
    for window, loss in losses:
        windows.setdefault(window, []).append(loss)
    whole = [steps for _, steps in sorted(windows.items()) if len(steps) >= 8]
    pairs = itertools.pairwise(whole)
    return max((statistics.mean(b[:8]) - statistics.mean(a[-8:]) for a, b in pairs), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preemptions", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--yield-ms", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        board = Board.create("yield", Path(folder))
        board.phase, board.allowed, board.beat_ns = Phase.GENERATE, 1, now_ns()
        name = f"yield-{Path(folder).name}"
        made = segments(options.hidden, options.vocab, 120)
        writer = SegmentWriter(name, hidden_width=options.hidden, slots=len(made), slot_tokens=256)
        for segment in made:
            writer.write(segment)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        arguments = (board.path, name, options, theirs)
        process = context.Process(target=work, args=arguments)
        process.start()
        try:
            memory = Memory(process.pid, options.device)
            times, missed = preempt(board, memory, options.preemptions, options.seed)
            board.phase = Phase.STOPPED
            if not ours.poll(60):
                raise SystemExit("check_yield: the worker did not end in 60 s")
            said = ours.recv()
        finally:
            process.kill()
            writer.close()
        ordered, losses = sorted(times), [loss for _, loss in said["losses"]]
        report = {
            "preemptions": len(times),
            "between_windows": missed,
            "yield_ms": {
                "p50": statistics.median(ordered),
                "p99": ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))],
                "max": ordered[-1],
                "slowest": sorted(((round(ms, 1), place) for place, ms in enumerate(times)), reverse=True)[:5],
            },
            "steps": {"optimizer": said["steps"], "counted": board.trained_steps},
            "loss": {
                "first": statistics.mean(losses[:32]),
                "last": statistics.mean(losses[-32:]),
                "largest_jump": jumps(said["losses"]),
            },
            **memory.report(),
            "gate": {"published": board.gate_published, "rejected": board.gate_rejected},
            "failures": said["failures"],
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
