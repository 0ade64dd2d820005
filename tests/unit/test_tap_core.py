"""The tap without an engine: staging, skipping what was recorded, versions, budgets, and copies that are late.

The ring is real; requests are objects that say their tokens, as SGLang's do.
"""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from tlt_verl.engine.tap import MOST_COPIES, Recorded, Stretch, Tap
from tlt_verl.segments import SegmentReader, SegmentWriter

W, SLOT = 4, 8


class Request:
    """A request whose token at position p is 100 + p and whose log-prob there is -p."""

    def __init__(self, name: str = "a", prompt_len: int = 3, length: int = 1000) -> None:
        self.request_id, self.prompt_id, self.prompt_len, self._length = name, 7, prompt_len, length
        self.recorded: Recorded | None = None

    def length(self) -> int:
        return self._length

    def tokens(self, start: int, end: int) -> list[int]:
        return [100 + p for p in range(start, end)]

    def logprobs(self, start: int, end: int) -> list[float]:
        return [-float(p) for p in range(start, end)]


@pytest.fixture
def ring(tmp_path):
    writer = SegmentWriter("tap", hidden_width=W, slots=256, slot_tokens=SLOT, folder=tmp_path)
    with contextlib.closing(writer), contextlib.closing(SegmentReader(writer.path)) as reader:
        yield writer, reader


def tap_of(ring, budget: int = 1 << 30) -> Tap:
    return Tap(ring[0], slot_tokens=SLOT, max_tokens_per_step=budget)


def record(tap: Tap, request: Request, start: int, count: int, version: int = 0, ended: bool = False) -> None:
    """A forward pass over some positions; the hidden state at position p is p in every channel."""
    hidden = torch.arange(start, start + count).float()[:, None].expand(-1, W)
    tap.record([Stretch(request, start, count, 0)], hidden, version, [request] if ended else [])


def positions(segments) -> list[int]:
    found = []
    for segment in segments:
        span = range(segment.start, segment.start + len(segment.tokens))
        assert segment.tokens.tolist() == [100 + p for p in span]
        assert segment.hidden.float().tolist() == [[float(p)] * W for p in span]
        assert segment.logprobs.float().tolist() == [-float(p) for p in span]
        found += span
    return found


def test_a_request_is_written_slot_by_slot_and_the_rest_when_it_ends(ring):
    tap, request = tap_of(ring), Request(length=21)
    record(tap, request, 0, 5)
    assert ring[1].poll() == [], "a slot is not full yet"
    record(tap, request, 5, 3)
    assert ring[1].poll() == [], "the last slot of a request says so: it waits for a row behind it"
    record(tap, request, 8, 11)
    first = ring[1].poll()
    assert [len(s.tokens) for s in first] == [8, 8]
    record(tap, request, 19, 2, ended=True)
    (last,) = ring[1].poll()
    assert positions([*first, last]) == list(range(21))
    assert [s.final for s in [*first, last]] == [False, False, True]


def test_what_a_retraction_computes_again_is_skipped(ring):
    tap, request = tap_of(ring), Request(length=30)
    record(tap, request, 0, 10)
    record(tap, request, 4, 16)
    record(tap, request, 0, 12)
    record(tap, request, 20, 10, ended=True)
    assert positions(ring[1].poll()) == list(range(30))
    assert tap.skipped_tokens == 6 + 12


def test_a_prompt_from_the_prefix_cache_begins_where_it_was_computed(ring):
    tap, request = tap_of(ring), Request(prompt_len=9, length=20)
    record(tap, request, 8, 12, ended=True)
    assert positions(ring[1].poll()) == list(range(8, 20))


def test_positions_behind_the_end_of_the_response_are_not_part_of_it(ring):
    tap, request = tap_of(ring), Request(length=7)
    record(tap, request, 0, 11, ended=True)
    assert positions(ring[1].poll()) == list(range(7))


def test_a_new_policy_begins_a_new_segment(ring):
    tap, request = tap_of(ring), Request(length=12)
    record(tap, request, 0, 5, version=1)
    record(tap, request, 5, 7, version=2, ended=True)
    segments = ring[1].poll()
    assert [(s.policy_version, s.start, len(s.tokens)) for s in segments] == [(1, 0, 5), (2, 5, 7)]
    assert positions(segments) == list(range(12))


def test_requests_of_one_pass_do_not_mix(ring):
    tap, one, two = tap_of(ring), Request("one", length=8), Request("two", length=9)
    hidden = torch.cat([torch.arange(8), torch.arange(9)]).float()[:, None].expand(-1, W)
    tap.record([Stretch(two, 0, 9, 8), Stretch(one, 0, 8, 0)], hidden, 0, [one, two])
    by_request = {
        name: [s for s in segments if s.request_id == name] for segments in [ring[1].poll()] for name in ("one", "two")
    }
    assert positions(by_request["one"]) == list(range(8)) and positions(by_request["two"]) == list(range(9))


def test_the_second_half_of_a_steps_budget_is_for_long_responses(ring):
    tap = tap_of(ring, budget=64)
    for i in range(8):  # lengths 5, ..., 40: the upper quartile is 35
        warm = Request(f"warm {i}", prompt_len=0, length=5 * (i + 1))
        tap.record([], torch.empty(0, W), 0, [])
        record(tap, warm, 0, 1, ended=True)
    spent = tap.tokens
    record(tap, Request("fill", prompt_len=0, length=32 - spent), 0, 32 - spent, ended=True)
    assert tap.tokens == 32 and tap.dropped_tokens == 0, "the first half is for everybody"
    record(tap, Request("short", prompt_len=0, length=8), 0, 8, ended=True)
    assert tap.dropped_tokens == 8
    record(tap, Request("long", prompt_len=0, length=60), 0, 17)
    assert tap.tokens == 48 and tap.dropped_tokens == 8
    record(tap, Request("long too", prompt_len=0, length=60), 0, 25)
    assert tap.tokens == 64 and tap.dropped_tokens == 16, "never more than the budget"
    record(tap, Request("next", prompt_len=0, length=8), 0, 8, version=1, ended=True)
    assert tap.tokens == 72, "the next policy's step has a budget of its own"


class LateEvent:
    """An accelerator's event that has not happened yet."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened


def test_nothing_waits_for_a_copy_and_late_ones_are_written_in_order(ring, monkeypatch):
    tap, request, events = tap_of(ring), Request(length=16), []
    on_host = Tap._to_host

    def late(self, hidden, stretches, ready):
        events.append(LateEvent())
        return on_host(self, hidden, stretches, ready)[0], events[-1]

    monkeypatch.setattr(Tap, "_to_host", late)
    record(tap, request, 0, 8)
    record(tap, request, 8, 8, ended=True)
    events[1].happened = True
    tap.drain()
    assert ring[1].poll() == [], "the first copy is not there yet"
    events[0].happened = True
    tap.drain()
    assert positions(ring[1].poll()) == list(range(16))


def test_copies_that_never_come_are_dropped_and_counted(ring, monkeypatch):
    on_host = Tap._to_host
    monkeypatch.setattr(Tap, "_to_host", lambda self, *given: (on_host(self, *given)[0], LateEvent()))
    tap = tap_of(ring)
    for i in range(MOST_COPIES + 5):
        record(tap, Request(str(i)), 0, 2)
    assert tap.dropped_tokens == 10 and ring[1].poll() == []


def test_a_request_that_is_gone_leaves_nothing_behind(ring):
    """Aborted while it waited, for instance: the tap never hears that it ended. What it had is written."""
    tap, request = tap_of(ring), Request()
    record(tap, request, 0, 5)
    tap.write_all()
    assert positions(ring[1].poll()) == list(range(5))
    gone = weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None


def test_the_last_segment_of_a_request_is_final_where_it_fills_its_slot(ring):
    tap, request = tap_of(ring), Request(length=2 * SLOT)
    record(tap, request, 0, 2 * SLOT)
    record(tap, request, 2 * SLOT, 3, ended=True)  # accepted behind its end
    assert [(len(s.tokens), s.final) for s in ring[1].poll()] == [(SLOT, False), (SLOT, True)]


def test_nothing_is_copied_once_a_steps_budget_is_spent(ring, monkeypatch):
    tap = tap_of(ring, budget=16)
    for name in ("a", "b"):
        record(tap, Request(name, prompt_len=0, length=8), 0, 8, ended=True)
    assert tap.tokens == 16
    record(tap, late := Request("late", prompt_len=0), 0, 50)
    assert late.recorded is None and tap.dropped_tokens == 50


def test_a_request_that_goes_on_behind_an_idle_moment_is_recorded_further(ring):
    """A paused engine is idle, too."""
    tap, request = tap_of(ring), Request(length=12)
    record(tap, request, 0, 5)
    tap.write_all()
    record(tap, request, 3, 9, ended=True)
    assert positions(ring[1].poll()) == list(range(12)) and tap.skipped_tokens == 2


def test_staged_rows_are_bounded_in_requests(ring, monkeypatch):
    monkeypatch.setattr("tlt_verl.engine.tap.MOST_OPEN", 3)
    tap = tap_of(ring)
    for i in range(5):
        record(tap, Request(str(i)), 0, 2)
    assert [s.request_id for s in ring[1].poll()] == ["0", "1"]
