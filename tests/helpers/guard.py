"""Runs a command for a test, and lets nothing of it outlive the test: no process, no shared memory.

As a script it is the command's parent: `guard.py REPORT SECONDS COMMAND...`. It ends when the command has ended and
nothing that came of it is left, or when the test's process, at the other end of its standard input, has died; then it
kills whatever descends from it. `start` puts it, where the system allows that, in front of a private /dev/shm, which is
gone with the last process. The report says what the command left when it ended by itself.

`guard.py --session COMMAND...` does the same for a whole session of tests, from a shell: it dies with the shell, and
says on standard error what the session left.

Knows processes and /dev/shm. Knows nothing of engines, Ray or verl.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

SHM = Path("/dev/shm")
SIZE = "12g"
"""Of a private /dev/shm: pages are taken as they are written."""
SETTLE_S = 10.0
"""That processes of a command may take to end by themselves after it."""
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans among our descendants become our children
_PRIVATE = 'mount -t tmpfs -o size="$1" tmpfs /dev/shm && shift && exec "$@"'


class Guarded:
    """A command that runs, with its guard.

    Args:
        process: the guard's.
        report: the file that it writes at the end.
    """

    def __init__(self, process: subprocess.Popen, report: Path) -> None:
        self.process, self._report = process, report

    @property
    def pid(self) -> int:
        """Of the command itself, as soon as there is one."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int((path.read_text().split() or ["0"])[0])

    def wait(self, timeout_s: float | None = None) -> int:
        """The command's exit status, when nothing of it is left.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Ends the command and all that came of it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(2 * SETTLE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def left(self) -> dict[str, list[str]]:
        """What the command left when it ended by itself: `shm`, names in its own /dev/shm, and `processes`, names."""
        return json.loads(self._report.read_text())


def start(
    command: Sequence[str],
    report: Path,
    *,
    environment: Mapping[str, str],
    stdout: IO[Any],
    stderr: IO[Any],
    cwd: Path | None = None,
    shm_size: str = SIZE,
    settle_s: float = SETTLE_S,
) -> Guarded:
    """Starts a command behind a guard that dies with this process."""
    guard = [sys.executable, "-S", __file__, str(report), str(settle_s), *command]
    process = subprocess.Popen(
        [*private_shm(shm_size), *guard],
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    return Guarded(process, report)


@functools.cache
def private_shm(size: str) -> tuple[str, ...]:
    """How a command is started that has a /dev/shm of its own, of this size; nothing where the system forbids that."""
    for unshare in (("unshare", "-m"), ("unshare", "-Urm")):
        command = (*unshare, "sh", "-c", _PRIVATE, "sh", size)
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True, timeout=20, check=False).returncode == 0:
                return command
    return ()


def main(report: Path | None, settle_s: float, command: list[str]) -> int:
    """Runs the command; its exit status, or 137 where it was ended. Without a report: for a session."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    if report is None:
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session has it, too, and ends by itself
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    before = set(os.listdir(SHM))
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    watched = [readable] if report is None else [0, readable]
    while child.poll() is None and not ended:
        ready, _, _ = select.select(watched, [], [])
        if readable in ready:
            os.read(readable, 512)
            reap_orphans(child.pid)
        if 0 in ready and not os.read(0, 512):
            ended.append(True)
    if ended:
        end_all()
        return 137
    names = await_all(settle_s)
    left = {"processes": names, "shm": sorted(set(os.listdir(SHM)) - before) if private(before) else []}
    if report is not None:
        report.write_text(json.dumps(left))
    elif any(left.values()):
        print(f"guard: the session left, and this ends: {left}", file=sys.stderr)
    end_all()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def private(before: set[str]) -> bool:
    """Whether /dev/shm was empty, as a private one is: otherwise what is new there may be another's."""
    return not before


def await_all(seconds: float) -> list[str]:
    """Waits until no descendant is left; the names of those that are, after so many seconds."""
    end = time.monotonic() + seconds
    while descendants() and time.monotonic() < end:
        reap()
        time.sleep(0.05)
    return sorted(name_of(pid) for pid in descendants())


def end_all() -> None:
    """Kills every descendant, and those that are born meanwhile, and removes what they had in /dev/shm."""
    held: set[Path] = set()
    while pids := descendants():
        for pid in pids:
            held |= held_shm(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        reap()
    for path in held:
        path.unlink(missing_ok=True)


def reap() -> None:
    """Takes notice of children that have ended, ours by birth or by their parents' death."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def reap_orphans(child: int) -> None:
    """Takes notice of the ends of all children but this one: an orphan that waits for that looks alive to a test."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == child:
            return
        os.waitpid(ended.si_pid, 0)


def descendants() -> list[int]:
    """All processes below this one that are not zombies."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := stat_of(int(entry))) and stat[0] != "Z":
            children.setdefault(int(stat[1]), []).append(int(entry))
    found, below = [], [os.getpid()]
    while below:
        more = children.get(below.pop(), [])
        found += more
        below += more
    return found


def stat_of(pid: int) -> list[str]:
    """State, parent and so on of a process; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def name_of(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:160]
    except OSError:
        return "gone"


def held_shm(pid: int) -> set[Path]:
    """The files in /dev/shm that a process has open or mapped."""
    paths = set()
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        paths |= {line.split(maxsplit=5)[-1] for line in lines if str(SHM) in line}
        paths |= {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    return {Path(path) for path in paths if path.startswith(f"{SHM}/") and not path.endswith("(deleted)")}


if __name__ == "__main__":
    if sys.argv[1] == "--session":
        own = [sys.executable, "-S", __file__, "--in-session", *sys.argv[2:]]
        command = [*private_shm(SIZE), *own]
        os.execvp(command[0], command)
    if sys.argv[1] == "--in-session":
        sys.exit(main(None, SETTLE_S, sys.argv[2:]))
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
