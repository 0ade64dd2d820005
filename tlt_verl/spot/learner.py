"""What a spot worker knows between two windows: buffer, trainer, and the state of both.

Knows segments, samples, the trainer and the gate; not when the device is idle, nor how the others are reached.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlt_verl.drafter.buffer import Buffer
from tlt_verl.drafter.hot import covering_size, hot_vocabulary
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.offload import Offload
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.shapes import repeated_rows
from tlt_verl.drafter.snapshot import HostCopy
from tlt_verl.drafter.trainer import DrafterTrainer, SharedTensors, StepReport, TrainerSettings
from tlt_verl.segments import Segment
from tlt_verl.spot.gate import Gate, Verdict
from tlt_verl.spot.micro import Packs, StepSize

_GATE_TOKENS = 160  # of a held-out sample that are replayed at once: as much as a micro-step may take
_UNIT = 32  # rows: numbers of rows repeat, and shapes with them
_POLICIES = 8  # of which held-out samples are remembered
_REPORTS = 32
_HOT_TOKENS = 500  # counted tokens from which a hot vocabulary is chosen


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """How a spot worker learns.

    Args:
        step_s: that a micro-step may take.
        most_rows: of a micro-step.
        lr: AdamW's learning rate.
        buffer_bytes: bound of the buffer.
        held_out: share of the prompts that only the gate sees.
        gate_tokens: held-out tokens that a judgement takes at most.
        hot_size: of the hot vocabulary; None for what the rollouts need, 0 for none.
        always_hot: ids that are in it whatever the rollouts say.
        num_steps: drafts of a verification, for the gate.
        margin, least: of the gate.
        seed: of the order and the noise; another one for each worker.
    """

    step_s: float = 0.05
    most_rows: int = 2048
    lr: float = 5.0e-4
    buffer_bytes: int = 1 << 30
    held_out: float = 0.1
    gate_tokens: int = 2000
    hot_size: int | None = None
    always_hot: tuple[int, ...] = ()
    num_steps: int = 3
    margin: float = 0.0
    least: float = 1.2
    seed: int = 0


class SpotLearner:
    """Trains a copy of the drafter, a micro-step at a time.

    Args:
        config: the drafter's `config.json`.
        weights: of the drafter to begin with.
        settings: how.
        device: where it trains.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        settings: LearnerSettings,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.settings, self.device = dict(config), settings, torch.device(device)
        self.buffer = Buffer(settings.buffer_bytes, settings.held_out)
        self.gate = Gate(settings.num_steps, settings.margin, least=settings.least)
        self.size = StepSize(settings.step_s, settings.most_rows, max(_UNIT, repeated_rows(1, self.device)))
        self._packs = Packs(settings.seed)
        self._held_out: dict[int, list[Sample]] = {}  # by policy version
        H = int(self.config["hidden_size"])
        nothing = torch.empty(0, H, device=self.device)
        self._trainer = DrafterTrainer(
            EagleDrafter.from_weights(self.config, weights),
            SharedTensors(nothing, nothing),
            TrainerSettings(lr=settings.lr),
            self.device,
            settings.seed,
        )
        self._offload = Offload(self._trainer)
        self._policy: tuple[torch.Tensor, torch.Tensor] | None = None  # embedding and head, on the host
        self.hot: torch.Tensor | None = None
        self.policy_version = -1
        """Of the target's tensors that it trains against."""
        self.tokens = 0
        """Learnt from since the last `load`."""
        self.reports: deque[StepReport] = deque(maxlen=_REPORTS)
        """The last ones."""

    # --- what it learns from

    def add(self, segments: Sequence[Segment]) -> None:
        """Put segments into the buffer; the next pack may hold them."""
        self.buffer.add(segments)
        self._keep_held_out()
        self._packs.replace(self.buffer.samples())

    def follow(self, version: int, embed: torch.Tensor, head: torch.Tensor) -> None:
        """Train against the policy's tensors [V, H], which are on the host and stay the caller's."""
        self.policy_version, self._policy = version, (embed, head)

    def propose_hot(self) -> torch.Tensor | None:
        """A hot vocabulary from the buffer's responses, int64 [Vh]; None where none is wanted, or too little is known.

        Raises:
            ValueError: the buffer holds tokens that the target does not know.
        """
        if self.settings.hot_size == 0 or self._policy is None:
            return None
        counts = self.buffer.token_counts(len(self._policy[1]))
        if int(counts.sum()) < _HOT_TOKENS:
            return None
        size = self.settings.hot_size or covering_size(counts)
        return hot_vocabulary(counts, size, self.settings.always_hot)

    # --- its state

    def load(self, master: Mapping[str, Any], hot: torch.Tensor | None) -> None:
        """Go on from the master: all of a trainer's state, or only `drafter` where nobody has trained yet.

        Raises:
            KeyError, RuntimeError, ValueError: the state is of another drafter.
        """
        self._offload.restore()
        state = {**self._trainer.state_dict(copies=False), **master}
        if "optimizer" not in master:
            state = {**state, "optimizer": {**state["optimizer"], "state": {}}, "steps": 0}
        self._trainer.load_state_dict(state)
        self.hot, self.tokens = hot, 0

    def state(self, *, copies: bool = True) -> dict[str, Any]:
        """The trainer's state, on the host. Also after `release`.

        Args:
            copies: False, after `release`, gives the tensors themselves, for one who is done before the next `begin`.
        """
        state = self._trainer.state_dict(copies=False)
        return HostCopy().take(state) if copies else state

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The drafter's tensors as they would serve, on the host."""
        return {name: tensor.cpu() for name, tensor in self._trainer.weights(dtype).items()}

    def begin(self) -> bool:
        """Take the device: weights and optimizer onto it, the policy's tensors beside them; whether there are any."""
        if self._policy is None:
            return False
        self._offload.restore()
        embed, head = self._policy
        tied = embed.data_ptr() == head.data_ptr()
        embed = embed.to(self.device)
        head = embed if tied else head.to(self.device)
        self._trainer.follow(SharedTensors(embed, head, self.hot))
        return True

    def release(self) -> None:
        """Give the device's memory back. Nothing that was learnt is lost."""
        self._offload.release()

    # --- steps

    def micro_step(self) -> StepReport | None:
        """Learn from one pack; None where there is nothing to learn from.

        Raises:
            DrafterDiverged: see the trainer. The state is as before the step.
        """
        pack = self._packs.next(self.size.rows)
        if pack is None:
            return None
        begun = time.thread_time()
        report = self._trainer.step(pack)
        # on a CPU not the time in which others had the core: smaller steps would not be given it earlier
        seconds = time.thread_time() - begun if self.device.type == "cpu" else report.seconds
        if self.size.observe(sum(sample.rows for sample in pack), seconds):
            self._packs.cut_anew()
        self.tokens += report.tokens
        self.reports.append(report)
        return report

    def judging(
        self, weights: Mapping[str, torch.Tensor], serving: Mapping[str, torch.Tensor] | None
    ) -> Generator[None, None, Verdict]:
        """`Gate.judging` of these weights against the serving ones, on held-out samples of the newest policy."""
        return self.gate.judging(weights, serving, self.config, self._trainer.shared, self.held_out())

    def held_out(self) -> list[Sample]:
        """Held-out samples, cut to what one step may take, as many as a judgement may take, the newest policy's first.

        With few prompts a step there are steps in which none is held out: those of some policies before count then.
        """
        chosen, tokens = [], 0
        for version in sorted(self._held_out, reverse=True):
            for sample in self._held_out[version]:
                for piece in _pieces(sample):
                    if tokens < self.settings.gate_tokens:
                        chosen.append(piece)
                        tokens += len(piece.tokens)
        return chosen

    def _keep_held_out(self) -> None:
        """Remember what the buffer holds out, beyond the two policies that it keeps."""
        newest = self.buffer.newest_version
        for version in () if newest is None else (newest - 1, newest):
            found = self.buffer.held_out_samples(version)
            if _tokens(found) > _tokens(self._held_out.get(version, ())):  # of the older one it has only the long ones
                self._held_out[version] = found
        tokens = 0
        for version in sorted(self._held_out, reverse=True):
            if tokens >= self.settings.gate_tokens or (newest is not None and version <= newest - _POLICIES):
                del self._held_out[version]  # newer ones are as much as a judgement takes
            else:
                tokens += _tokens(self._held_out[version])


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.tokens) for sample in samples)


def _pieces(sample: Sample) -> list[Sample]:
    """The sample in stretches of at most `_GATE_TOKENS` tokens."""
    cuts = range(0, len(sample.tokens) - 2, _GATE_TOKENS)
    return [
        Sample(
            sample.tokens[at : at + _GATE_TOKENS],
            sample.features[at : at + _GATE_TOKENS],
            max(sample.prompt_len - at, 0),
        )
        for at in cuts
    ]
