"""The tap: hidden states that prefill and verification computed anyway, into the ring of segments.

Knows positions, rows and the ring; knows nothing of SGLang but that a request is an object which it is told about
(`RequestView`). Nothing here waits: on an accelerator rows are copied to pinned memory on a stream of their own and
written once the copy has ended.

Each position of a request is recorded once, whatever the engine computes again: after a retraction the recomputed
positions are skipped. Positions that came from the prefix cache have no hidden state and are left out. The last token
of a response has none either, for no forward pass ever reads it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tlt_verl.segments import Segment, SegmentWriter

MOST_COPIES = 64
"""Copies to the host that may be under way; above it the oldest are dropped, and counted."""

_LENGTHS = 512  # finished responses whose lengths say what is long


class RequestView(Protocol):
    """What the tap reads of a request."""

    request_id: str
    prompt_id: int
    prompt_len: int

    def length(self) -> int:
        """Positions of the prompt and of what the response keeps."""

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at the positions [start, end)."""

    def logprobs(self, start: int, end: int) -> list[float]:
        """Log-probs of these tokens, NaN where the engine did not compute one."""


@dataclass(frozen=True)
class Stretch:
    """`count` positions of a request from `start`, whose hidden states are the rows from `row` of one tensor."""

    key: Any  # the engine's request object
    view: RequestView
    start: int
    count: int
    row: int


@dataclass
class _Staged:
    """A request's recorded positions that are not in the ring yet."""

    view: RequestView
    version: int
    start: int = 0  # position of the first staged row
    rows: list[torch.Tensor] = field(default_factory=list)  # bfloat16 [n, W] each
    count: int = 0


@dataclass
class _Copy:
    """Rows on their way to the host, and the requests that end with them."""

    stretches: list[Stretch]
    rows: torch.Tensor
    version: int
    ended: list[Any]
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
        self._next: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._staged: weakref.WeakKeyDictionary[Any, _Staged] = weakref.WeakKeyDictionary()
        self._copies: deque[_Copy] = deque()
        self._lengths: deque[int] = deque(maxlen=_LENGTHS)
        self._version, self._spent = -1, 0
        self.tokens = 0
        self.dropped_tokens = 0

    def record(self, stretches: Sequence[Stretch], hidden: torch.Tensor, version: int, ended: Sequence[Any]) -> None:
        """Take what one forward pass computed.

        Args:
            hidden: [R, W], any floating dtype, on the engine's device.
            version: of the policy that computed them.
            ended: request objects that are finished; what is staged of them is written.
        """
        new = [fresh for stretch in stretches if (fresh := self._unrecorded(stretch)).count > 0]
        for stretch in new:
            self._next[stretch.key] = stretch.start + stretch.count
        rows, event = self._to_host(hidden, new)
        self._copies.append(_Copy(new, rows, version, list(ended), event))
        self.drain()

    def drain(self) -> None:
        """Write what has arrived on the host; return at once where something has not."""
        while self._copies and (self._copies[0].event is None or self._copies[0].event.query()):
            self._stage(self._copies.popleft())
        while len(self._copies) > MOST_COPIES:
            copy = self._copies.popleft()
            self.dropped_tokens += sum(stretch.count for stretch in copy.stretches)

    def metrics(self) -> dict[str, int]:
        """Counters since the start; `overwritten` is of segments, `dropped` of tokens."""
        return {
            "segments": self._writer.written,
            "bytes": self._writer.bytes,
            "overwritten": self._writer.overwritten,
            "tokens": self.tokens,
            "dropped": self.dropped_tokens,
        }

    def close(self) -> None:
        """Remove the ring."""
        self._writer.close()

    def _unrecorded(self, stretch: Stretch) -> Stretch:
        """The part of a stretch that was not recorded before and that is part of the request."""
        start = max(stretch.start, self._next.get(stretch.key, stretch.start))
        end = min(stretch.start + stretch.count, stretch.view.length())
        return Stretch(stretch.key, stretch.view, start, max(0, end - start), stretch.row + start - stretch.start)

    def _to_host(self, hidden: torch.Tensor, stretches: Sequence[Stretch]) -> tuple[torch.Tensor, Any]:
        """The stretches' rows one behind the other, bfloat16 on the host, and the event after which they are there."""
        index = [row for stretch in stretches for row in range(stretch.row, stretch.row + stretch.count)]
        if hidden.device.type == "cpu":
            return hidden[torch.tensor(index, dtype=torch.int64)].to(torch.bfloat16), None
        module = torch.get_device_module(hidden.device)
        pinned_index = torch.tensor(index, dtype=torch.int64).pin_memory()
        self._stream.wait_stream(module.current_stream())
        with module.stream(self._stream):
            rows = hidden[pinned_index.to(hidden.device, non_blocking=True)].to(torch.bfloat16)
            host = torch.empty(rows.shape, dtype=torch.bfloat16, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            event = module.Event()
            event.record(self._stream)
        hidden.record_stream(self._stream)
        return host, event

    def _stage(self, copy: _Copy) -> None:
        """Add a copy's rows to their requests; write the slots that are full and the requests that ended."""
        at = 0
        for stretch in copy.stretches:
            rows = copy.rows[at : at + stretch.count]
            at += stretch.count
            staged = self._staged_for(stretch, copy.version)
            staged.rows.append(rows)
            staged.count += stretch.count
            while staged.count >= self._slot_tokens:
                self._flush(staged, self._slot_tokens)
        for key in copy.ended:
            staged_or_none = self._staged.pop(key, None)
            if staged_or_none is not None:
                self._flush(staged_or_none, staged_or_none.count, final=True)
                self._lengths.append(staged_or_none.view.length() - staged_or_none.view.prompt_len)

    def _staged_for(self, stretch: Stretch, version: int) -> _Staged:
        """Where a stretch is staged. What it does not continue, in position or in version, is written first."""
        staged = self._staged.get(stretch.key)
        if staged is None:
            staged = self._staged[stretch.key] = _Staged(stretch.view, version, stretch.start)
        elif staged.version != version or staged.start + staged.count != stretch.start:
            self._flush(staged, staged.count)
            staged.version, staged.start = version, stretch.start
        return staged

    def _flush(self, staged: _Staged, count: int, *, final: bool = False) -> None:
        """Write the first `count` staged rows as one segment, or drop them where the step's budget is spent."""
        if count == 0:
            return
        rows = staged.rows[0] if len(staged.rows) == 1 else torch.cat(staged.rows)
        start, end, view = staged.start, staged.start + count, staged.view
        if self._allowed(view.length() - view.prompt_len, count, staged.version):
            segment = Segment(
                policy_version=staged.version,
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
        staged.rows = [rows[count:]] if len(rows) > count else []
        staged.start, staged.count = end, staged.count - count

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
