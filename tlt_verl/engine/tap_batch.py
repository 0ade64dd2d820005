"""What SGLang's batches say to the tap: which positions of which requests the rows of a forward pass are.

Knows SGLang's `Req`, `ScheduleBatch` and `GenerationBatchResult`; knows nothing of rings.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tlt_verl.engine.tap import Recorded, Stretch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

_VIEW = "_tlt_view"  # attribute of a Req


@dataclass(frozen=True)
class Tapped:
    """What a forward pass leaves for the tap until its result is processed.

    Args:
        hidden: [R, W]; of a prefill the requests' rows one behind the other, of a verification `stride` a request.
        version: of the policy.
        ready: event of the device behind which `hidden` is there; None on the host.
        prefix_lens, extend_lens: of a prefill, a number a request; None of a verification.
    """

    hidden: torch.Tensor
    version: int
    ready: Any = None
    prefix_lens: Sequence[int] | None = None
    extend_lens: Sequence[int] | None = None


class View:
    """A request as the tap reads it."""

    def __init__(self, req: Req) -> None:
        self._req = req
        self.recorded: Recorded | None = None
        self.request_id = str(req.rid)[:64]
        self.prompt_len = len(req.origin_input_ids)
        digest = hashlib.blake2b(array("q", req.origin_input_ids).tobytes(), digest_size=8)
        self.prompt_id = int.from_bytes(digest.digest(), "little")

    def length(self) -> int:
        """Positions of prompt and response; what was accepted behind the response's end does not count."""
        req = self._req
        kept = len(req.output_ids) if req.finished_len is None else min(req.finished_len, len(req.output_ids))
        return self.prompt_len + kept

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at the positions [start, end)."""
        split = self.prompt_len
        prompt = self._req.origin_input_ids[min(start, split) : min(end, split)]
        return list(prompt) + list(self._req.output_ids[max(start - split, 0) : max(end - split, 0)])

    def logprobs(self, start: int, end: int) -> list[float]:
        """Log-probs of the tokens at [start, end) that the engine computed for its answer; NaN elsewhere."""
        split = self.prompt_len
        known = self._req.logprob.output_token_logprobs_val if self._req.logprob is not None else None
        values = list(known[max(start - split, 0) : max(end - split, 0)]) if known else []
        prompt = max(0, min(end, split) - start)
        return [math.nan] * prompt + values + [math.nan] * (end - start - prompt - len(values))


def view_of(req: Req) -> View:
    """The request's view; made once. It lives as long as the request, and no longer."""
    view = getattr(req, _VIEW, None)
    if view is None:
        view = View(req)
        setattr(req, _VIEW, view)
    return view


def active(batch: ScheduleBatch) -> list[bool]:
    """Before a result is processed: whether the request still takes what was computed for it."""
    return [not (req.is_retracted or req.finished()) for req in batch.reqs]


def prefill_stretches(batch: ScheduleBatch, tapped: Tapped) -> list[Stretch]:
    """The stretches of a prefill, the chunks of a chunked one included."""
    assert tapped.prefix_lens is not None and tapped.extend_lens is not None
    stretches, row = [], 0
    for req, start, count in zip(batch.reqs, tapped.prefix_lens, tapped.extend_lens, strict=True):
        stretches.append(Stretch(view_of(req), start, count, row))
        row += count
    return stretches


def verify_starts(batch: ScheduleBatch) -> list[int]:
    """Before a verification's result is processed: the position of each request's root, its last token."""
    return [view_of(req).prompt_len + len(req.output_ids) - 1 for req in batch.reqs]


def verify_stretches(batch: ScheduleBatch, result: Any, starts: Sequence[int], live: Sequence[bool]) -> list[Stretch]:
    """The stretches of a verification: root and accepted drafts, which stand at the front of each request's rows.

    The bonus token is the next verification's root.
    """
    accepted, stride = result.accept_lens.tolist(), result.speculative_num_draft_tokens
    return [
        Stretch(view_of(req), start, count, i * stride)
        for i, (req, start, count, is_live) in enumerate(zip(batch.reqs, starts, accepted, live, strict=True))
        if is_live
    ]
