"""Small rings of segments, each in a folder of its own, and writers that are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from tlt_verl.segments import SHM, Segment, SegmentWriter, find_rings, ring_bytes

W, SLOTS, SLOT_TOKENS = 6, 4, 5
COUNT_OFFSET = 64  # in the file, of the number of records written


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder in shared memory; whoever uses it leaves it empty."""
    path = Path(tempfile.mkdtemp(prefix="tlt-test-", dir=SHM))
    try:
        yield path
        assert not list(path.iterdir())
    finally:
        shutil.rmtree(path)


def new_writer(folder: Path, name: str = "ring", slots: int = SLOTS) -> SegmentWriter:
    return SegmentWriter(name, hidden_width=W, slots=slots, slot_tokens=SLOT_TOKENS, folder=folder)


def segment(number: int, T: int = 3, **fields) -> Segment:
    """Another one for every number."""
    generator = torch.Generator().manual_seed(number)
    floats = torch.randn(T, W + 1, generator=generator)
    known = {
        "policy_version": number,
        "request_id": f"request-{number}",
        "prompt_id": number % 7,
        "start": number + 11,
        "prompt_len": 13,
        "final": number % 2 == 1,
        "tokens": torch.randint(0, 1 << 31, (T,), generator=generator).to(torch.int32),
        "hidden": floats[:, :W].bfloat16(),
        "logprobs": -floats[:, W].abs().half(),
    }
    return Segment(**{**known, **fields})


def bits(of: Segment) -> tuple:
    floats = (of.hidden.view(torch.int16).tolist(), of.logprobs.view(torch.int16).tolist())
    ids = (of.policy_version, of.request_id, of.prompt_id, of.start, of.prompt_len, of.final)
    return (*ids, of.tokens.tolist(), *floats)


def numbers(segments: list[Segment]) -> list[int]:
    """The segments' numbers, each compared with the one that was written."""
    assert [bits(one) for one in segments] == [bits(segment(one.policy_version)) for one in segments]
    return [one.policy_version for one in segments]


def dead_ring(folder: Path, name: str = "ring", written: int = 0) -> Path:
    """A ring whose writer was killed."""
    return dead_rings(folder, [name], written)[0]


def dead_rings(folder: Path, names: list[str], written: int = 0) -> list[Path]:
    """Rings whose writers were killed once all of them were there: a new writer removes the dead ones it finds."""
    context = get_context("fork")
    all_there = context.Barrier(len(names))
    processes = [context.Process(target=write_and_die, args=(folder, name, written, all_there)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}
    return [find_rings(name, folder)[0] for name in names]


def write_and_die(folder: Path, name: str, written: int, all_there: Barrier) -> None:
    writer = new_writer(folder, name)
    for number in range(written):
        writer.write(segment(number))
    all_there.wait()
    os.kill(os.getpid(), signal.SIGKILL)


def poke(path: Path, offset: int, value: int, kind: str = "Q") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(kind, value))


def slot_bytes() -> int:
    return ring_bytes(W, 2, SLOT_TOKENS) - ring_bytes(W, 1, SLOT_TOKENS)


def slot_offset(index: int) -> int:
    """Of a slot in the file. It begins with its sequence number, the checksum and the fields."""
    return ring_bytes(W, 1, SLOT_TOKENS) + (index - 1) * slot_bytes()
