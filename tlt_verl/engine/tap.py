"""The tap: hidden states that prefill and verification computed anyway, into the ring of segments.

Knows positions, rows and the ring; knows nothing of SGLang but that a request is an object which it is told about
(`RequestView`). Nothing here waits: on an accelerator rows are copied to pinned memory on a stream of their own and
written once the copy has ended.

Each position of a request is recorded once, whatever the engine computes again: after a retraction the recomputed
positions are skipped. Positions that came from the prefix cache have no hidden state and are left out. The last token
of a response has none either, unless it was accepted as a draft: no other forward pass reads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tlt_verl.segments import Segment, SegmentWriter

MOST_COPIES = 64
"""Copies to the host that may be under way; above it the oldest are dropped, and counted."""

MOST_OPEN = 4096
"""Requests whose rows may be staged; above it those of the oldest are written, for they may never be heard of again."""

_LENGTHS = 512  # finished responses whose lengths say what is long


class RequestView(Protocol):
    """What the tap reads of a request."""

    request_id: str
    prompt_id: int
    prompt_len: int
    recorded: Recorded | None
    """The tap's own, None at first: it lives and dies with the view."""

    def length(self) -> int:
        """Positions of the prompt and of what the response keeps."""

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at the positions [start, end)."""

    def logprobs(self, start: int, end: int) -> list[float]:
        """Log-probs of these tokens, NaN where the engine did not compute one."""


@dataclass(frozen=True)
class Stretch:
    """`count` positions of a request from `start`, whose hidden states are the rows from `row` of one tensor."""

    view: RequestView
    start: int
    count: int
    row: int


@dataclass
class Recorded:
    """How far a request is recorded, and what of it is not in the ring yet.

    Args:
        end: the first position that was not recorded.
        version: of the policy that computed the staged rows.
        start: position of the first staged row.
        rows: bfloat16 [n, W] each.
        count: staged rows.
    """

    end: int
    version: int = 0
    start: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)
    count: int = 0


@dataclass
class _Copy:
    """Rows on their way to the host, and the requests that end with them."""

    stretches: list[Stretch]
    rows: torch.Tensor
    version: int
    ended: list[RequestView]
    event: Any = None


class Tap:
    """Records hidden states of requests into a ring.

    Args:
        writer: the scheduler's ring.
        slot_tokens: tokens of one of its slots: a request's rows are staged until they fill one.
        max_tokens_per_step: most tokens that are written under one version of the policy. The second half of it is
            kept for responses that are long, measured by the upper quartile of the lengths seen so far.
        stream: the accelerator's stream for copies, or None on the host.
    """

    def __init__(
        self, writer: SegmentWriter, *, slot_tokens: int, max_tokens_per_step: int, stream: Any = None
    ) -> None:
        self._writer, self._slot_tokens, self._stream = writer, slot_tokens, stream
        self._budget = max_tokens_per_step
        self._copies: deque[_Copy] = deque()
        self._open: dict[RequestView, None] = {}  # that have staged rows, oldest first
        self._lengths: deque[int] = deque(maxlen=_LENGTHS)
        self._version, self._spent = -1, 0
        self.tokens = 0
        self.dropped_tokens = 0
        self.skipped_tokens = 0

    def record(
        self,
        stretches: Sequence[Stretch],
        hidden: torch.Tensor,
        version: int,
        ended: Sequence[RequestView],
        ready: Any = None,
    ) -> None:
        """Take what one forward pass computed.

        Args:
            hidden: [R, W], any floating dtype, on the engine's device.
            version: of the policy that computed them.
            ended: requests that are finished; what is staged of them is written.
            ready: an event of the device behind which `hidden` is there; None on the host.
        """
        new = [fresh for stretch in stretches if (fresh := self._unrecorded(stretch)).count > 0]
        if version == self._version and self._spent >= self._budget:
            self.dropped_tokens += sum(stretch.count for stretch in new)
            new = []
        for stretch in new:
            recorded = stretch.view.recorded = stretch.view.recorded or Recorded(stretch.start)
            recorded.end = stretch.start + stretch.count
        rows, event = self._to_host(hidden, new, ready)
        self._copies.append(_Copy(new, rows, version, list(ended), event))
        self.drain()

    def drain(self) -> None:
        """Write what has arrived on the host; return at once where something has not."""
        while self._copies and (self._copies[0].event is None or self._copies[0].event.query()):
            self._stage(self._copies.popleft())
        while len(self._copies) > MOST_COPIES:
            copy = self._copies.popleft()
            self.dropped_tokens += sum(stretch.count for stretch in copy.stretches)
            for view in copy.ended:
                self._open.pop(view, None)
                view.recorded = None

    def write_all(self) -> None:
        """Write what is staged, full slots or not: the engine is idle, and some of it may be aborted requests'."""
        self.drain()
        for view in list(self._open):
            self._write_open(view)

    def metrics(self) -> dict[str, int]:
        """Counters since the start; `overwritten` is of segments, `dropped` and `skipped` (recomputed) of tokens."""
        return {
            "segments": self._writer.written,
            "bytes": self._writer.bytes,
            "overwritten": self._writer.overwritten,
            "tokens": self.tokens,
            "dropped": self.dropped_tokens,
            "skipped": self.skipped_tokens,
        }

    def close(self) -> None:
        """Remove the ring."""
        self._writer.close()

    def _unrecorded(self, stretch: Stretch) -> Stretch:
        """The part of a stretch that was not recorded before and that is part of the request."""
        recorded = stretch.view.recorded
        start = stretch.start if recorded is None else max(stretch.start, recorded.end)
        end = min(stretch.start + stretch.count, stretch.view.length())
        self.skipped_tokens += min(start, end) - stretch.start if start > stretch.start else 0
        return Stretch(stretch.view, start, max(0, end - start), stretch.row + start - stretch.start)

    def _to_host(self, hidden: torch.Tensor, stretches: Sequence[Stretch], ready: Any) -> tuple[torch.Tensor, Any]:
        """The stretches' rows one behind the other, bfloat16 on the host, and the event after which they are there."""
        index = [row for stretch in stretches for row in range(stretch.row, stretch.row + stretch.count)]
        if hidden.device.type == "cpu":
            return hidden[torch.tensor(index, dtype=torch.int64)].to(torch.bfloat16), None
        module = torch.get_device_module(hidden.device)
        pinned_index = torch.tensor(index, dtype=torch.int64).pin_memory()
        self._stream.wait_event(ready)
        with module.stream(self._stream):
            rows = hidden[pinned_index.to(hidden.device, non_blocking=True)].to(torch.bfloat16)
            host = torch.empty(rows.shape, dtype=torch.bfloat16, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            event = module.Event()
            event.record(self._stream)
        hidden.record_stream(self._stream)
        return host, event

    def _stage(self, copy: _Copy) -> None:
        """Add a copy's rows to their requests; write the slots that are full and the requests that ended.

        A slot is written when the first row behind it is there, so that the last one of a request can say that it is.
        """
        at = 0
        for stretch in copy.stretches:
            rows = copy.rows[at : at + stretch.count]
            at += stretch.count
            recorded = self._recorded_for(stretch, copy.version)
            recorded.rows.append(rows)
            recorded.count += stretch.count
            self._open[stretch.view] = None
            while recorded.count > self._slot_tokens:
                self._flush(stretch.view, recorded, self._slot_tokens)
        for view in copy.ended:
            self._open.pop(view, None)
            if view.recorded is not None:
                self._flush(view, view.recorded, view.recorded.count, final=True)
                self._lengths.append(view.length() - view.prompt_len)
                view.recorded = None
        while len(self._open) > MOST_OPEN:
            self._write_open(next(iter(self._open)))

    def _write_open(self, view: RequestView) -> None:
        """Write a request's staged rows and let go of it; it is recorded further if it comes again."""
        del self._open[view]
        if view.recorded is not None:
            self._flush(view, view.recorded, view.recorded.count)

    def _recorded_for(self, stretch: Stretch, version: int) -> Recorded:
        """Where a stretch is staged. What it does not continue, in position or in version, is written first."""
        recorded = stretch.view.recorded
        assert recorded is not None, "a request is recorded until it has ended"
        if recorded.count and (recorded.version != version or recorded.start + recorded.count != stretch.start):
            self._flush(stretch.view, recorded, recorded.count)
        if not recorded.count:
            recorded.version, recorded.start = version, stretch.start
        return recorded

    def _flush(self, view: RequestView, recorded: Recorded, count: int, *, final: bool = False) -> None:
        """Write the first `count` staged rows as one segment, or drop them where the step's budget is spent."""
        if count == 0:
            return
        rows = recorded.rows[0] if len(recorded.rows) == 1 else torch.cat(recorded.rows)
        start, end = recorded.start, recorded.start + count
        if self._allowed(view.length() - view.prompt_len, count, recorded.version):
            segment = Segment(
                policy_version=recorded.version,
                request_id=view.request_id,
                prompt_id=view.prompt_id,
                start=start,
                prompt_len=view.prompt_len,
                final=final,
                tokens=torch.tensor(view.tokens(start, end), dtype=torch.int32),
                hidden=rows[:count],
                logprobs=torch.tensor(view.logprobs(start, end), dtype=torch.float16),
            )
            self._writer.write(segment)
            self._spent += count
            self.tokens += count
        else:
            self.dropped_tokens += count
        recorded.rows = [rows[count:]] if len(rows) > count else []
        recorded.start, recorded.count = end, recorded.count - count

    def _allowed(self, response: int, count: int, version: int) -> bool:
        """Whether the step's budget has room for a response of this length."""
        if version != self._version:
            self._version, self._spent = version, 0
        if self._spent + count > self._budget:
            return False
        return self._spent + count <= self._budget // 2 or response >= self._long()

    def _long(self) -> int:
        """Upper quartile of the lengths of finished responses."""
        lengths = sorted(self._lengths)
        return lengths[len(lengths) * 3 // 4] if lengths else 0
