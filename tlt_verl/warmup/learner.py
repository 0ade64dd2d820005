"""The half of a warm-up that learns: buffer, trainer, replay on held-out samples, checkpoints, and the curve.

Knows nothing of the engine.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tlt_verl.drafter.buffer import Buffer
from tlt_verl.drafter.checkpoint import Checkpoint, CheckpointWriter
from tlt_verl.drafter.eagle import drafter_config
from tlt_verl.drafter.hot import covering_size, hot_vocabulary
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample, fill
from tlt_verl.drafter.replay import replay
from tlt_verl.drafter.tensors import embed_and_head
from tlt_verl.drafter.trainer import DrafterTrainer, SharedTensors, StepReport, TrainerSettings

EVALUATE_EVERY_S = 15.0
_GATE_TOKENS = 6000  # held-out tokens that are replayed
_LOWEST_LR = 0.05


@dataclass(frozen=True)
class Point:
    """One row of the curve: what had been done at a time, and what the drafter was worth.

    Args:
        elapsed_s: since the start of this warm-up.
        trained_s: in training steps, those before a resumption included.
        steps, tokens: of training so far.
        loss, ce, accept: mean of the training steps since the last point.
        accept_len: replayed on held-out samples.
    """

    elapsed_s: float
    trained_s: float
    steps: int
    tokens: int
    loss: float
    ce: float
    accept: float
    accept_len: float


class Learner:
    """Trains one drafter on the samples of one buffer.

    Args:
        target: folder of the target, whose embedding and head are read.
        start: the drafter to go on with, from `load_checkpoint` or as it was made from the target.
        out: folder of the checkpoints and the curve.
        planned_s: training time over which the learning rate falls.
        begun: the warm-up's start, by `time.monotonic`.
    """

    def __init__(
        self,
        target: Path,
        target_config: dict[str, Any],
        start: Checkpoint,
        out: Path,
        *,
        num_steps: int,
        pack_tokens: int,
        lr: float,
        planned_s: float,
        begun: float,
        seed: int,
        device: str,
        dtype: str,
    ) -> None:
        self.buffer = Buffer(max_bytes=4 << 30)
        self.config = drafter_config(target_config)
        self.num_steps, self._pack_tokens, self._planned_s = num_steps, pack_tokens, planned_s
        self._dtype = getattr(torch, dtype)
        embed, head = embed_and_head(target, target_config, device)
        self._trainer = DrafterTrainer(
            EagleDrafter.from_weights(start.config, start.weights),
            SharedTensors(embed, head, start.hot),
            TrainerSettings(lr=lr),
            device,
            seed,
        )
        if start.trainer_state is not None:
            self._trainer.load_state_dict(start.trainer_state)
        self._order = torch.Generator().manual_seed(seed)
        self._writer = CheckpointWriter(out)
        self.version = start.version
        self.tokens = int(start.info.get("tokens", 0))
        self.trained_s = float(start.info.get("trained_s", 0.0))
        self._begin_s, self._this_run_s = begun, 0.0
        self._curve = _Curve(out / "curve.csv", resumed=start.trainer_state is not None)

    @property
    def hot(self) -> torch.Tensor | None:
        """int64 [Vh], the tokens that the draft head knows; None for all."""
        return self._trainer.shared.hot

    @property
    def shared(self) -> SharedTensors:
        """The target's tensors, as the trainer has them."""
        return self._trainer.shared

    def choose_hot(self, size: int | None, always: list[int]) -> None:
        """Restrict the draft head to the tokens of the responses in the buffer.

        Args:
            size: how many; None for the smallest power of two that holds all but half a percent of the tokens.
            always: ids that are in whatever the rollouts say.
        """
        counts = self.buffer.token_counts(len(self.shared.head))
        hot = hot_vocabulary(counts, covering_size(counts) if size is None else size, always)
        self._trainer.follow(SharedTensors(self.shared.embed, self.shared.head, hot))

    def train(self, seconds: float, tokens: int | None, on_step: Callable[[StepReport, float], None]) -> None:
        """Train for a time, or until `tokens` tokens were learnt from in all. Evaluates as it goes.

        Raises:
            RuntimeError: the buffer has nothing to learn from.
            DrafterDiverged: see the trainer.
        """
        end, evaluated, recent = time.monotonic() + seconds, time.monotonic(), list[StepReport]()
        while time.monotonic() < end and (tokens is None or self.tokens < tokens):
            samples = self.buffer.samples()
            if not samples:
                raise RuntimeError("nothing to train on: no rollout of a prompt that is not held out")
            for pack in fill(samples, self._pack_tokens, self._order):
                report = self._trainer.step(pack, max(_LOWEST_LR, 1 - self._this_run_s / self._planned_s))
                self.tokens += report.tokens
                self.trained_s += report.seconds
                self._this_run_s += report.seconds
                recent.append(report)
                on_step(report, self._curve.accept_len)
                if time.monotonic() - evaluated > EVALUATE_EVERY_S:
                    self._add_point(recent)
                    evaluated, recent = time.monotonic(), []
                if time.monotonic() >= end:
                    break
        if recent:
            self._add_point(recent)

    def accept_len(self, samples: list[Sample], weights: Mapping[str, torch.Tensor] | None = None) -> float:
        """Replayed accept length of a drafter: the trainer's, or that of `weights`."""
        drafter = self._trainer.drafter if weights is None else EagleDrafter.from_weights(self.config, weights)
        return replay(drafter, self.shared, samples, self.num_steps).accept_len

    def held_out(self) -> list[Sample]:
        """Held-out samples, as many as are worth their time."""
        chosen, tokens = [], 0
        for sample in self.buffer.held_out_samples():
            if tokens > _GATE_TOKENS:
                break
            chosen.append(sample)
            tokens += len(sample.tokens)
        return chosen

    def weights(self) -> dict[str, torch.Tensor]:
        """The drafter's tensors in the dtype in which they serve."""
        return self._trainer.weights(self._dtype)

    def save(self, accept_len: float) -> None:
        """Write a checkpoint of the next version; returns when it is on the disk."""
        self.version += 1
        self._writer.save(
            self.config,
            self.weights(),
            self._trainer.state_dict(copies=False),
            version=self.version,
            info={"accept_len": accept_len, "tokens": self.tokens, "trained_s": self.trained_s},
            hot=self.hot,
        )
        self._writer.wait(120)

    def close(self) -> None:
        """End the thread that writes."""
        self._writer.close()

    def _add_point(self, recent: list[StepReport]) -> None:
        mean = {name: sum(getattr(r, name) for r in recent) / len(recent) for name in ("loss", "ce", "accept")}
        self._curve.add(
            Point(
                elapsed_s=time.monotonic() - self._begin_s,
                trained_s=self.trained_s,
                steps=self._trainer.steps,
                tokens=self.tokens,
                accept_len=self.accept_len(self.held_out()),
                **mean,
            )
        )


class _Curve:
    """`curve.csv`, written row by row."""

    def __init__(self, path: Path, *, resumed: bool) -> None:
        self._path = path
        self.accept_len = 1.0
        if not (resumed and path.exists()):
            self._write("w", [field.name for field in fields(Point)])

    def add(self, point: Point) -> None:
        self.accept_len = point.accept_len
        self._write("a", [f"{value:.6g}" for value in asdict(point).values()])

    def _write(self, mode: str, row: list[str]) -> None:
        with self._path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
