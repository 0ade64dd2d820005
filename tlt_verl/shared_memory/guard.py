"""Ends what outlives a run on its node and removes what it left, once the process that started the run has died.

Runs as a process of its own, from this file, with the standard library alone:

    python -IS guard.py PID STARTED MARK GRACE_S [FOLDER...]

It lives in a session of its own, as nobody's child, and ignores the signals that end a run; `kill -9` ends it, and then
nothing is cleaned up. A process is the run's if it carries the run's mark in its environment or descends from one that
does, or from the process that started the run, since then. A file in /dev/shm is the run's if it is new, private to the
user (mode 0600, as the system's calls for shared memory make it) and only the run's processes have ever been seen to
hold it. Every process is known by its number and its start time, every file by its device and inode: a number or a name
that was given to another later is left alone.

Does not see a file in /dev/shm whose process dies within a second of making it, nor anything on other nodes.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MARK = "TLT_RUN"
"""The variable that a run's processes inherit; its value names the process that started the run."""
SHM = Path("/dev/shm")
LOOK_S = 1.0
"""Between two looks at the processes and at /dev/shm, while the run goes on."""
ASK_S = 3.0
"""Between SIGTERM and SIGKILL, and between SIGKILL and giving up."""
_AFRESH = 30  # looks after which a process that was another's is looked at again: its number may be a new one's
_TRIES = 3  # looks for the holder of a new file: it is mapped a moment after it is made
_FLEETING = re.compile(r"torch_\d+_\d+_\d+|plasma\w*")  # by the hundred, and removed by their makers


class Process(NamedTuple):
    """One process, whatever is called by its number later."""

    pid: int
    started: int
    """In clock ticks since the machine started."""


class File(NamedTuple):
    """One file or folder, whatever is called by its name later."""

    device: int
    inode: int


class Status(NamedTuple):
    """What the system says of a process."""

    process: Process
    parent: int
    is_zombie: bool


def status_of(pid: int) -> Status | None:
    """Reads a process's status; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Status(Process(pid, int(fields[19])), int(fields[1]), fields[0] in "ZX")


def lives(process: Process) -> bool:
    """Whether it has not ended; one that only waits for its parent's notice has."""
    status = status_of(process.pid)
    return status is not None and status.process == process and not status.is_zombie


def file_of(path: Path | str, *, follow: bool = False) -> File:
    """The file of this name.

    Raises:
        OSError: there is none.
    """
    found = os.stat(path, follow_symlinks=follow)
    return File(found.st_dev, found.st_ino)


def all_pids() -> list[int]:
    """Every process that this one can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def say(text: str) -> None:
    """Writes a line to the run's standard error, whose reader may be gone."""
    with contextlib.suppress(OSError):
        print(f"tlt: {text}", file=sys.stderr, flush=True)


class Family:
    """The processes of a run.

    Args:
        first: the process that started it; not counted among the living.
        mark: what the others carry in their environment.
    """

    def __init__(self, first: Process, mark: str) -> None:
        self._first, self._entry = first, f"{MARK}={mark}".encode()
        self._members: dict[int, Process] = {first.pid: first}
        self._others: set[int] = set()
        self._before = {status.process for pid in all_pids() if (status := status_of(pid))} - {first}
        self._looks = 0

    def look(self, *, afresh: bool = False) -> None:
        """Finds processes that are new since the last look, and forgets those that have gone.

        Args:
            afresh: looks again at those that did not belong to the run; otherwise that is done now and then.
        """
        pids = set(all_pids())
        self._looks += 1
        self._others = set() if afresh or self._looks % _AFRESH == 0 else self._others & pids
        statuses = [status for pid in pids - self._others if (status := status_of(pid))]
        self._members = {one.pid: one for one, *_ in statuses if self._members.get(one.pid) == one}
        for status in sorted(statuses, key=lambda status: status.process.started):  # a parent before its children
            one = status.process
            if one.pid not in self._members and self._is_member(status):
                self._members[one.pid] = one
        self._others = {one.pid for one, *_ in statuses if one.pid not in self._members} | self._others

    def _is_member(self, status: Status) -> bool:
        if status.process.pid == os.getpid() or status.process in self._before:
            return False
        if status.parent in self._members:
            return True
        try:
            return self._entry in Path(f"/proc/{status.process.pid}/environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            return False

    def __contains__(self, pid: int) -> bool:
        return pid in self._members

    def living(self) -> list[Process]:
        """Those that have not ended, without the first."""
        return [one for one in self._members.values() if one != self._first and lives(one)]


class SharedFiles:
    """The files that a run made in /dev/shm.

    Args:
        family: the run's processes.
        folder: where the system keeps shared memory.
    """

    def __init__(self, family: Family, folder: Path = SHM) -> None:
        self._family, self._folder = family, folder
        self._mine: dict[str, File] = {}
        self._tries: dict[tuple[str, File], int] = {}
        self._before = self._private_files()

    def look(self, *, closely: bool = False) -> None:
        """Finds out of new files whether they are the run's.

        Args:
            closely: asks for the holders of every file, also where that was given up, or the file is a fleeting one.
        """
        files = self._private_files()
        known = set(self._mine.items()) | self._before
        unknown = [one for one in files - known if closely or self._is_worth_a_look(*one)]
        self._mine = {name: file for name, file in self._mine.items() if (name, file) in files}
        self._tries = {one: count for one, count in self._tries.items() if one in files}
        if not unknown:
            return
        holders = holders_of({file for _, file in unknown}, self._folder)
        for name, file in unknown:
            self._tries[name, file] = self._tries.get((name, file), 0) + 1
            pids = holders.get(file, set())
            if pids and all(pid in self._family for pid in pids):
                self._mine[name] = file

    def _is_worth_a_look(self, name: str, file: File) -> bool:
        return self._tries.get((name, file), 0) < _TRIES and not _FLEETING.fullmatch(name)

    def _private_files(self) -> set[tuple[str, File]]:
        """Files of this user that no other may read."""
        found = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    private = stat.S_ISREG(info.st_mode) and not info.st_mode & 0o077 and info.st_uid == os.getuid()
                    if private:
                        found.add((entry.name, File(info.st_dev, info.st_ino)))
        return found

    def remove(self) -> None:
        """Removes the run's files that nobody holds any more."""
        files = self._private_files()
        left = {name: file for name, file in self._mine.items() if (name, file) in files}
        holders = holders_of(set(left.values()), self._folder) if left else {}
        for name, file in left.items():
            path = self._folder / name
            if pids := holders.get(file):
                say(f"{path} of the run that has ended is left: process {min(pids)} holds it")
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                say(f"could not remove {path} of the run that has ended: {error}")


def holders_of(files: set[File], folder: Path) -> dict[File, set[int]]:
    """Processes of this user that have one of these files of a folder open or mapped."""
    found: dict[File, set[int]] = {}
    for pid in all_pids():
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):  # another user's, or gone
            for file in held_files(pid, folder):
                if file in files:
                    found.setdefault(file, set()).add(pid)
    return found


def held_files(pid: int, folder: Path) -> Iterator[File]:
    """The files of a folder that a process has mapped or open. The folder's file system is one with device numbers."""
    start = os.fsencode(folder) + b"/"
    for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
        if start in line:
            device, inode = line.split(maxsplit=5)[3:5]
            major, minor = device.split(b":")
            yield File(os.makedev(int(major, 16), int(minor, 16)), int(inode))
    for name in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(FileNotFoundError):
            if os.fsencode(os.readlink(link)).startswith(start):
                yield file_of(link, follow=True)


@contextlib.contextmanager
def handle_of(process: Process) -> Iterator[int | None]:
    """A handle that stays this process's; None where the system has no such thing.

    Raises:
        ProcessLookupError: the number is nobody's.
    """
    fd = None
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        raise
    except OSError:  # a kernel before 5.3
        pass
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def wait_for_death(process: Process, watch: Iterator[None]) -> None:
    """Takes the next of `watch` at every look, until the process has ended."""
    with contextlib.suppress(ProcessLookupError), handle_of(process) as handle:
        while lives(process):
            next(watch)
            select.select([] if handle is None else [handle], [], [], LOOK_S)


def send(process: Process, number: signal.Signals) -> None:
    """Signals this process, and no later one with its number."""
    try:
        with handle_of(process) as handle:
            if not lives(process):
                return
            if handle is None:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass  # it has ended meanwhile
    except OSError as error:
        say(f"could not end process {process.pid} of the run that has ended: {error}")


def end(family: Family, files: SharedFiles, grace_s: float) -> None:
    """Waits for the run's processes to end, and ends those that do not.

    Args:
        grace_s: they have this long to end by themselves.
    """
    began = time.monotonic()
    steps = [(grace_s, signal.SIGTERM), (grace_s + ASK_S, signal.SIGKILL)]
    last_s, looked_s = grace_s + 2 * ASK_S, -1.0
    while True:
        family.look(afresh=True)
        passed_s = time.monotonic() - began
        if passed_s - looked_s > 0.5:
            files.look(closely=True)
            looked_s = passed_s
        living = family.living()
        if not living:
            return
        if passed_s > last_s:
            say(f"{len(living)} processes of the run that has ended cannot be ended: {_names(living)}")
            return
        if steps and passed_s > steps[0][0]:
            number = steps.pop(0)[1]
            say(f"{number.name} to {len(living)} processes that outlived their run: {_names(living)}")
            for one in living:
                send(one, number)
        elif not steps:  # those that were born meanwhile
            for one in living:
                send(one, signal.SIGKILL)
        time.sleep(0.2)


def _names(processes: Iterable[Process]) -> str:
    return ", ".join(f"{one.pid} {_name(one.pid)}" for one in processes)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "(gone)"


def remove_folder(path: Path, folder: File) -> None:
    """Removes a folder with all that is in it, unless another has its name by now."""
    errors: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        if file_of(path) == folder:
            shutil.rmtree(path, onerror=lambda _, name, error: errors.append(f"{name}: {error[1]}"))
    if errors:
        say(f"could not remove {path} of the run that has ended: {errors[0]}; {len(errors)} errors in all")


def main(arguments: list[str]) -> None:
    """Guards the run of a process until nothing of it is left."""
    first = Process(int(arguments[0]), int(arguments[1]))
    folders = {}
    for name in arguments[4:]:
        with contextlib.suppress(FileNotFoundError):
            folders[Path(name)] = file_of(name)
    family = Family(first, arguments[2])
    files = SharedFiles(family)
    if os.fork():
        os._exit(0)  # the run goes on, and this process is nobody's child
    os.chdir("/")
    Path("/proc/self/comm").write_text("tlt-guard")  # not python: `killall python` ends runs
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wait_for_death(first, watch(family, files))
    end(family, files, float(arguments[3]))
    files.remove()
    for path, folder in folders.items():
        remove_folder(path, folder)


def watch(family: Family, files: SharedFiles) -> Iterator[None]:
    """Looks at the processes and at /dev/shm whenever the next of it is taken."""
    while True:
        family.look()
        files.look()
        yield


if __name__ == "__main__":
    main(sys.argv[1:])
