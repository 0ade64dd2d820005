"""What the drafter is trained on: the segments of the last two steps, put together, in bounded memory.

Knows segments and samples; neither losses nor models, and nothing of where segments come from. One thread at a time.

Segments of one request under one policy version that follow each other are one sequence. A sequence is what a sample is
made of, also while its request is in flight. What is kept, and what not:

    a newer policy version    begins a step: of the step before only its longest sequences stay, older steps go
    above `max_bytes`         the older step goes first, its shortest sequences before its long ones; then the shortest
                              finished ones; then the shortest in flight
    the same segment again    is not stored, whether it comes under its own request's id or, from the same prompt and
                              position on, under another's; however the segments are cut
    a fixed share of prompts  is never trained on: it is the gate's

Siblings of a group may begin alike (their prompt alone is a segment that all of them send). The one that goes its own
way later is given the common beginning as context, and is not trained on it again. One whose prompt came from the
prefix cache, for which there are no hidden states, is given the end of the prompt that a sibling has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from tlt_verl.drafter.packing import Sample
from tlt_verl.segments import Segment

_CONTEXT = 256  # tokens of a sibling's prompt at most
_SLACK = 4  # a sequence in flight is joined into storage with a quarter of its length to spare


@dataclass(frozen=True)
class BufferCounts:
    """What a buffer holds now (the first four) and what has happened to it so far."""

    tokens: int
    """Tokens in sequences, prompts and held-out ones included."""
    bytes: int
    """Memory of tokens and hidden states. Samples that are still in use after their sequence went are not in it."""
    sequences: int
    held_out: int
    """Those of `sequences` that only the gate sees."""
    duplicates: int
    """Segments that were there already, wholly."""
    expired: int
    """Sequences that went because their step was over, and segments of such a step that came later."""
    dropped: int
    """Sequences that went because of `max_bytes`."""


class _Run:
    """One sequence: contiguous tokens of one request under one policy version, with their hidden states."""

    def __init__(self, start: int, prompt_len: int, held_out: bool) -> None:
        self.start, self.prompt_len, self.held_out = start, prompt_len, held_out
        self.length = 0
        self.context = 0  # leading tokens that another sequence is trained on
        self.final = False
        self._joined = 0  # tokens that are in the storage
        self._tokens = torch.empty(0, dtype=torch.int64)  # [capacity]
        self._features = torch.empty(0, 0)  # [capacity, W]
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # int32 [t], bfloat16 [t, W]

    @property
    def untrained(self) -> int:
        """Leading tokens that are not trained on: the prompt, and what another sequence has."""
        return min(self.length, max(self.context, self.prompt_len - self.start, 0))

    @property
    def response_tokens(self) -> int:
        return self.length - self.untrained

    @property
    def bytes(self) -> int:
        tensors = [self._tokens, self._features, *(tensor for piece in self._pending for tensor in piece)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def append(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        self._pending.append((tokens, hidden))
        self.length += len(tokens)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [T] and hidden states [T, W]: views that stay as they are when more is appended."""
        if self._pending:
            self._join()
        return self._tokens[: self.length], self._features[: self.length]

    def has(self, offset: int, tokens: torch.Tensor) -> bool:
        """Whether these tokens [t] stand at an offset from the beginning."""
        return offset + len(tokens) <= self.length and torch.equal(
            self.joined()[0][offset : offset + len(tokens)], tokens.long()
        )

    def drop(self) -> None:
        """Let go of the memory. Who shares a beginning with this sequence finds it gone."""
        self.length = self._joined = 0
        self._tokens, self._features = self._tokens[:0].clone(), self._features[:0].clone()
        self._pending.clear()

    def sample(self) -> Sample:
        tokens, features = self.joined()
        return Sample(tokens=tokens, features=features, prompt_len=self.untrained)

    def _join(self) -> None:
        if len(self._tokens) < self.length:
            capacity = self.length if self.final else self.length + self.length // _SLACK
            old = self._tokens[: self._joined], self._features[: self._joined]
            hidden = self._pending[0][1]
            self._tokens = torch.empty(capacity, dtype=torch.int64)
            self._features = hidden.new_empty(capacity, hidden.shape[1])
            if self._joined:
                self._tokens[: self._joined], self._features[: self._joined] = old
        for tokens, hidden in self._pending:
            rows = slice(self._joined, self._joined + len(tokens))
            self._tokens[rows], self._features[rows] = tokens, hidden
            self._joined = rows.stop
        self._pending.clear()


@dataclass
class _Request:
    """How far a request has been seen, and where that is stored."""

    end: int
    run: _Run | None = None  # the sequence that it writes; None while everything so far was there already
    twins: list[tuple[_Run, int]] = field(default_factory=list)  # where it stands: sequences, and how much of them


@dataclass
class _Step:
    """The sequences of one policy version."""

    requests: dict[str, _Request] = field(default_factory=dict)
    runs: list[_Run] = field(default_factory=list)
    # by prompt id and position: the sequences that have begun there, and their tokens before it
    beginning: dict[tuple[int, int], list[tuple[_Run, int]]] = field(default_factory=dict)
    begun: int = 0  # sequences, those that went included


class Buffer:
    """Sequences of the newest policy version, and the long ones of the version before.

    Args:
        max_bytes: bound of the memory, checked after every `add` and `samples`.
        held_out: share of the prompts that only `held_out_samples` gives. It is decided by the prompt's id alone, so
            siblings are on the same side, and a prompt is on the same side in every step and every process.
        kept_share: share of a step's sequences, the longest by response tokens, that stays when a newer version comes.
        least_tokens: shorter sequences are stored, because they may grow, but make no sample.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, max_bytes: int, held_out: float = 0.1, kept_share: float = 0.25, least_tokens: int = 8) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes: got {max_bytes}; takes a positive number of bytes.")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out: got {held_out}; takes a share of at least 0 and below 1.")
        if not 0 <= kept_share <= 1:
            raise ValueError(f"kept_share: got {kept_share}; takes a share from 0 to 1.")
        if least_tokens < 2:
            raise ValueError(f"least_tokens: got {least_tokens}; takes at least 2: a draft follows a token.")
        self._max_bytes, self._held_out = max_bytes, held_out
        self._kept_share, self._least_tokens = kept_share, least_tokens
        self._steps: dict[int, _Step] = {}  # by policy version; two at most
        self._width: int | None = None
        self._duplicates = self._expired = self._dropped = 0

    @property
    def newest_version(self) -> int | None:
        """The highest policy version seen, None before the first segment."""
        return max(self._steps, default=None)

    @property
    def counts(self) -> BufferCounts:
        """What is held now, and what happened so far."""
        runs = list(self._runs())
        return BufferCounts(
            tokens=sum(run.length for run in runs),
            bytes=sum(run.bytes for run in runs),
            sequences=len(runs),
            held_out=sum(run.held_out for run in runs),
            duplicates=self._duplicates,
            expired=self._expired,
            dropped=self._dropped,
        )

    def is_held_out(self, prompt_id: int) -> bool:
        """Whether the prompt with this id (unsigned 64 bit) is only for the gate."""
        digest = hashlib.blake2b((prompt_id % 2**64).to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._held_out * 2**64

    def add(self, segments: Iterable[Segment]) -> None:
        """Store segments, in the order in which their requests produced them. Their tensors are kept, not copied.

        A request's segments of an older version that come late are stored while that version is one of the two held.

        Raises:
            ValueError: a segment's hidden states have another width than those before it.
        """
        for segment in segments:
            self._add(segment)
        self._expire()
        self._bound()

    def samples(self, min_tokens: int | None = None) -> list[Sample]:
        """The sequences to train on, newest version first, those in flight included.

        Args:
            min_tokens: shortest sample; None is `least_tokens`.

        Returns:
            Samples with tokens int64 [T], features bfloat16 [T, W] and T >= min_tokens, at least one token of which
            belongs to a response. `prompt_len` includes a beginning that another sample has. The tensors are views of
            the buffer's memory that stay as they are whatever is added or dropped; do not write to them.
        """
        found = [run.sample() for run in self._runs() if not run.held_out and self._is_sample(run, min_tokens)]
        self._bound()
        return found

    def held_out_samples(self, policy_version: int | None = None) -> list[Sample]:
        """The gate's sequences of one policy version, as `samples` gives them.

        Args:
            policy_version: None is the newest, the current policy. A version that is not held gives an empty list.
        """
        version = self.newest_version if policy_version is None else policy_version
        runs = self._steps[version].runs if version in self._steps else []
        found = [run.sample() for run in runs if run.held_out and self._is_sample(run)]
        self._bound()
        return found

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each token stands in a response that is trained on, int64 [vocab_size].

        Raises:
            ValueError: a token is not below `vocab_size`.
        """
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for run in self._runs():
            if run.held_out or not run.response_tokens:
                continue
            tokens = run.joined()[0][run.untrained :]
            if (highest := int(tokens.max())) >= vocab_size:
                raise ValueError(
                    f"vocab_size: got {vocab_size}, and the buffer holds token {highest}. Give the target's."
                )
            counts += torch.bincount(tokens, minlength=vocab_size)
        self._bound()
        return counts

    def _runs(self) -> Iterator[_Run]:
        """All sequences, newest version first."""
        for version in sorted(self._steps, reverse=True):
            yield from self._steps[version].runs

    def _is_sample(self, run: _Run, min_tokens: int | None = None) -> bool:
        least = self._least_tokens if min_tokens is None else min_tokens
        return run.length >= least and run.response_tokens > 0

    def _add(self, segment: Segment) -> None:
        self._check_width(segment)
        if sum(version > segment.policy_version for version in self._steps) >= 2:
            self._expired += 1
            return
        step = self._steps.setdefault(segment.policy_version, _Step())
        request = step.requests.setdefault(segment.request_id, _Request(end=segment.start))
        known = request.end - segment.start  # tokens of the segment that were seen before
        if known >= len(segment.tokens):
            self._duplicates += len(segment.tokens) > 0
            if request.run and segment.final:
                request.run.final = True
            return
        if known < 0:  # a gap
            request.end, request.run, request.twins = segment.start, None, []
        fresh = slice(max(known, 0), None)
        self._extend(step, request, segment, segment.tokens[fresh], segment.hidden[fresh])

    def _extend(
        self, step: _Step, request: _Request, segment: Segment, tokens: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """Append what a request has not sent before, unless it is what another sequence has at the same place."""
        start, request.end = request.end, request.end + len(tokens)
        if request.run is None:
            matched = request.twins
            twins = matched or step.beginning.get((segment.prompt_id, start), [])
            request.twins = [(run, at + len(tokens)) for run, at in twins if run.has(at, tokens)]
            if request.twins:
                self._duplicates += 1
                return
            request.run = self._begin(step, segment, start, matched[:1] or self._prompt_of(step, segment, start))
        request.run.append(tokens, hidden)
        request.run.final = segment.final

    def _begin(self, step: _Step, segment: Segment, start: int, twins: Sequence[tuple[_Run, int]]) -> _Run:
        """A new sequence at `start`, behind what it has in common with the first of its twins."""
        run = _Run(start, segment.prompt_len, self.is_held_out(segment.prompt_id))
        for other, shared in twins:
            if 0 < shared <= other.length:
                first = max(0, shared - _CONTEXT) if start <= segment.prompt_len else 0
                run.context, run.start = shared - first, other.start + first
                run.append(*(part[first:shared] for part in other.joined()))
        step.runs.append(run)
        for position in {run.start, start}:
            step.beginning.setdefault((segment.prompt_id, position), []).append((run, position - run.start))
        step.begun += 1
        return run

    @staticmethod
    def _prompt_of(step: _Step, segment: Segment, start: int) -> list[tuple[_Run, int]]:
        """A sibling that has the prompt up to `start`, from its beginning on, and how much of it that is."""
        begun = step.beginning.get((segment.prompt_id, 0), []) if 0 < start <= segment.prompt_len else []
        return [(run, start) for run, before in begun if not before and run.length >= start][:1]

    def _check_width(self, segment: Segment) -> None:
        width = segment.hidden.shape[1]
        if self._width is None:
            self._width = width
        elif width != self._width:
            raise ValueError(
                f"request {segment.request_id!r} sent hidden states of width {width}, and the buffer holds width "
                f"{self._width}. Use one buffer for each target and layout."
            )

    def _expire(self) -> None:
        """Drop what is older than the last two versions, and all but the long sequences of the older one."""
        for version in sorted(self._steps)[:-2]:
            self._expired += len(self._steps.pop(version).runs)
        if len(self._steps) == 2:
            step = self._steps[min(self._steps)]
            kept = math.ceil(self._kept_share * step.begun)
            by_length = sorted(step.runs, key=lambda run: run.response_tokens, reverse=True)
            self._expired += self._remove(step, by_length[kept:])

    def _bound(self) -> None:
        """Drop sequences until the rest is within `max_bytes`."""
        excess = sum(run.bytes for run in self._runs()) - self._max_bytes
        if excess <= 0:
            return
        for version in sorted(self._steps):
            step, doomed = self._steps[version], []
            for run in sorted(step.runs, key=partial(self._worth, version == self.newest_version)):
                if excess > 0:
                    doomed.append(run)
                    excess -= run.bytes
            self._dropped += self._remove(step, doomed)

    def _worth(self, is_newest: bool, run: _Run) -> tuple[bool, bool, int]:
        """What is smaller is dropped first. What fits in by no means must not take the others with it."""
        return run.bytes <= self._max_bytes, is_newest and not run.final, run.response_tokens

    @staticmethod
    def _remove(step: _Step, doomed: Sequence[_Run]) -> int:
        """Take sequences out of a step and say how many."""
        if not doomed:
            return 0
        gone = set(map(id, doomed))
        step.runs = [run for run in step.runs if id(run) not in gone]
        for key, begun in step.beginning.items():
            step.beginning[key] = [pair for pair in begun if id(pair[0]) not in gone]
        for run in doomed:
            run.drop()
        for request in step.requests.values():
            if id(request.run) in gone:
                request.run = None
        return len(doomed)
