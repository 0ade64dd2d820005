"""Publication: new weights for the serving drafter, between two steps of the scheduler's loop.

A publication has two messages. `stage` reads a drafter's folder in a thread, while the engine goes on, and checks it;
`publish` copies the staged tensors over the serving ones, which is all that the scheduler waits for. What does not fit
is rejected with its reason, and the old drafter goes on. Knows SGLang's model classes; the target is only ever read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tlt_verl.engine.fingerprint import unfused

logger = logging.getLogger(__name__)

SHARED = ("embed_tokens.weight", "lm_head.weight")
"""The drafter's tensors that are the target's."""


class PublicationError(ValueError):
    """A drafter that cannot be published. `kind` is one word for the counter, the message says what and where."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Staged:
    """A drafter that was read and checked: tensors under their checkpoint names, int64 [Vh] hot token ids or None."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    hot: torch.Tensor | None


class PublishGap:
    """How long the scheduler's steps stood still for the last publication that came between two of them.

    From the end of the step before to the beginning of the step behind: handling of the message, the copies, and
    whatever else the scheduler did between them.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ended = 0.0
        self._waiting = False

    def step_begins(self) -> None:
        """A forward pass is about to be launched."""
        if self._waiting:
            self.seconds, self._waiting = time.perf_counter() - self._ended, False

    def step_ends(self) -> None:
        """A forward pass has been launched; on a CPU it has ended."""
        self._ended = time.perf_counter()

    def idle(self) -> None:
        """The scheduler has nothing to do: a publication that came just now kept nobody waiting."""
        if self._waiting:
            self.seconds, self._waiting = 0.0, False

    def published(self) -> None:
        """A publication has come."""
        self._waiting = True


class Publications:
    """Stages and publishes drafters for one scheduler.

    Args:
        folder: its sub-folders `v<version>` are what may be published.
        draft_worker: SGLang's `EagleDraftWorker`.
        target_head: returns the target's head [V, H] as it is now.
        agree: whether all tensor-parallel ranks say yes.
        tp_size: how many ranks share each tensor.
        resizable: the hot vocabulary may change its size, for no captured graph has the head's shape.
    """

    def __init__(
        self,
        folder: Path,
        draft_worker: Any,
        target_head: Callable[[], torch.Tensor],
        agree: Callable[[bool], bool] = bool,
        tp_size: int = 1,
        resizable: bool = False,
    ) -> None:
        self._folder, self._worker, self._resizable = folder, draft_worker, resizable
        self._target_head, self._agree, self._tp_size = target_head, agree, tp_size
        self._thread: threading.Thread | None = None
        self._staged: Staged | None = None
        self.version = 0
        self.rejected: dict[str, int] = {}
        self.reason = ""
        self.published = 0
        self.is_broken = False
        """A publication failed half way: what serves now is no drafter that anybody trained."""
        self.drafts_are_stale = False
        """The hot tokens have changed: what requests in flight hold as their first drafts are rows of the old head."""

    @property
    def staged(self) -> int:
        """The version that is ready to be published, 0 for none."""
        return self._staged.version if self._staged is not None else 0

    @property
    def staging(self) -> bool:
        """Whether a folder is being read."""
        return self._thread is not None and self._thread.is_alive()

    def stage(self, version: int) -> bool:
        """Begin to read the drafter of this version; False while another is being read."""
        if self.staging:
            return False
        self._staged = None
        self._thread = threading.Thread(target=self._read, args=(version,), name="tlt-stage", daemon=True)
        self._thread.start()
        return True

    def publish(self, version: int) -> bool:
        """Make the staged drafter the serving one. Between two steps of the loop; the caller is the scheduler.

        Returns:
            Whether it serves now. False: it is not staged, or not on every rank.
        """
        staged = self._staged
        if not self._agree(staged is not None and staged.version == version):
            return False
        assert staged is not None
        self._staged = None
        try:
            self._copy(staged)
        except Exception as error:  # the rollout comes first; the caller turns drafting off
            self.is_broken = True
            self._reject(version, "failed", error)
            return False
        self.version, self.is_broken = version, False
        self.published += 1
        logger.info("tlt: drafter version %d serves", version)
        return True

    def _read(self, version: int) -> None:
        try:
            self._staged = self._checked(version)
        except PublicationError as error:
            self._reject(version, error.kind, error)
        except Exception as error:  # a thread must say how it ended: here, in the log and in the counters
            self._reject(version, "unreadable", error)

    def _reject(self, version: int, kind: str, error: Exception) -> None:
        self.rejected[kind] = self.rejected.get(kind, 0) + 1
        self.reason = f"version {version}: {error}"
        logger.error("tlt: drafter not published, version %d goes on serving: %s", self.version, self.reason)

    def _checked(self, version: int) -> Staged:
        """Read a folder and compare it with the serving drafter."""
        folder = self._folder / f"v{version}"
        tensors = load_file(folder / "model.safetensors")
        serving = dict(self._own_tensors())
        given = {name: tensor for name, tensor in tensors.items() if name not in SHARED}
        if missing := sorted(serving.keys() - given.keys()):
            raise PublicationError("missing", f"{folder}: the tensors {missing} are missing")
        if unknown := sorted(given.keys() - serving.keys()):
            raise PublicationError("unknown", f"{folder}: the serving drafter has no tensors {unknown}")
        for name, tensor in given.items():
            if not self._fits(tensor.shape, serving[name].shape):
                shapes = f"{tuple(tensor.shape)}, the serving one {tuple(serving[name].shape)}"
                raise PublicationError("shape", f"{folder}: {name} has the shape {shapes}")
            if not torch.isfinite(tensor).all():
                raise PublicationError("nan", f"{folder}: {name} holds NaN or infinity")
        return Staged(version, given, self._checked_hot(folder))

    def _checked_hot(self, folder: Path) -> torch.Tensor | None:
        """The hot token ids to draft from, or None for the whole vocabulary.

        A head that was captured in graphs keeps its size: the whole one serves every drafter, a hot one those of its
        size. A head that several ranks share is served whole.
        """
        path, serving = folder / "hot_tokens.pt", self._worker.hot_token_id
        if serving is None and (not self._resizable or self._tp_size > 1):
            return None
        hot = torch.as_tensor(torch.load(path, weights_only=True), dtype=torch.int64) if path.exists() else None
        sizes = [None if ids is None else len(ids) for ids in (hot, serving)]
        if sizes[0] != sizes[1] and not self._resizable:
            given, served = ("the whole vocabulary" if size is None else f"{size} hot tokens" for size in sizes)
            raise PublicationError("hot", f"{folder}: drafts from {given}; the captured graphs draft from {served}")
        rows = len(self._target_head())
        if hot is not None and (int(hot.min()) < 0 or int(hot.max()) >= rows):
            raise PublicationError("hot", f"{folder}: hot token ids outside [0, {rows})")
        return hot

    def _fits(self, whole: torch.Size, share: torch.Size) -> bool:
        """Whether a tensor is one of which each rank serves a share of this shape: all of it, or a part of one side."""
        if len(whole) != len(share):
            return False
        ratios = [w / s for w, s in zip(whole, share, strict=True)]
        return all(self._tp_size % ratio == 0 for ratio in ratios) and sum(ratio != 1 for ratio in ratios) <= 1

    def _own_tensors(self) -> Any:
        """This rank's share of the serving drafter's own tensors, under their checkpoint names."""
        for name, tensor in unfused(self._worker.draft_runner.model, self._tp_size):
            name = name.removeprefix("model.")
            if name not in SHARED:
                yield name, tensor

    @torch.no_grad()
    def _copy(self, staged: Staged) -> None:
        """Copy in place, with SGLang's own loader, so that captured graphs go on reading the right memory."""
        self._worker.draft_runner.model.load_weights(staged.tensors.items())
        self._set_hot(staged.hot)

    def _set_hot(self, hot: torch.Tensor | None) -> None:
        """Let the draft head be the target's head or its hot rows; in place where the size stays."""
        worker, head = self._worker, self._target_head()
        if hot is not None:
            hot = hot.to(head.device)
        serving = worker.hot_token_id
        same = hot is serving if hot is None or serving is None else torch.equal(hot, serving)
        self.drafts_are_stale |= not same
        if hot is not None and serving is not None and len(hot) == len(serving):
            worker.hot_token_id.copy_(hot)
            worker.draft_runner.model.lm_head.weight.data.copy_(head[hot])
        elif not same:
            worker.hot_token_id = hot
            rows = head if hot is None else head[hot]
            worker.draft_runner.model.lm_head.weight = torch.nn.Parameter(rows, requires_grad=False)
