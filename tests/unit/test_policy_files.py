"""The policy's embedding and head in files: what comes back, what is thrown away, and what a full disk leaves."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_board import full_disk

from tlt_verl.policy_files import PolicyShare, read_share

V, H = 10, 6


class Engine:
    """What a scheduler has of the policy: its version and one rank's share of the two tensors."""

    def __init__(self, folder: Path, rank: int = 0, rows: int = V, tied: bool = False, dtype=torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(rank)
        self.embed = torch.randn(rows, H, generator=generator).to(dtype)
        self.head = self.embed if tied else torch.randn(rows, H, generator=generator).to(dtype)
        self.version, self.asked = 0, 0
        self.during: Callable[[], None] = lambda: None
        self.share = PolicyShare(folder, rank, lambda: self.version, self.tensors)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        self.during()
        return self.embed, self.head

    def write(self) -> None:
        assert self.share.begin() is True
        settle()


def settle() -> None:
    """Wait until nobody writes."""
    for thread in threading.enumerate():
        if thread.name == "tlt-policy-share":
            thread.join(30)
            assert not thread.is_alive()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_tensors_come_back_bit_for_bit(tmp_path, dtype):
    engine = Engine(tmp_path, dtype=dtype)
    engine.embed[0, 0], engine.embed[1, 1], engine.head[2, 2] = float("nan"), float("inf"), -0.0
    engine.write()
    embed, head = read_share(tmp_path, 0, ranks=1, vocab_size=V)
    assert embed.shape == head.shape == (V, H)
    assert same_bits(embed, engine.embed) and same_bits(head, engine.head)
    assert names(tmp_path) == ["policy-0-0.bin", "policy-0-0.json"]


def test_tied_tensors_are_written_once_and_stay_one(tmp_path):
    engine = Engine(tmp_path, tied=True)
    engine.write()
    assert (tmp_path / "policy-0-0.bin").stat().st_size == V * H * 2
    embed, head = read_share(tmp_path, 0, ranks=1, vocab_size=V)
    assert same_bits(embed, engine.embed) and embed.data_ptr() == head.data_ptr()


def test_parameters_and_views_of_any_layout_are_taken(tmp_path):
    engine = Engine(tmp_path)
    engine.embed = torch.nn.Parameter(torch.randn(H, V).bfloat16()).t()
    engine.head = torch.randn(2 * V, H).bfloat16()[::2]
    engine.write()
    embed, head = read_share(tmp_path, 0, ranks=1, vocab_size=V)
    assert same_bits(embed, engine.embed.detach()) and same_bits(head, engine.head)


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_are_joined_and_cut_at_the_vocabulary(tmp_path, tied):
    """Ranks share padded tables: 10 tokens are 6 rows on each."""
    engines = [Engine(tmp_path, rank, rows=6, tied=tied) for rank in range(2)]
    engines[0].write()
    assert read_share(tmp_path, 0, ranks=2, vocab_size=V) is None
    engines[1].write()
    embed, head = read_share(tmp_path, 0, ranks=2, vocab_size=V)
    assert same_bits(embed, torch.cat([engine.embed for engine in engines])[:V])
    assert same_bits(head, torch.cat([engine.head for engine in engines])[:V])


def test_what_was_read_stays_good_when_the_files_are_removed_or_the_policy_moves(tmp_path):
    engine = Engine(tmp_path)
    before = engine.embed.clone()
    engine.write()
    embed, _ = read_share(tmp_path, 0, ranks=1, vocab_size=V)
    engine.embed += 1
    engine.version = 1
    engine.write()
    assert names(tmp_path) == ["policy-1-0.bin", "policy-1-0.json"]
    assert same_bits(embed, before)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_version_is_written_once(tmp_path):
    engine = Engine(tmp_path)
    engine.write()
    engine.write()
    assert engine.asked == 1


def test_begin_does_not_wait_and_begins_nothing_while_one_writes(tmp_path):
    engine, go_on = Engine(tmp_path), threading.Event()
    engine.during = lambda: go_on.wait(30)
    assert engine.share.begin() and engine.share.begin()
    assert read_share(tmp_path, 0, ranks=1, vocab_size=V) is None
    go_on.set()
    settle()
    assert engine.asked == 1 and read_share(tmp_path, 0, ranks=1, vocab_size=V) is not None


def test_a_version_that_changes_while_it_is_written_is_thrown_away(tmp_path):
    engine = Engine(tmp_path)
    engine.write()

    def next_policy() -> None:
        engine.version = 2

    engine.version, engine.during = 1, next_policy
    engine.write()
    assert read_share(tmp_path, 1, ranks=1, vocab_size=V) is None
    assert read_share(tmp_path, 2, ranks=1, vocab_size=V) is None
    assert names(tmp_path) == ["policy-0-0.bin", "policy-0-0.json"]
    engine.during = lambda: None
    engine.write()
    assert names(tmp_path) == ["policy-2-0.bin", "policy-2-0.json"]


def test_older_versions_of_the_same_rank_are_removed_and_nothing_else(tmp_path):
    others = ["notes", "policy-0-1.bin", "policy-0-1.json", "policy-0-10.bin", "v7"]
    for name in (*others, "policy-0-0.bin", "policy-0-0.json", "policy-1-0.new", "policy-1-0.json.new"):
        (tmp_path / name).touch()
    engine = Engine(tmp_path)
    engine.version = 2
    engine.write()
    assert names(tmp_path) == sorted([*others, "policy-2-0.bin", "policy-2-0.json"])


def test_another_version_than_was_asked_for_is_not_given(tmp_path):
    Engine(tmp_path).write()
    assert read_share(tmp_path, 1, ranks=1, vocab_size=V) is None
    assert read_share(tmp_path / "nowhere", 0, ranks=1, vocab_size=V) is None


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_logged_and_leaves_nothing_that_could_be_read(tmp_path, caplog):
    engine = Engine(tmp_path)
    engine.write()
    engine.version = 1
    with full_disk(2 * V * H * 2 - 1):
        engine.write()
    [record] = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "could not be written" in record.getMessage() and record.exc_info
    assert read_share(tmp_path, 1, ranks=1, vocab_size=V) is None
    assert not list(tmp_path.glob("policy-1-0.bin")) and not list(tmp_path.glob("policy-1-0.json"))
    assert read_share(tmp_path, 0, ranks=1, vocab_size=V) is not None, "the version before is still whole"
    engine.write()
    assert names(tmp_path) == ["policy-1-0.bin", "policy-1-0.json"], "with room again it is written"


def test_a_folder_that_is_not_there_is_logged(tmp_path, caplog):
    Engine(tmp_path / "nowhere").write()
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("name", ["policy-0-0.bin", "policy-0-0.json"])
def test_a_damaged_file_is_an_error_and_no_tensor(tmp_path, name):
    Engine(tmp_path).write()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, OSError)):
        read_share(tmp_path, 0, ranks=1, vocab_size=V)


def test_tensors_that_the_next_version_removes_between_two_looks_are_not_there(tmp_path):
    """Its writer removes the two files one after the other, in any order."""
    Engine(tmp_path).write()
    (tmp_path / "policy-0-0.bin").unlink()
    with contextlib.suppress(OSError):
        assert read_share(tmp_path, 0, ranks=1, vocab_size=V) is None


def test_readers_beside_a_writer_find_all_of_a_version_or_nothing(tmp_path):
    engine, found, stop = Engine(tmp_path), 0, time.monotonic() + 1.0
    while time.monotonic() < stop:
        engine.version += 1
        engine.embed.fill_(engine.version)
        engine.head.fill_(-engine.version)
        engine.share.begin()
        share = None
        while share is None:
            share = read_share(tmp_path, engine.version, ranks=1, vocab_size=V)
        embed, head = share
        assert bool((embed == engine.embed).all()) and bool((head == engine.head).all())
        settle()
        found += 1
    assert found > 1
