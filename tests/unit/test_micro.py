"""Micro-steps: their size follows the time that they take, and every sample is in every epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from tlt_verl.drafter.packing import Sample
from tlt_verl.spot.micro import Packs, StepSize

LIMIT_S, PLANNED_S = 0.05, 0.03
LOOK = 16  # steps that are looked back on before a step grows


def feed(size: StepSize, seconds: float, steps: int) -> list[bool]:
    return [size.observe(size.rows, seconds) for _ in range(steps)]


# --- the size of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "rows"), [(2048, 128), (100, 100), (1, 1)])
def test_it_begins_small(most, rows):
    assert StepSize(LIMIT_S, most).rows == rows


@pytest.mark.parametrize("arguments", [(0, 10), (-1, 10), (float("nan"), 10), (0.05, 0)])
def test_arguments_that_are_not_positive_are_refused(arguments):
    with pytest.raises(ValueError, match=f"seconds and most_rows: got {arguments[0]} and {arguments[1]}"):
        StepSize(*arguments)


def test_a_step_that_takes_as_long_as_planned_stays():
    size = StepSize(LIMIT_S, 2048)
    assert not any(feed(size, PLANNED_S, 100))
    assert (size.rows, size.over) == (128, 0)


def test_a_slow_step_shrinks_the_next_in_proportion():
    size = StepSize(LIMIT_S, 2048)
    assert size.observe(128, 1.5 * PLANNED_S)
    assert size.rows == 64, "85, in whole units of 32"
    assert size.over == 0, "it was above what is planned, and within the bound"


def test_the_proportion_is_that_of_the_rows_that_it_had():
    """A pack is not always full."""
    size = StepSize(LIMIT_S, 2048)
    size.observe(112, 1.7 * PLANNED_S)
    assert size.rows == 64


def test_one_step_shrinks_it_to_a_quarter_at_most_and_never_below_the_least():
    size = StepSize(LIMIT_S, 2048)
    while size.rows < 1000:
        feed(size, PLANNED_S / 2, 1)
    rows = size.rows
    assert size.observe(rows, 100.0)
    assert size.rows == rows // 4 // 32 * 32
    feed(size, 100.0, 20)
    assert size.rows == 32
    assert not size.observe(32, 100.0), "packs of this size are already cut"
    assert size.over == 22
    few = StepSize(LIMIT_S, 20)
    feed(few, 100.0, 20)
    assert few.rows == 20


def test_it_grows_by_a_quarter_when_all_of_the_last_steps_were_quick():
    size = StepSize(LIMIT_S, 2048)
    assert feed(size, PLANNED_S / 2, LOOK) == [False] * (LOOK - 1) + [True]
    assert size.rows == 160
    assert not any(feed(size, PLANNED_S / 2, LOOK - 1)), "and looks at as many anew"
    assert feed(size, PLANNED_S / 2, 1) == [True]
    assert size.rows == 192, "200, in whole units"


def test_one_longer_step_among_the_last_keeps_it_from_growing():
    size = StepSize(LIMIT_S, 2048)
    feed(size, 0.9 * PLANNED_S, 1)
    assert not any(feed(size, PLANNED_S / 10, LOOK - 1))
    assert feed(size, PLANNED_S / 10, 1) == [True], "until it is one of the last no more"


def test_it_never_grows_above_the_most():
    size = StepSize(LIMIT_S, 300)
    feed(size, PLANNED_S / 100, 50 * LOOK)
    assert size.rows == 300
    assert not any(feed(size, PLANNED_S / 100, 3 * LOOK))


def machine(fixed_s: float, row_s: float) -> Callable[[int], float]:
    return lambda rows: fixed_s + row_s * rows


@pytest.mark.parametrize("row_s", [1e-5, 1e-4, 4e-4])
def test_it_settles_where_the_time_allows_and_comes_back_when_the_machine_changes(row_s):
    size = StepSize(LIMIT_S, 4096)
    quick, slow = machine(0.004, row_s), machine(0.004, 4 * row_s)
    for _ in range(50 * LOOK):
        size.observe(size.rows, quick(size.rows))
    assert 0.5 * PLANNED_S < quick(size.rows) <= PLANNED_S
    over = size.over
    for _ in range(4):
        size.observe(size.rows, slow(size.rows))
    assert slow(size.rows) <= max(LIMIT_S, slow(32)), "four steps later it is within its time again"
    assert size.over <= over + 4 or slow(32) > LIMIT_S
    for _ in range(50 * LOOK):
        size.observe(size.rows, quick(size.rows))
    assert 0.5 * PLANNED_S < quick(size.rows) <= PLANNED_S


# --- packs ------------------------------------------------------------------------------------------------------------


def sample(number: int, T: int, prompt_len: int = 2) -> Sample:
    """Every feature says the sample and the position."""
    features = torch.stack([torch.full((T,), float(number)), torch.arange(T, dtype=torch.float32)], dim=1)
    return Sample(torch.zeros(T, dtype=torch.int64), features, prompt_len)


def rows_of(members: list[Sample]) -> list[tuple[float, float]]:
    """The rows that are learnt from: of which sample, and at which position."""
    return [tuple(f) for s in members for f in s.features[s.first_wanted : s.rows].tolist()]


def epoch(packs: Packs, max_rows: int) -> list[list[Sample]]:
    """All packs of the epoch that begins with the next one."""
    found, number = [packs.next(max_rows)], packs.epochs
    while packs.epochs == number:
        found.append(packs.next(max_rows))
    packs.cut_anew()  # the last one is of the next epoch
    return found[:-1]


SAMPLES = [sample(number, T) for number, T in enumerate((9, 40, 3, 17, 64, 25, 33, 12))]
WANTED = sorted((float(n), float(p)) for n, s in enumerate(SAMPLES) for p in range(s.first_wanted, s.rows))


@pytest.mark.parametrize("max_rows", [20, 64, 1000])
def test_every_row_is_learnt_from_once_in_every_epoch(max_rows):
    packs = Packs(seed=0)
    packs.replace(SAMPLES)
    orders = []
    for _ in range(3):
        found = epoch(packs, max_rows)
        assert all(sum(s.rows for s in members) <= max_rows for members in found)
        orders.append([row for members in found for row in rows_of(members)])
        assert sorted(orders[-1]) == WANTED
    assert orders[0] != orders[1] != orders[2], "each in an order of its own"


def test_the_order_is_the_seeds():
    def first(seed: int) -> list[tuple[float, float]]:
        packs = Packs(seed)
        packs.replace(SAMPLES)
        return rows_of(packs.next(1000))

    assert first(1) == first(1) != first(2)


def test_epochs_are_counted():
    packs = Packs(seed=0)
    packs.replace(SAMPLES[:2])
    assert packs.epochs == 0
    for number in range(1, 5):
        assert packs.next(1000) is not None and packs.epochs == number


def test_replaced_samples_are_the_next():
    packs = Packs(seed=0)
    packs.replace(SAMPLES)
    packs.next(20)
    packs.replace([sample(99, 10)])
    for _ in range(3):
        assert {number for number, _ in rows_of(packs.next(1000))} == {99.0}


def test_a_new_size_holds_from_the_next_pack_on():
    packs = Packs(seed=0)
    packs.replace([sample(0, 200)])
    assert sum(s.rows for s in packs.next(150)) <= 150
    packs.cut_anew()
    assert all(sum(s.rows for s in packs.next(40)) <= 40 for _ in range(10))


@pytest.mark.parametrize("samples", [(), (sample(0, 1),), (sample(0, 20, prompt_len=30),)])
def test_without_a_row_to_learn_from_there_is_no_pack(samples):
    packs = Packs(seed=0)
    packs.replace(samples)
    assert [packs.next(100) for _ in range(3)] == [None] * 3
    assert packs.epochs == 0
    packs.replace(SAMPLES)
    assert packs.next(100), "and there are again when a sample comes"


def test_a_sample_without_a_row_is_not_in_the_way_of_others():
    packs = Packs(seed=0)
    packs.replace([sample(0, 1), sample(1, 12), sample(2, 9, prompt_len=9)])
    seen = {
        number for members in itertools.islice(iter(lambda: packs.next(10), None), 6) for number, _ in rows_of(members)
    }
    assert 1.0 in seen and 0.0 not in seen
