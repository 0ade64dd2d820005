"""The tap under overlap scheduling, which needs an accelerator: the next pass is launched before a result is processed.

The requests are SGLang's in what the tap reads of them; the order of calls is the scheduler's (`event_loop_overlap`).
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from tlt_verl.engine import tap_batch
from tlt_verl.engine.publication import PublishGap
from tlt_verl.engine.speculation import Speculation
from tlt_verl.engine.tap import Tap
from tlt_verl.engine.worker import TLTWorker
from tlt_verl.segments import SegmentReader, SegmentWriter

W, STRIDE = 4, 3


class Request:
    """What the tap reads of SGLang's `Req`."""

    def __init__(self, rid: str, prompt: list[int], most: int) -> None:
        self.rid, self.origin_input_ids, self.output_ids, self.most = rid, prompt, [], most
        self.finished_len, self.is_retracted, self.logprob, self.spec_verify_ct = None, False, None, 0

    def finished(self) -> bool:
        return self.finished_len is not None


def commit(req: Request, tokens: list[int]) -> None:
    """What the scheduler does with accepted tokens: append all, and cut the response at its end."""
    req.output_ids += tokens
    if len(req.output_ids) >= req.most:
        req.finished_len = req.most


@pytest.fixture
def worker(tmp_path):
    writer = SegmentWriter("overlap", hidden_width=W, slots=64, slot_tokens=4, folder=tmp_path)
    made = object.__new__(TLTWorker)
    made._tap = Tap(writer, slot_tokens=4, max_tokens_per_step=1 << 30)
    made._tap_failures, made._board, made._publish_gap = 0, None, PublishGap()
    made._speculation = speculation = object.__new__(Speculation)
    speculation.tuner = speculation._ngram = speculation._skipped = speculation._before_s = None
    speculation._clock = time.perf_counter
    with contextlib.closing(writer), contextlib.closing(SegmentReader(writer.path)) as made.reader:
        yield made


def launched(reqs: list[Request], positions: list[int], accepted: list[int]) -> tuple:
    """A verification: the hidden state of a position is that position. What it will turn out to have accepted."""
    hidden = torch.cat([torch.arange(p, p + STRIDE) for p in positions]).float()[:, None].expand(-1, W)
    result = SimpleNamespace(accept_lens=torch.tensor(accepted), speculative_num_draft_tokens=STRIDE)
    result.tlt_tapped = tap_batch.Tapped(hidden, 0)
    return SimpleNamespace(reqs=list(reqs)), result


def process(worker: TLTWorker, batch, result) -> None:
    def scheduler(batch, result):
        for req, count in zip(batch.reqs, result.accept_lens.tolist(), strict=True):
            if not (req.is_retracted or req.finished()):
                first = len(req.origin_input_ids) + len(req.output_ids)
                commit(req, list(range(100 + first, 100 + first + count)))

    worker.process_batch_result(scheduler, batch, result)


def test_positions_are_right_when_the_next_pass_is_launched_first(worker):
    a, b = Request("a", [1, 2, 3], most=8), Request("b", [4, 5], most=4)
    for req in (a, b):
        commit(req, [100 + len(req.origin_input_ids)])  # the prefill's token
    first = launched([a, b], [3, 2], [3, 3])
    second = launched([a, b], [6, 5], [2, 3])  # before the first is processed; b will have ended by then
    process(worker, *first)
    third = launched([a], [8], [3])
    process(worker, *second)
    process(worker, *third)
    segments = worker.reader.poll()
    assert worker._tap_failures == 0
    for req, positions in ((a, range(3, 11)), (b, range(2, 6))):
        mine = [s for s in segments if s.request_id == req.rid]
        found = [s.start + i for s in mine for i in range(len(s.tokens))]
        assert found == list(positions)[: len(found)] and found[-1] <= positions[-1]
        assert torch.cat([s.hidden[:, 0] for s in mine]).tolist() == [float(p) for p in found]
        assert torch.cat([s.tokens for s in mine]).tolist() == [100 + p for p in found]
        assert mine[-1].final
    assert sum(len(s.tokens) for s in segments) == 8 + 3, (
        "the end of a was accepted as a draft, that of b was its bonus"
    )


def test_a_request_that_was_retracted_meanwhile_is_left_alone(worker):
    req = Request("a", [1, 2, 3], most=100)
    commit(req, [103])
    first, second = launched([req], [3], [2]), launched([req], [5], [3])
    process(worker, *first)
    req.is_retracted = True
    process(worker, *second)
    worker.on_idle()
    assert [s.tokens.tolist() for s in worker.reader.poll()] == [[103, 104]]
    assert req.spec_verify_ct == 0


def test_a_tap_that_fails_ends_alone_and_is_counted(worker):
    req = Request("a", [1, 2, 3], most=100)
    commit(req, [103])
    batch, result = launched([req], [3], [2])
    result.tlt_tapped = tap_batch.Tapped(torch.zeros(1, W), 0)  # too few rows
    process(worker, batch, result)
    assert len(req.output_ids) == 3, "the scheduler's own work was done"
    assert worker._tap is None and worker._tap_failures == 1
