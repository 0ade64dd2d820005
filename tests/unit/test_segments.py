"""The ring of segments: every field comes back bit for bit, in order, and what was lost is counted, never guessed.

A reader that returned a segment half of one lap and half of another would train the drafter on hidden states of other
tokens, and nothing would show it.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from segment_rings import (
    COUNT_OFFSET,
    SLOT_TOKENS,
    SLOTS,
    W,
    bits,
    dead_ring,
    new_writer,
    numbers,
    poke,
    private_folder,
    segment,
    slot_offset,
)

from tlt_verl.segments import LAYOUT_VERSION, SegmentReader, ring_bytes


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


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 1, SLOT_TOKENS])
def test_every_field_comes_back_bit_for_bit(writer, reader, T):
    every_bit = torch.randint(-(1 << 15), 1 << 15, (T, W), generator=torch.Generator().manual_seed(0))
    written = segment(
        0,
        T,
        policy_version=(1 << 63) - 1,
        request_id="é" * 32,  # 64 bytes
        prompt_id=(1 << 64) - 1,
        start=(1 << 63) - 1,
        prompt_len=0,
        final=True,
        tokens=torch.full((T,), -(1 << 31), dtype=torch.int32),
        hidden=every_bit.to(torch.int16).view(torch.bfloat16),  # NaNs with payloads, subnormals, infinities
        logprobs=torch.tensor([float("nan"), 0.0, -0.0, float("-inf"), -1.5])[:T].half(),
    )
    writer.write(written)
    [read] = reader.poll()
    assert bits(read) == bits(written)
    assert (read.tokens.dtype, read.hidden.dtype, read.logprobs.dtype) == (torch.int32, torch.bfloat16, torch.float16)
    assert read.hidden.shape == (T, W)
    assert isinstance(read.final, bool)


def test_tensors_of_any_layout_are_taken_and_the_reader_has_copies(writer, reader):
    wide = torch.randn(W, 3).bfloat16()
    writer.write(segment(0, hidden=wide.t().requires_grad_(), tokens=torch.arange(6, dtype=torch.int32)[::2]))
    [read] = reader.poll()
    for number in range(1, 2 * SLOTS):  # over it
        writer.write(segment(number))
    assert torch.equal(read.hidden, wide.t())
    assert read.tokens.tolist() == [0, 2, 4]
    read.hidden.add_(1)  # its own memory


def test_segments_come_once_in_order_and_as_many_as_asked_for(writer, reader):
    assert reader.poll() == []
    for number in range(3):
        writer.write(segment(number))
    assert reader.poll(most=0) == []
    assert numbers(reader.poll(most=2)) == [0, 1]
    assert numbers(reader.poll(most=2)) == [2]
    assert reader.poll() == []
    assert (reader.read, reader.lost, reader.torn) == (3, 0, 0)


def test_written_segments_and_bytes_are_counted(writer):
    for number in range(SLOTS + 2):
        writer.write(segment(number))
    assert (writer.written, writer.overwritten) == (SLOTS + 2, 2)
    payload = 3 * (4 + 2 + 2 * W)
    fields, rest = divmod(writer.bytes, writer.written)
    assert rest == 0
    assert 0 < fields - payload <= 128


# --- what is lost -----------------------------------------------------------------------------------------------------


def test_a_lapped_reader_goes_on_at_the_oldest_and_counts_what_it_lost(writer, reader):
    for number in range(3 * SLOTS + 1):
        writer.write(segment(number))
    assert numbers(reader.poll()) == list(range(2 * SLOTS + 1, 3 * SLOTS + 1))
    assert (reader.read, reader.lost, reader.torn) == (SLOTS, 2 * SLOTS + 1, 0)


def test_a_late_reader_begins_at_the_oldest_and_has_lost_nothing(writer):
    for number in range(SLOTS + 2):
        writer.write(segment(number))
    with contextlib.closing(SegmentReader(writer.path)) as late:
        assert numbers(late.poll()) == list(range(2, SLOTS + 2))
        assert late.lost == 0


def test_readers_do_not_know_of_each_other(writer, reader):
    with contextlib.closing(SegmentReader(writer.path)) as other:
        writer.write(segment(0))
        assert numbers(reader.poll()) == [0]
        for number in range(1, SLOTS + 2):
            writer.write(segment(number))
        assert numbers(other.poll()) == list(range(2, SLOTS + 2))
        assert numbers(reader.poll()) == list(range(2, SLOTS + 2))
        assert (reader.lost, other.lost) == (1, 2)


def test_a_ring_of_one_slot_holds_the_newest(folder):
    with (
        contextlib.closing(new_writer(folder, slots=1)) as writer,
        contextlib.closing(SegmentReader(writer.path)) as reader,
    ):
        writer.write(segment(0))
        assert numbers(reader.poll()) == [0]
        writer.write(segment(1))
        writer.write(segment(2))
        assert numbers(reader.poll()) == [2]
        assert reader.lost == 1


def test_a_slot_that_is_being_written_is_waited_for(writer, reader):
    writer.write(segment(0))
    writer.write(segment(1))
    whole = 2 * 1 + 2
    poke(writer.path, slot_offset(1), whole - 1)
    assert numbers(reader.poll()) == [0]
    poke(writer.path, slot_offset(1), whole)
    assert numbers(reader.poll()) == [1]
    assert (reader.lost, reader.torn) == (0, 0)


def test_a_slot_that_its_writer_did_not_finish_is_given_up_when_it_is_dead(folder):
    path = dead_ring(folder, written=SLOTS)
    poke(path, slot_offset(0), 2 * SLOTS + 1)  # it had begun record SLOTS, over record 0
    with contextlib.closing(SegmentReader(path)) as reader:
        assert numbers(reader.poll()) == list(range(1, SLOTS))
        assert reader.poll() == []
        assert (reader.read, reader.lost, reader.torn) == (SLOTS - 1, 1, 1)


def test_a_record_that_was_whole_but_not_yet_counted_is_read(folder):
    path = dead_ring(folder, written=3)
    poke(path, COUNT_OFFSET, 2)
    with contextlib.closing(SegmentReader(path)) as reader:
        assert numbers(reader.poll()) == [0, 1, 2]
        assert reader.torn == 0


CHECKSUM, NUMBER, PROMPT_LEN, LENGTH, FINAL, REQUEST_ID, HIDDEN = 8, 16, 48, 56, 60, 64, 128  # in a slot
TOKEN_IDS = HIDDEN + 2 * SLOT_TOKENS * W
LAST_HIDDEN, LAST_LOGPROB = HIDDEN + 2 * 3 * W - 1, TOKEN_IDS + 4 * SLOT_TOKENS + 2 * 3 - 1


@pytest.mark.parametrize(
    "offset",
    [CHECKSUM, NUMBER, PROMPT_LEN, LENGTH, FINAL, REQUEST_ID, HIDDEN, LAST_HIDDEN, TOKEN_IDS, LAST_LOGPROB],
)
def test_a_changed_byte_is_torn(writer, reader, offset):
    for number in range(3):
        writer.write(segment(number))
    with writer.path.open("r+b") as file:
        file.seek(slot_offset(1) + offset)
        [byte] = file.read(1)
    poke(writer.path, slot_offset(1) + offset, byte ^ 0x40, "B")
    assert numbers(reader.poll()) == [0, 2]
    assert (reader.read, reader.lost, reader.torn) == (2, 0, 1)


def test_a_record_of_another_lap_under_this_laps_number_is_torn(folder):
    """What a machine with weaker ordering than x86 could show: the number is there, the record not yet."""
    with (
        contextlib.closing(new_writer(folder, slots=1)) as writer,
        contextlib.closing(SegmentReader(writer.path)) as reader,
    ):
        writer.write(segment(0))
        assert numbers(reader.poll()) == [0]
        poke(writer.path, COUNT_OFFSET, 2)
        poke(writer.path, slot_offset(0), 2 * 1 + 2)
        assert reader.poll() == []
        assert (reader.read, reader.lost, reader.torn) == (1, 0, 1)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"request_id": "é" * 32 + "x"}, "longer than 64 bytes"),
        ({"prompt_id": 1 << 64}, "prompt_id 18446744073709551616"),
        ({"prompt_id": -1}, "prompt_id -1"),
        ({"policy_version": -1}, "policy_version -1"),
        ({"start": 1 << 63}, "start"),
        ({"prompt_len": -2}, "prompt_len -2"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens is torch.int64"),
        ({"hidden": torch.zeros(3, W)}, "hidden is torch.float32"),
        ({"hidden": torch.zeros(2, W, dtype=torch.bfloat16)}, "for 3 tokens"),
        ({"hidden": torch.zeros(3, dtype=torch.bfloat16)}, "2 dimension"),
        ({"logprobs": torch.zeros(4, dtype=torch.float16)}, "logprobs is"),
        ({"logprobs": torch.zeros(3, dtype=torch.float16, device="meta")}, "on the CPU"),
    ],
)
def test_a_segment_that_is_none(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        segment(0, **fields)


def test_a_segment_that_the_ring_has_no_place_for(writer, reader):
    with pytest.raises(ValueError, match=f"{SLOT_TOKENS + 1} tokens, slot_tokens is {SLOT_TOKENS}: split it"):
        writer.write(segment(0, SLOT_TOKENS + 1))
    with pytest.raises(ValueError, match=f"width 5, hidden_width is {W}"):
        writer.write(segment(0, hidden=torch.zeros(3, 5, dtype=torch.bfloat16)))
    assert writer.written == 0
    writer.write(segment(1))
    assert numbers(reader.poll()) == [1]


@pytest.mark.parametrize("name", ["", "a/b", "a\0b"])
def test_a_name_that_is_no_files(folder, name):
    with pytest.raises(ValueError, match="ring name"):
        new_writer(folder, name)


def test_a_ring_without_slots(folder):
    with pytest.raises(ValueError, match="slots 0 is not a positive"):
        new_writer(folder, slots=0)


def test_another_layout_version_and_other_files_are_refused(folder, writer):
    poke(writer.path, 8, LAYOUT_VERSION + 1, "I")
    with pytest.raises(ValueError, match=f"layout {LAYOUT_VERSION + 1}, not {LAYOUT_VERSION}"):
        SegmentReader(writer.path)
    poke(writer.path, 8, LAYOUT_VERSION, "I")
    poke(writer.path, 0, 0)
    with pytest.raises(ValueError, match="not a ring"):
        SegmentReader(writer.path)
    other = folder / "other"
    other.write_bytes(b"TLT RING")
    with pytest.raises(ValueError, match="not a ring"):
        SegmentReader(other)
    other.unlink()
    with pytest.raises(FileNotFoundError):
        SegmentReader(other)


def test_a_truncated_ring_is_refused_before_it_is_mapped(writer):
    os.truncate(writer.path, ring_bytes(W, SLOTS, SLOT_TOKENS) - 1)
    with pytest.raises(ValueError, match="truncated"):
        SegmentReader(writer.path)


def test_closed_ends_say_so(folder):
    writer = new_writer(folder)
    reader = SegmentReader(writer.path)
    for end in (writer, reader, writer, reader):
        end.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(segment(0))
    with pytest.raises(ValueError, match="closed"):
        reader.poll()
    assert not reader.writer_alive()
