"""The page of a replica: its fields, who sees what is written, and what is no page."""

from __future__ import annotations

import mmap
import resource
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tlt_verl.board import ENGINE_FIELDS, SERVER_FIELDS, SHM, WORKER_FIELDS, Board, Phase, SpotState, now_ns

FIELDS = (*SERVER_FIELDS, *ENGINE_FIELDS, *WORKER_FIELDS)
WRITES = 20_000


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows above `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    child = get_context("fork").Process(target=target, args=arguments)
    child.start()
    try:
        yield child
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board.create("replica-0", tmp_path)


# --- fields -----------------------------------------------------------------------------------------------------------


def test_every_field_is_its_own_and_begins_at_zero(board: Board) -> None:
    assert set(board.values(FIELDS).values()) == {0}
    for number, name in enumerate(FIELDS, 1):
        setattr(board, name, number)
    assert board.values(FIELDS) == {name: number for number, name in enumerate(FIELDS, 1)}
    assert Board(board.path).values(FIELDS) == board.values(FIELDS)
    assert len(FIELDS) == len(set(FIELDS)), "every field has one writer"


@pytest.mark.parametrize("value", [0, -1, (1 << 63) - 1, -(1 << 63)])
def test_a_field_holds_64_bits_with_a_sign(board: Board, value: int) -> None:
    board.step = value
    assert board.step == value


def test_what_is_no_number_of_64_bits_leaves_the_field_alone(board: Board) -> None:
    board.trained_ns = 5
    for value in (1 << 63, 1.5, "x", None):
        with pytest.raises((TypeError, ValueError)):
            board.trained_ns = value
    assert board.trained_ns == 5


@pytest.mark.parametrize("name", ["request", "magic", "_words_", ""])
def test_an_unknown_field_cannot_be_written_and_the_known_ones_are_named(board: Board, name: str) -> None:
    with pytest.raises(AttributeError, match=f"no field {name}; its fields are requests, phase, .*share_wanted$"):
        setattr(board, name, 1)


def test_an_unknown_field_cannot_be_read(board: Board) -> None:
    with pytest.raises(AttributeError, match="no field request; its fields are requests, phase"):
        _ = board.request
    with pytest.raises(KeyError, match="request"):
        board.values(("requests", "request"))


def test_phases_and_states_go_in_as_they_are_and_come_out_as_numbers(board: Board) -> None:
    board.phase, board.state = Phase.POLICY, SpotState.YIELDING
    assert Phase(board.phase) is Phase.POLICY and SpotState(board.state) is SpotState.YIELDING


def test_the_clock_does_not_go_back() -> None:
    times = [now_ns() for _ in range(100)]
    assert times == sorted(times) and abs(times[-1] - time.monotonic_ns()) < 60e9


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_one_page_that_only_its_user_reads(board: Board, tmp_path: Path) -> None:
    [path] = tmp_path.iterdir()
    assert path == board.path == tmp_path / "tlt-replica-0.board"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == mmap.PAGESIZE


def test_a_dead_processes_page_is_replaced(board: Board, tmp_path: Path) -> None:
    board.requests = 7
    (tmp_path / "tlt-replica-0.board.new").write_bytes(b"of one that was killed while it made its page")
    new = Board.create("replica-0", tmp_path)
    assert new.requests == 0
    new.requests = 2
    assert board.requests == 7 and Board(new.path).requests == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tlt-replica-0.board"]


def test_a_page_that_is_gone_stays_good_for_who_has_it(board: Board) -> None:
    board.path.unlink()
    board.requests = 3
    assert board.requests == 3
    with pytest.raises(FileNotFoundError):
        Board(board.path)


@pytest.mark.parametrize("content", [b"", b"TLT", b"\0" * mmap.PAGESIZE, b"\0" * 2 * mmap.PAGESIZE])
def test_what_is_no_board_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is no board"):
        Board(path)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Board.create("replica-0", tmp_path / "nowhere")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_full_folder_is_an_error_and_leaves_nothing(tmp_path: Path, in_memory: bool) -> None:
    folder, name = (SHM, f"full-{tmp_path.name}") if in_memory else (tmp_path, "full")
    with full_disk(mmap.PAGESIZE - 1), pytest.raises(OSError):
        Board.create(name, folder)
    assert list(folder.glob(f"tlt-{name}*")) == []


# --- two processes ----------------------------------------------------------------------------------------------------


def answer(path: Path) -> None:
    """A worker that trains until a request comes."""
    board = Board(path)
    board.state = SpotState.TRAINING
    while board.requests == 0:
        time.sleep(0.001)
    board.yield_ns_last = now_ns() - board.needed_ns
    board.state = SpotState.BUSY


def test_two_processes_see_what_the_other_writes(board: Board) -> None:
    with process(answer, board.path) as child:
        while board.state != SpotState.TRAINING and child.is_alive():
            time.sleep(0.001)
        board.needed_ns = now_ns()
        board.requests = 1
    assert board.state == SpotState.BUSY
    assert 0 <= board.yield_ns_last < 60e9, "both read one clock"


def write_all_bits(path: Path) -> None:
    board = Board(path)
    for number in range(WRITES):
        board.trained_ns = -(number % 2)
    board.state = SpotState.BUSY


def test_a_reader_sees_the_old_value_or_the_new_one(board: Board) -> None:
    seen = set()
    with process(write_all_bits, board.path) as child:
        while board.state != SpotState.BUSY and child.is_alive():
            seen.add(board.trained_ns)
    assert seen <= {0, -1}
