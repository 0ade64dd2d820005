"""One training step of the drafter at a time: pack, noise, loss, gradient, update.

Knows the drafter, the losses and the target's embedding and head; knows neither where samples come from nor who gets
the weights, and neither verl nor sglang. Versions, files and the decision to publish are others' business.

Parameters and optimizer are float32. The products run in bfloat16 under autocast where the device has instructions for
it (`compute_dtype`), else in float32.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tlt_verl.drafter.loss import Losses, eagle_loss
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import PackedBatch, Sample, pack


class DrafterDiverged(RuntimeError):  # noqa: N818 - what happened, in the field's word
    """A loss or a gradient that is not finite. The step was not applied; the message names the step and the value."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How the drafter is trained. Fixed for a trainer's life.

    Args:
        lr: AdamW's learning rate behind the warm-up.
        betas: AdamW's.
        weight_decay: AdamW's, for every parameter.
        clip: largest norm of the gradient of all parameters together; a larger one is scaled down to it.
        warmup_steps: steps in which the learning rate rises linearly to `lr`; 0 for none.
        feature_weight: of SmoothL1 on features, in `eagle_loss`.
        ce_weight: of the cross-entropy, in `eagle_loss`. The paper's 0.1: with 0.5 the first draft is as good and those
            behind it, which read the drafter's own features, are much worse (docs/LOG.md).
        noise: half the width of the uniform noise on input features, in the features' own unit (EAGLE, arXiv
            2401.15077, section 4.1: U(-0.1, 0.1)); 0 for none. It hardens the drafter against its own errors.
        dtype: `bfloat16` for autocast where the device has it, or `float32` for none anywhere.

    Raises:
        ValueError: a value out of range; it names the setting.
    """

    lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup_steps: int = 30
    feature_weight: float = 1.0
    ce_weight: float = 0.1
    noise: float = 0.1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a finite number above 0")
        for name in ("weight_decay", "warmup_steps", "feature_weight", "ce_weight", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a finite number of 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, takes two numbers from 0 to below 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype: got {self.dtype!r}, takes bfloat16 or float32")


@dataclass(frozen=True)
class SharedTensors:
    """The target's own tensors that the drafter uses. They may be the policy's memory: nothing here writes to them.

    Args:
        embed: [V, H], any float dtype.
        head: [V, H], any float dtype.
        hot: int64 [Vh], the rows of the head that the loss is over; None for all. Kept on the head's device.

    Raises:
        ValueError: the shapes do not fit together, or `hot` is not int64 within the vocabulary.
    """

    embed: torch.Tensor
    head: torch.Tensor
    hot: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.embed.ndim != 2 or self.embed.shape != self.head.shape:
            raise ValueError(f"embed and head: got {list(self.embed.shape)} and {list(self.head.shape)}, takes [V, H]")
        if self.hot is not None:
            if self.hot.ndim != 1 or self.hot.dtype != torch.int64 or not len(self.hot):
                raise ValueError(f"hot: got {self.hot.dtype} {list(self.hot.shape)}, takes int64 [Vh], Vh >= 1")
            if self.hot.min() < 0 or self.hot.max() >= len(self.head):
                raise ValueError(f"hot: got tokens up to {int(self.hot.max())}, takes 0 to {len(self.head) - 1}")
            object.__setattr__(self, "hot", self.hot.to(self.head.device))


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Args:
        loss, feature, ce, accept, top1: as in `Losses`, before the step.
        grad_norm: of all parameters together, before clipping.
        tokens: rows that were learnt from.
        seconds: wall time of the step, the update included.
    """

    loss: float
    feature: float
    ce: float
    accept: float
    top1: float
    grad_norm: float
    tokens: int
    seconds: float


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it (AVX512-BF16 and AMX, or Ampere on), else float32."""
    if device.type == "cpu":
        has_it = torch.cpu._is_avx512_bf16_supported()
    else:
        has_it = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32


class DrafterTrainer:
    """AdamW on a drafter, one pack a step.

    Args:
        drafter: is moved to the device and trained in place, in float32.
        shared: the target's tensors, on the device.
        settings: how.
        device: where it trains.
        seed: of the noise on features.

    Raises:
        ValueError: the target's tensors are on another device, or of another hidden size.
    """

    def __init__(
        self,
        drafter: EagleDrafter,
        shared: SharedTensors,
        settings: TrainerSettings,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.drafter = drafter.to(self.device, torch.float32).train()
        self.steps = 0  # applied ones
        self.follow(shared)
        self._dtype = compute_dtype(self.device) if settings.dtype == "bfloat16" else torch.float32
        self._noise = torch.Generator(self.device).manual_seed(seed)
        self._optimizer = torch.optim.AdamW(
            self.drafter.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def follow(self, shared: SharedTensors) -> None:
        """Train against these tensors from now on: the policy has changed. With `hot`, its rows of the head are copied.

        Raises:
            ValueError: see the class.
        """
        H = self.drafter.fc.out_features
        if shared.embed.shape[1] != H:
            raise ValueError(f"embed and head: got hidden size {shared.embed.shape[1]}, takes the drafter's, {H}")
        for name in ("embed", "head"):
            if (found := getattr(shared, name).device).type != self.device.type:
                raise ValueError(f"{name}: got a tensor on {found}, takes one on {self.device}")
        self.shared = shared
        self._head = shared.head if shared.hot is None else shared.head[shared.hot.to(self.device)]  # (Vh, H)

    def unfollow(self) -> None:
        """Let go of the target's tensors; `follow` comes before the next step."""
        nothing = self.shared.embed.new_empty(0, self.shared.embed.shape[1])
        self.shared, self._head = SharedTensors(nothing, nothing), nothing

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and optimizer state by name: the tensors themselves, all that the trainer has on its device."""
        found: dict[str, torch.Tensor] = {f"drafter.{name}": p for name, p in self.drafter.named_parameters()}
        for name, parameter in self.drafter.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            found |= {f"{key}.{name}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return found

    def tensors_to_come(self) -> dict[str, torch.Tensor]:
        """What `own_tensors` holds after the first step, by tensors of the same shapes and dtypes; scalars left out."""
        found = self.own_tensors()
        for name, parameter in self.drafter.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                found.setdefault(f"{moment}.{name}", parameter)
        return found

    def step(self, samples: Sequence[Sample], lr_scale: float = 1.0) -> StepReport:
        """One pack, one update.

        Args:
            samples: of one pack, from any device.
            lr_scale: the learning rate is `lr` times this and the warm-up.

        Raises:
            DrafterDiverged: the loss or the gradient is not finite. Weights and optimizer are as before the call.
            ValueError: the samples have no row to learn from.
        """
        begin = time.perf_counter()
        self._optimizer.zero_grad()
        losses, tokens = self._losses(pack(samples))
        losses.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.settings.clip)
        values = {name: getattr(losses, name).item() for name in ("loss", "feature", "ce", "accept", "top1")}
        values["grad_norm"] = norm.item()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                self._optimizer.zero_grad()
                raise DrafterDiverged(f"step {self.steps + 1}: {name} is {values[name]}; the step was not applied")
        warmup = min(1.0, (self.steps + 1) / max(self.settings.warmup_steps, 1))
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.lr * warmup * lr_scale
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        return StepReport(**values, tokens=tokens, seconds=time.perf_counter() - begin)

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Copies of the drafter's tensors, named as in its file, in this dtype, on the trainer's device."""
        return {name: tensor.detach().to(dtype, copy=True) for name, tensor in self.drafter.state_dict().items()}

    def state_dict(self, *, copies: bool = True) -> dict[str, Any]:
        """All that training goes on from: drafter, optimizer, steps, generator of the noise.

        A trainer that loads it, with the same settings, device and shared tensors, continues bit for bit.

        Args:
            copies: False gives the tensors themselves, for one who copies them before the next step.
        """
        state = {
            "drafter": self.drafter.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "steps": self.steps,
            "noise": self._noise.get_state(),
        }
        return copy.deepcopy(state) if copies else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. The settings stay the trainer's own.

        Raises:
            KeyError, RuntimeError, ValueError: the state is incomplete, or of another drafter.
        """
        self.drafter.load_state_dict(state["drafter"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.steps = int(state["steps"])
        self._noise.set_state(state["noise"].cpu())

    def _losses(self, batch: PackedBatch) -> tuple[Losses, int]:
        """The losses of a pack, and how many rows they are over."""
        features, wanted = (side.to(self.device, torch.float32) for side in (batch.features, batch.wanted))
        if self.settings.noise:
            width = self.settings.noise
            features = features + torch.empty_like(features).uniform_(-width, width, generator=self._noise)
        embeddings = F.embedding(batch.embedding_tokens.to(self.device), self.shared.embed.detach())
        with self._autocast():
            predicted = self.drafter(embeddings, features, batch.lengths)
            losses = eagle_loss(
                predicted,
                wanted,
                self._head,
                batch.mask.to(self.device),
                feature_weight=self.settings.feature_weight,
                ce_weight=self.settings.ce_weight,
            )
        return losses, int(batch.mask.sum())

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)
