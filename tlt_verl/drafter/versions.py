"""A folder of numbered versions, each of which is complete or not there, whatever happens to the one that writes it.

Knows names, renames and flushes; not what is in a version.

    <folder>/
        v11/  v12/        complete: the files were flushed to the disk before the folder got its name
        latest -> v12     follows in a second rename; until then it names the version before
        .tmp-*            unfinished, or on its way out; swept when the next writer starts
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tlt_verl.drafter.eagle import DrafterError

LATEST, UNFINISHED = "latest", ".tmp-"
_NAME = re.compile(r"v(0|[1-9]\d*)")


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest version in a folder, by its own name; None when there is none, or no such folder."""
    version = newest_version(Path(folder))
    return None if version is None else Path(folder) / f"v{version}"


def newest_version(folder: Path) -> int | None:
    """The highest version in a folder; None when there is none, or no such folder."""
    return max(_versions(folder), default=None)


def lock(folder: Path) -> int:
    """A file descriptor that keeps other writers away until it is closed, also by a crash.

    Raises:
        DrafterError: another writer has the folder.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise DrafterError(
            f"{folder} has a checkpoint writer already, in this process or another. Close it, or choose another folder."
        ) from None
    return fd


def sweep(folder: Path, keep: int) -> None:
    """Remove what a killed writer left, and let `latest` name the newest version. Only for who has the lock.

    Args:
        folder: of the versions.
        keep: how many stay, at least 1. A writer killed between a version's name and the removal of the oldest leaves
            one more.
    """
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    newest = latest(folder)
    if newest is not None and (folder / LATEST).resolve() != newest.resolve():
        _point_latest(folder, newest.name)
    _remove_all_but(folder, keep)


def add_version(folder: Path, version: int, write: Callable[[Path], None], keep: int) -> None:
    """Add a version, let `latest` name it, and remove all but the newest `keep`. Only for who has the lock.

    Args:
        folder: of the versions.
        version: one that is not there.
        write: puts the version's files into the folder that it is given. What it raises is passed on, and nothing of
            the version is left.
        keep: at least 1.
    """
    scratch = folder / f"{UNFINISHED}v{version}"
    try:
        scratch.mkdir()
        write(scratch)
        for path in [*scratch.iterdir(), scratch]:
            sync(path)
        scratch.rename(folder / f"v{version}")
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _point_latest(folder, f"v{version}")
    _remove_all_but(folder, keep)


@contextlib.contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A new folder to write, beside `out`, whose place it takes when the block ends; an older one stays until then.

    Nothing is flushed to the disk here. An error in the block leaves `out` as it was.
    """
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if out.exists():
            out.rename(Path(scratch, "old"))
        new.rename(out)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return [int(match[1]) for match in matches if match]


def _point_latest(folder: Path, name: str) -> None:
    sync(folder)  # the version's name is on the disk before the link is
    link = folder / f"{UNFINISHED}{LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(folder / LATEST)
    sync(folder)


def _remove_all_but(folder: Path, keep: int) -> None:
    for old in sorted(_versions(folder))[:-keep]:
        _remove(folder, f"v{old}")


def _remove(folder: Path, name: str) -> None:
    """Take away the name first, so that a folder with a name is complete also while its files go."""
    doomed = folder / f"{UNFINISHED}old-{name}"
    (folder / name).rename(doomed)
    shutil.rmtree(doomed)
