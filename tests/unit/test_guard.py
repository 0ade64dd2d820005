"""The tests' own guard: nothing of a command outlives it, however the command, its family or the test ends.

Real processes, in a session of their own, that ignore signals, become orphans, hold files in /dev/shm and outlive
their parents; the time that a process takes to die is not fixed, so every wait has a bound.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import guard
import psutil
import pytest

LONG_S = 60
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
FAMILY = f"""
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-S", "-c", {CHILD!r}], start_new_session=True)
file = Path("/dev/shm") / ("guard-" + sys.argv[1])
file.write_bytes(b"kept open")
held = file.open("rb")
holder = subprocess.Popen([sys.executable, "-S", "-c", {CHILD!r}], pass_fds=[held.fileno()])
print(child.pid, holder.pid, flush=True)
"""
"""Leaves a child in a session of its own, and one that holds a file in /dev/shm; its first argument names the file."""
STAYS, ENDS, FAILS = FAMILY + "\nchild.wait()", FAMILY, FAMILY + "\nsys.exit(3)"


def family(tmp_path: Path, script: str) -> tuple[guard.Guarded, list[psutil.Process]]:
    """A family that runs, and its members; each is found by a pid of this namespace."""
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-S", "-c", script, str(os.getpid())]
        running = guard.start(command, tmp_path / "left", environment=os.environ, stdout=out, stderr=out, settle_s=0.5)
    until(lambda: (tmp_path / "out").read_text().count("\n") == 1)
    return running, [psutil.Process(int(pid)) for pid in (tmp_path / "out").read_text().split()]


def until(condition) -> None:
    end = time.monotonic() + LONG_S / 2
    while not condition():
        assert time.monotonic() < end, "not within half a minute"
        time.sleep(0.02)


def gone(members: list[psutil.Process]) -> bool:
    return not any(map(lives, members))


def lives(member: psutil.Process) -> bool:
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_no_file() -> None:
    assert not (guard.SHM / f"guard-{os.getpid()}").exists()


@pytest.mark.parametrize(("script", "status"), [(ENDS, 0), (FAILS, 3)])
def test_what_outlives_a_command_is_named_and_ended(tmp_path, script, status):
    running, members = family(tmp_path, script)
    assert running.wait(LONG_S) == status
    assert gone(members)
    left = running.left()
    assert len(left["processes"]) == 2 and all("time.sleep(60)" in name for name in left["processes"])
    if guard.private_shm(guard.SIZE):
        assert left["shm"] == [f"guard-{os.getpid()}"]
    assert_no_file()


def test_a_command_that_leaves_nothing_says_so(tmp_path):
    with (tmp_path / "out").open("w") as out:
        running = guard.start(["true"], tmp_path / "left", environment=os.environ, stdout=out, stderr=out)
    assert running.wait(LONG_S) == 0 and running.left() == {"processes": [], "shm": []}


def test_a_test_may_end_a_command_early(tmp_path):
    running, members = family(tmp_path, STAYS)
    running.end()
    assert gone(members) and running.process.returncode == 137
    assert_no_file()


def test_a_signal_to_the_guard_ends_the_family(tmp_path):
    running, members = family(tmp_path, STAYS)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait(LONG_S) == 137 and gone(members)


ASKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import guard
folder = Path(sys.argv[2])
with (folder / "out").open("w") as out:
    running = guard.start(sys.argv[3:], folder / "left", environment=os.environ, stdout=out, stderr=out)
time.sleep(60)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_test_that_is_killed_takes_its_command_along(tmp_path, sign):
    helpers = str(Path(guard.__file__).parent)
    command = [sys.executable, "-S", "-c", STAYS, str(os.getpid())]
    asker = subprocess.Popen([sys.executable, "-S", "-c", ASKER, helpers, str(tmp_path), *command])
    until(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text().count("\n") == 1)
    members = [psutil.Process(int(pid)) for pid in (tmp_path / "out").read_text().split()]
    asker.send_signal(sign)
    asker.wait()
    until(lambda: gone(members))
    assert_no_file()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_dies_with_its_shell(tmp_path, sign):
    out = tmp_path / "out"
    session = [sys.executable, "-S", guard.__file__, "--session", sys.executable, "-S", "-c", STAYS, str(os.getpid())]
    shell = subprocess.Popen(["sh", "-c", f'"$@" >{out}; true', "sh", *session])
    until(lambda: out.exists() and out.read_text().count("\n") == 1)
    members = [psutil.Process(int(pid)) for pid in out.read_text().split()]
    shell.send_signal(sign)
    shell.wait()
    until(lambda: gone(members))
    assert_no_file()


def test_a_session_gives_its_commands_status(tmp_path):
    command = [sys.executable, "-S", guard.__file__, "--session", "sh", "-c", "exit 5"]
    assert subprocess.run(command, timeout=LONG_S, check=False).returncode == 5


ORPHANS = """
import os, subprocess, sys, time
for _ in range(3):
    subprocess.run(["sh", "-c", "sleep 0.2 & echo $!"], check=True)
sys.stdout.flush()
time.sleep(60)
"""


def test_orphans_that_have_ended_are_taken_notice_of(tmp_path):
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-S", "-c", ORPHANS]
        running = guard.start(command, tmp_path / "left", environment=os.environ, stdout=out, stderr=out)
    until(lambda: (tmp_path / "out").read_text().count("\n") == 3)
    pids = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert running.process.poll() is None
    running.end()
