"""The ring's file: its size is fixed, its lock tells a dead writer from a live one, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from segment_rings import (
    SLOT_TOKENS,
    SLOTS,
    W,
    dead_ring,
    dead_rings,
    new_writer,
    numbers,
    private_folder,
    segment,
)

from tlt_verl.segments import SHM, SegmentReader, SegmentWriter, find_rings, remove_stale, ring_bytes

CREATIONS = 400  # a remover comes between a file and its lock in one of some hundreds


@pytest.fixture
def folder():
    with private_folder() as path:
        yield path


@pytest.fixture
def writer(folder):
    with contextlib.closing(new_writer(folder)) as writer:
        yield writer


@pytest.fixture
def reader(writer):
    with contextlib.closing(SegmentReader(writer.path)) as reader:
        yield reader


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_rings_memory_is_reserved_private_and_does_not_grow(writer):
    before = writer.path.stat()
    assert stat.S_IMODE(before.st_mode) == 0o600
    assert before.st_size == ring_bytes(W, SLOTS, SLOT_TOKENS)
    assert before.st_blocks * 512 >= before.st_size
    for number in range(20 * SLOTS):
        writer.write(segment(number))
    after = writer.path.stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)


def test_a_folder_without_room_is_an_error_that_says_what_to_do(folder):
    """The limit on a file's size stands for a /dev/shm that is nearly full."""
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=create_under_a_limit, args=(folder, there))
    process.start()
    code, message = here.recv()
    process.join()
    assert code == errno.EFBIG
    for part in (str(folder), f"{ring_bytes(W, 1000, SLOT_TOKENS)} bytes", "fewer slots (tap.buffer_gb)", "--shm-size"):
        assert part in message


def create_under_a_limit(folder: Path, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        new_writer(folder, slots=1000)
    except OSError as error:
        answer.send((error.errno, str(error)))


# --- dead and alive ---------------------------------------------------------------------------------------------------


def test_a_writer_lives_until_it_closes_and_what_it_wrote_can_be_read_then(writer, reader):
    writer.write(segment(0))
    assert reader.writer_alive()
    writer.close()
    assert not writer.path.exists()
    assert not reader.writer_alive()
    assert numbers(reader.poll()) == [0]


def test_the_last_reader_of_a_dead_writer_takes_the_ring_away(folder):
    path = dead_ring(folder, written=2)
    with contextlib.closing(SegmentReader(path)) as reader:
        assert not reader.writer_alive()
        assert numbers(reader.poll()) == [0, 1]
        assert path.exists()
    assert not path.exists()


def test_a_reader_of_a_live_writer_leaves_it_its_ring(writer, reader):
    reader.close()
    assert writer.path.exists()


def test_stale_rings_are_removed_and_live_ones_are_not(folder, writer):
    stale = dead_rings(folder, ["job-a", "job-b", "[j]"])
    half = folder / "tlt-job-c.ring.new"  # left by one that was killed before its ring had a name
    half.touch()
    for path in (folder / "tlt-job-d.ring", folder / "other.ring"):
        path.mkdir()  # neither is a ring
    assert find_rings("job-", folder) == stale[:2]
    assert find_rings(folder=folder) == sorted([*stale, writer.path])
    assert remove_stale("job-b", folder) == [stale[1]]
    assert remove_stale("[j", folder) == [stale[2]]
    assert remove_stale(folder=folder) == [stale[0], half]
    assert remove_stale(folder=folder) == []
    assert find_rings(folder=folder) == [writer.path]
    for path in (folder / "tlt-job-d.ring", folder / "other.ring"):
        path.rmdir()


def test_a_new_writer_removes_the_stale_rings(folder):
    stale = dead_rings(folder, ["a", "b"])
    with contextlib.closing(new_writer(folder, "c")) as writer:
        assert not any(path.exists() for path in stale)
        assert find_rings(folder=folder) == [writer.path]


def test_two_writers_of_one_name_have_a_ring_each(folder):
    with contextlib.closing(new_writer(folder)) as first, contextlib.closing(new_writer(folder)) as second:
        assert find_rings("ring", folder) == sorted([first.path, second.path])
        first.close()
        assert find_rings("ring", folder) == [second.path]


def test_a_ring_is_never_removed_while_it_is_created(folder):
    """Other processes remove stale rings all the time, and may see the file before its writer has locked it."""
    context = get_context("fork")
    done = context.Event()
    removers = [context.Process(target=remove_until, args=(folder, done)) for _ in range(2)]
    for remover in removers:
        remover.start()
    try:
        for _ in range(CREATIONS):
            with (
                contextlib.closing(new_writer(folder)) as writer,
                contextlib.closing(SegmentReader(writer.path)) as reader,  # so it is there
            ):
                writer.write(segment(0))
                assert numbers(reader.poll()) == [0]
                assert reader.writer_alive()
    finally:
        done.set()
        for remover in removers:
            remover.join()


def remove_until(folder: Path, done: Event) -> None:
    while not done.is_set():
        remove_stale(folder=folder)


def test_the_default_folder_is_shared_memory():
    name = f"test-{os.getpid()}"
    with contextlib.closing(SegmentWriter(name, hidden_width=W, slots=1, slot_tokens=1)) as writer:
        assert find_rings(name) == [writer.path]
        assert writer.path.parent == SHM == Path("/dev/shm")
    assert find_rings(name) == []
