"""The rings of a job: new ones are found, dead ones are read to their end and let go, what was lost is counted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from segment_rings import SLOTS, dead_ring, dead_rings, new_writer, numbers, poke, private_folder, segment, slot_offset

from tlt_verl.segments import find_rings
from tlt_verl.spot import rings as rings_module
from tlt_verl.spot.rings import Rings

ALL = 100


@pytest.fixture
def folder() -> Iterator[Path]:
    with private_folder() as path:
        yield path


@pytest.fixture
def rings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rings]:
    """Rings that look for new ones whenever they are polled."""
    monkeypatch.setattr(rings_module, "_LOOK_EVERY_S", 0.0)
    with contextlib.closing(Rings("job", folder)) as found:
        yield found


def writer(folder: Path, name: str = "job"):
    return contextlib.closing(new_writer(folder, name))


def test_where_there_is_no_ring_there_is_no_segment(rings, folder):
    assert rings.poll(ALL) == []
    assert Rings("job", folder / "nowhere").poll(ALL) == []


def test_segments_come_once_and_as_many_as_asked_for(rings, folder):
    with writer(folder) as one:
        for number in range(3):
            one.write(segment(number))
        assert numbers(rings.poll(2)) == [0, 1]
        assert numbers(rings.poll(2)) == [2]
        assert rings.poll(2) == []


def test_only_the_jobs_rings_are_read_and_all_of_them(rings, folder):
    with writer(folder, "job-a") as one, writer(folder, "job-b") as two, writer(folder, "other") as other:
        for number, each in enumerate((one, two, other, one)):
            each.write(segment(number))
        polls = [numbers(segments) for segments in iter(lambda: rings.poll(ALL), [])]
        assert sorted(polls) == [[0, 3], [1]], "one ring a poll, its segments in order"


def test_a_ring_that_comes_later_is_found(rings, folder):
    with writer(folder) as one:
        one.write(segment(0))
        assert numbers(rings.poll(ALL)) == [0]
        with writer(folder, "job-2") as two:
            two.write(segment(1))
            one.write(segment(2))
            assert sorted([*numbers(rings.poll(ALL)), *numbers(rings.poll(ALL))]) == [1, 2]


def test_the_folder_is_not_looked_at_in_every_poll(folder, monkeypatch):
    monkeypatch.setattr(rings_module, "_LOOK_EVERY_S", 3600.0)
    with contextlib.closing(Rings("job", folder)) as rings, writer(folder) as one:
        one.write(segment(0))
        assert numbers(rings.poll(ALL)) == [0], "the first poll always looks"
        with writer(folder, "job-2") as two:
            two.write(segment(1))
            assert rings.poll(ALL) == []
            monkeypatch.setattr(rings_module, "_LOOK_EVERY_S", 0.0)
            assert numbers(rings.poll(ALL)) == [1]


# --- writers that end -------------------------------------------------------------------------------------------------


def test_a_dead_writers_ring_is_read_to_its_end_and_then_dropped(rings, folder):
    path = dead_ring(folder, "job", written=SLOTS)
    assert numbers(rings.poll(SLOTS - 1)) == list(range(SLOTS - 1))
    assert path.exists(), "there is more in it"
    assert numbers(rings.poll(SLOTS - 1)) == [SLOTS - 1]
    assert rings.poll(ALL) == []
    assert not path.exists() and find_rings("job", folder) == []
    assert rings.poll(ALL) == []


def test_dead_rings_do_not_hide_a_living_one(rings, folder):
    dead_rings(folder, ["job-a", "job-b"], written=1)
    assert numbers(rings.poll(ALL)) == [0]
    assert numbers(rings.poll(ALL)) == [0]
    with writer(folder, "job-c") as living:
        living.write(segment(5))
        found = [number for segments in iter(lambda: rings.poll(ALL), []) for number in numbers(segments)]
        assert found == [5]
        assert find_rings("job", folder) == [living.path]


def test_what_a_writer_wrote_before_it_closed_is_not_lost(rings, folder):
    with writer(folder) as one:
        assert rings.poll(ALL) == []
        one.write(segment(0))
    assert numbers(rings.poll(ALL)) == [0]
    assert rings.poll(ALL) == []


def test_a_ring_that_goes_between_two_looks_is_no_error(rings, folder, monkeypatch):
    with writer(folder) as one:
        one.write(segment(0))
        gone = folder / "tlt-job.gone.ring"
        monkeypatch.setattr(rings_module, "find_rings", lambda prefix, folder: [gone, *find_rings(prefix, folder)])
        assert numbers(rings.poll(ALL)) == [0]


# --- what is lost -----------------------------------------------------------------------------------------------------


def test_what_was_overwritten_before_it_was_read_is_counted_over_all_rings(rings, folder):
    with writer(folder, "job-a") as one, writer(folder, "job-b") as two:
        assert rings.poll(ALL) == []
        for number in range(SLOTS + 2):
            one.write(segment(number))
        for number in range(SLOTS + 3):
            two.write(segment(number))
        polls = sorted(numbers(segments) for segments in iter(lambda: rings.poll(ALL), []))
        assert polls == [list(range(2, SLOTS + 2)), list(range(3, SLOTS + 3))]
        assert (rings.lost, rings.torn) == (5, 0)
    assert rings.poll(ALL) == []
    assert rings.lost == 5, "the count outlives the rings"


def test_what_a_killed_writer_left_unfinished_is_counted_and_the_rest_read(rings, folder):
    path = dead_ring(folder, "job", written=2)
    poke(path, slot_offset(1), 2 * 1 + 1)
    assert numbers(rings.poll(ALL)) == [0]
    assert rings.poll(ALL) == []
    assert (rings.lost, rings.torn) == (0, 1)
    assert not path.exists()


def test_a_file_that_is_no_ring_is_left_out_with_a_warning(rings, folder, caplog):
    bad = folder / "tlt-job.0.ring"
    with writer(folder) as one, caplog.at_level(logging.WARNING):
        bad.write_bytes(b"something else")  # what was there before, a new writer has removed
        one.write(segment(0))
        assert numbers(rings.poll(ALL)) == [0]
    assert f"a ring is left out: {bad} is not a ring of segments" in caplog.text
    bad.unlink()


def test_a_ring_that_is_left_out_is_said_once(rings, folder, caplog):
    bad = folder / "tlt-job.0.ring"
    bad.write_bytes(b"something else")
    for _ in range(5):
        rings.poll(ALL)
    bad.unlink()
    assert len(caplog.records) == 1


def test_closing_lets_go_of_all(folder):
    with writer(folder) as one:
        one.write(segment(0))
        rings = Rings("job", folder)
        assert numbers(rings.poll(1)) == [0]
        rings.close()
        rings.close()
        assert one.path.exists(), "its writer lives"
    assert rings.poll(ALL) == []
