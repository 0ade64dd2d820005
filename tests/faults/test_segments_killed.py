"""Segments through a ring whose writer and reader are killed again and again: none comes out wrong.

The short form writes 150,000 of them, the long form a million.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import tempfile
import time
from ctypes import Array, c_uint64
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tlt_verl.segments import SHM, Segment, SegmentReader, SegmentWriter, find_rings

RECORDS, LONG_RECORDS = 150_000, 1_000_000
W, SLOTS, SLOT_TOKENS = 8, 64, 4
NAME = "killed"
SEED = 11
POOL = 1021  # prime: payloads repeat after 1021 laps of the ring, and a slot can only tear with the lap before
WRITTEN, READ, LOST, TORN, DONE = range(5)  # the places in the processes' common counts

_random = torch.Generator().manual_seed(SEED)
_tokens = torch.randint(0, 1 << 31, (POOL + SLOT_TOKENS,), generator=_random).to(torch.int32)
_hidden = torch.randint(-(1 << 15), 1 << 15, (POOL + SLOT_TOKENS, W), generator=_random).to(torch.int16)
_logprobs = torch.randint(-(1 << 15), 1 << 15, (POOL + SLOT_TOKENS,), generator=_random).to(torch.int16)
_parts = [
    tuple(part[at : at + T] for part in (_tokens, _hidden.view(torch.bfloat16), _logprobs.view(torch.float16)))
    for at, T in ((number % POOL, 1 + number % SLOT_TOKENS) for number in range(POOL * SLOT_TOKENS))
]

Counts = Array[c_uint64]


def record(number: int) -> Segment:
    """The segment that is written as this number; its policy version says the number."""
    tokens, hidden, logprobs = _parts[number % len(_parts)]
    return Segment(
        policy_version=number,
        request_id=f"request-{number}",
        prompt_id=number * 0x9E3779B97F4A7C15 % (1 << 64),
        start=number % 1009,
        prompt_len=number % 13,
        final=number % 3 == 0,
        tokens=tokens,
        hidden=hidden,
        logprobs=logprobs,
    )


def is_same(left: Segment, right: Segment) -> bool:
    return (
        left.policy_version == right.policy_version
        and left.request_id == right.request_id
        and left.prompt_id == right.prompt_id
        and (left.start, left.prompt_len, left.final) == (right.start, right.prompt_len, right.final)
        and torch.equal(left.tokens, right.tokens)
        and torch.equal(left.hidden.view(torch.int16), right.hidden.view(torch.int16))
        and torch.equal(left.logprobs.view(torch.int16), right.logprobs.view(torch.int16))
    )


def write(folder: Path, counts: Counts, records: int, seed: int) -> None:
    """Go on where the writer before was killed."""
    sizes = {"hidden_width": W, "slots": SLOTS, "slot_tokens": SLOT_TOKENS}
    with contextlib.closing(SegmentWriter(NAME, **sizes, folder=folder)) as writer:
        for number in range(counts[WRITTEN], records):
            writer.write(record(number))
            counts[WRITTEN] = number + 1


def read(folder: Path, counts: Counts, records: int, seed: int) -> None:
    """Read whatever ring there is, slowly, until the writers are done; fail at the first wrong segment."""
    rng = random.Random(seed)
    readers: dict[Path, SegmentReader] = {}
    newest: dict[Path, int] = {}
    while readers or not counts[DONE]:
        for path in find_rings(NAME, folder):
            with contextlib.suppress(FileNotFoundError):  # its writer closed it just now
                if path not in readers:
                    readers[path] = SegmentReader(path)
        for path, reader in list(readers.items()):
            alive, lost, torn = reader.writer_alive(), reader.lost, reader.torn
            for segment in reader.poll():
                number = segment.policy_version
                assert is_same(segment, record(number)), f"{segment} is not what was written as {number}"
                assert number > newest.get(path, -1), f"{number} came after {newest[path]}"
                newest[path] = number
                counts[READ] += 1
            counts[LOST] += reader.lost - lost
            counts[TORN] += reader.torn - torn
            if not alive:
                readers.pop(path).close()
        time.sleep(rng.uniform(0, 0.02))


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="tlt-killed-", dir=SHM))
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("records", [RECORDS, pytest.param(LONG_RECORDS, marks=pytest.mark.long)])
def test_no_segment_is_wrong_whoever_is_killed(folder, records):
    """Proves, on the machine where it runs: of that many segments, each unlike any other, that go through a small ring
    while its reader is lapped all the time and either end is killed (SIGKILL) at random moments, mid-write and mid-copy
    included, a reader returns only such as were written, whole, each once and in order; a restarted end needs nothing
    from the one before; and when all have ended, no file is left.

    Does not prove it for the memory ordering of another processor.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "tlt_verl.segments"])  # or each restart takes seconds
    counts = context.RawArray(c_uint64, 5)
    rng = random.Random(SEED)

    def start(end) -> BaseProcess:
        process = context.Process(target=end, args=(folder, counts, records, rng.getrandbits(32)), name=end.__name__)
        process.start()
        return process

    running = {end: start(end) for end in (write, read)}
    kills = {write: 0, read: 0}
    while counts[WRITTEN] < records:
        until = min(records, counts[WRITTEN] + rng.randrange(records // 25))
        while counts[WRITTEN] < until and all(process.is_alive() for process in running.values()):
            time.sleep(0.001)
        end = rng.choice([write, read])
        kills[end] += kill(running[end])
        running[end] = start(end)
    finish(running[write])
    counts[DONE] = 1
    finish(running[read])

    figures = dict(zip(("written", "read", "lost", "torn"), counts, strict=False), kills=list(kills.values()))
    print(figures)
    assert counts[WRITTEN] >= records
    assert min(kills.values()) >= 5, figures
    assert counts[READ] > records // 100, figures
    assert counts[LOST] > records // 100, figures
    restarts = sum(kills.values()) + 1  # each reads again what is still there
    assert counts[READ] + counts[LOST] + counts[TORN] <= counts[WRITTEN] + (SLOTS + 1) * restarts, figures
    assert list(folder.iterdir()) == []
    assert find_rings(NAME) == []  # nor in the default folder


def kill(process: BaseProcess) -> bool:
    """Whether it was still running; one that found something wrong was not."""
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"{process.name} failed"
    return process.exitcode != 0


def finish(process: BaseProcess) -> None:
    process.join(timeout=60)
    assert process.exitcode == 0, f"{process.name} ended with {process.exitcode}"
