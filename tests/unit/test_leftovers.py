"""Whatever ends a run, its guard leaves nothing of it on the node, and everything of others. No part is faked."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tlt_verl.shared_memory import guard, leftovers

SHM = Path("/dev/shm")

RUN = """
import os, signal, subprocess, sys, tempfile, time
from tlt_verl.shared_memory.leftovers import guard_run
name, how = sys.argv[1:]
early = tempfile.TemporaryDirectory(prefix="early")  # as a module makes one when it is imported
signal.signal(signal.SIGTERM, signal.SIG_DFL)
assert guard_run(grace_s=0.3)
assert tempfile.gettempdir() == os.environ["TMPDIR"]
os.makedirs(tempfile.mkdtemp() + "/deeper")
child = subprocess.Popen([sys.executable, "-Sc", '''
import mmap, os, signal, subprocess, sys, tempfile, time
if sys.argv[2] == "SIGINT":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
fd = os.open("/dev/shm/" + sys.argv[1], os.O_CREAT | os.O_RDWR, 0o600)
os.ftruncate(fd, 4096)
page = mmap.mmap(fd, 4096)
os.close(fd)
tempfile.mkstemp()
orphan = "(setsid sleep 60 &)"
subprocess.run(["sh", "-c", orphan], check=True)
print("ready", flush=True)
time.sleep(60)
''', name, how])
if how.startswith("SIG"):
    time.sleep(60)
time.sleep(2)
if how == "fails":
    raise ValueError("as a reward function does")
"""


@pytest.fixture
def shm_name():
    """A name that is free in /dev/shm; removed after the test."""
    name = f"test leftovers\n{uuid4().hex} (deleted)"
    yield name
    (SHM / name).unlink(missing_ok=True)


@pytest.fixture
def folder():
    """A temporary folder whose name leaves room for sockets, which pytest's does not."""
    path = Path(tempfile.mkdtemp(prefix="t"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def started():
    """A list of processes that are killed after the test."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(script: str, *arguments: str, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env={**os.environ, **(environment or {})}, text=True, **options)


def wait_until(is_so, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def processes_with(entry: str) -> list[psutil.Process]:
    """Those that have this in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if entry.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


@pytest.mark.parametrize("how", ["ends", "fails", "SIGTERM", "SIGINT", "SIGKILL"])
def test_nothing_of_a_run_stays(folder, shm_name, how):
    run = start(
        RUN,
        shm_name,
        how,
        environment={"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert run.stdout.readline() == "ready\n"
    (private,) = [path for path in folder.iterdir() if path.name.startswith("tlt-")]
    wait_until(lambda: len(processes_with(f"TMPDIR={private}")) >= 2)  # one may be on its way into another program
    family = processes_with(f"TMPDIR={private}")
    assert (SHM / shm_name).exists()
    time.sleep(1.5 * guard.LOOK_S)  # a file must have been seen while its maker lived
    if how.startswith("SIG"):
        os.killpg(run.pid, getattr(signal, how))  # as Ctrl-C reaches all of it; that child ignores it
    run.wait(15)
    wait_until(lambda: not any(process.is_running() for process in family))
    wait_until(lambda: not list(folder.iterdir()))
    assert not (SHM / shm_name).exists()
    errors = run.stderr.read()  # ends with the guard, which writes to it
    assert run.returncode == {"ends": 0, "fails": 1}.get(how, -getattr(signal, how, 0)), errors
    assert "could not" not in errors


def test_others_files_and_processes_stay(folder, shm_name, started):
    """Another run at the same time, a file that both hold, one that the user put into /dev/shm."""
    other_name, both, visible = f"{shm_name}other", f"{shm_name}both", f"{shm_name}visible"
    mine, theirs = folder / "mine", folder / "theirs"
    mine.mkdir(), theirs.mkdir()
    try:
        pipes = {"stdout": subprocess.PIPE, "start_new_session": True}
        other = start(RUN, other_name, "SIGKILL", environment={"TMPDIR": str(theirs)}, **pipes)
        started.append(other)
        run = start(RUN, shm_name, "SIGKILL", environment={"TMPDIR": str(mine)}, **pipes)
        started.append(run)
        assert other.stdout.readline() == run.stdout.readline() == "ready\n"
        holder = (
            "import sys, time; kept = [open(p, 'w+') for p in sys.argv[1:]]; print('ready', flush=True); time.sleep(60)"
        )
        fd = os.open(SHM / both, os.O_CREAT | os.O_RDWR, 0o600)
        (SHM / visible).touch(0o644)
        (private,) = mine.glob("tlt-*")
        mark = next(iter(processes_with(f"TMPDIR={private}"))).environ()[guard.MARK]
        started.append(
            start(holder, f"{SHM}/{both}", f"{SHM}/{visible}", environment={guard.MARK: mark}, stdout=subprocess.PIPE)
        )
        assert started[-1].stdout.readline() == "ready\n"
        time.sleep(2 * guard.LOOK_S)
        run.kill()
        wait_until(lambda: not (SHM / shm_name).exists())
        wait_until(lambda: not list(mine.iterdir()))
        assert started[-1].wait(15) in (-signal.SIGTERM, -signal.SIGKILL), "it carried the mark of the run"
        assert (SHM / both).exists() and (SHM / visible).exists()
        os.close(fd)
        assert other.poll() is None and (SHM / other_name).exists()
        (theirs_private,) = theirs.glob("tlt-*")
        assert len(processes_with(f"TMPDIR={theirs_private}")) >= 2
        other.kill()
        wait_until(lambda: not (SHM / other_name).exists() and not list(theirs.iterdir()))
    finally:
        for name in (other_name, both, visible):
            (SHM / name).unlink(missing_ok=True)


def test_a_number_that_was_given_to_another_process_is_left_alone(started):
    process = start("import time; time.sleep(60)")
    started.append(process)
    now = guard.status_of(process.pid).process
    earlier = now._replace(started=now.started - 1)
    assert guard.lives(now) and not guard.lives(earlier)
    guard.send(earlier, signal.SIGKILL)
    time.sleep(0.2)
    assert process.poll() is None
    guard.send(now, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    guard.send(now, signal.SIGKILL)
    assert not guard.lives(now)


def test_a_name_that_was_given_to_another_folder_is_left_alone(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    first = guard.file_of(folder)
    folder.rename(tmp_path / "first")
    folder.mkdir()
    guard.remove_folder(folder, first)
    assert folder.exists()
    guard.remove_folder(tmp_path / "first", first)
    assert not (tmp_path / "first").exists()
    guard.remove_folder(tmp_path / "first", first)  # again does no harm
    link = tmp_path / "link"
    link.symlink_to(folder)
    guard.remove_folder(link, guard.file_of(folder))
    assert folder.exists()


def test_odd_names_go_and_what_cannot_go_is_named(tmp_path, started):
    """The system's own folder cannot be emptied even by root; the guard says so and goes on to the next."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"a\nb", b"\xff\xfe", b"-rf", b" ", b"*"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).touch()
    (folder / "link").symlink_to(tmp_path)
    process = start("import time; time.sleep(60)")
    started.append(process)
    status = guard.status_of(process.pid).process
    command = [sys.executable, "-IS", guard.__file__, str(status.pid), str(status.started), "mark", "1"]
    with (tmp_path / "log").open("w") as log:
        subprocess.run([*command, f"/proc/{os.getpid()}/attr", folder], stderr=log, check=True)
    process.kill()
    process.wait()
    wait_until(lambda: not folder.exists())
    assert f"could not remove /proc/{os.getpid()}/attr" in (tmp_path / "log").read_text()
    assert (tmp_path / "log").exists()


def all_of_us() -> guard.Family:
    """This process with all that it starts from now on, as if it were a run."""
    return guard.Family(guard.status_of(os.getpid()).process, "no mark")


def test_who_was_given_a_members_number_is_no_member(started, monkeypatch):
    """The number of a process that has gone is a stranger's by now: neither it nor its children are the run's."""
    earlier = start("import time; time.sleep(60)")
    family = all_of_us()
    process = start("import time; time.sleep(60)")
    started += [earlier, process]
    family.look()
    assert process.pid in family and earlier.pid not in family, "only what it has started since then"
    real = guard.status_of

    def later(pid: int) -> guard.Status | None:
        status = real(pid)
        if status is None or pid not in (os.getpid(), process.pid):
            return status
        return status._replace(process=status.process._replace(started=status.process.started + 1), parent=1)

    monkeypatch.setattr(guard, "status_of", later)
    family.look()
    assert process.pid not in family and os.getpid() not in family
    family.look(afresh=True)
    assert process.pid not in family


def test_fleeting_files_are_looked_at_only_when_the_run_has_ended(tmp_path):
    """torch's shared tensors come and go in every step; to ask for their holders each time would cost the run."""
    path = tmp_path / "torch_1_23_4"
    path.touch(0o600)
    family = all_of_us()
    files = guard.SharedFiles(family, tmp_path)
    later = tmp_path / "torch_1_23_5"
    later.touch(0o600)
    holder = subprocess.Popen(["sleep", "60"], stdin=later.open())
    family.look()
    files.look()
    files.remove()
    assert later.exists()
    files.look(closely=True)
    holder.kill()
    holder.wait()
    files.remove()
    assert [one.name for one in tmp_path.iterdir()] == [path.name], "what was there before stays"


def test_held_files_are_those_open_and_mapped(tmp_path):
    path = tmp_path / "page"
    path.write_bytes(bytes(4096))
    page = SHM / f"test-leftovers-{uuid4().hex}"
    script = (
        "import mmap, sys, time; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(1, flush=True); "
        "f.close() if len(sys.argv) > 2 else 0; print(2, flush=True); time.sleep(60)"
    )
    try:
        page.write_bytes(bytes(mmap.PAGESIZE))
        process = start(script, str(page), "close", stdout=subprocess.PIPE)
        process.stdout.readline(), process.stdout.readline()
        assert guard.holders_of({guard.file_of(page)}, SHM) == {guard.file_of(page): {process.pid}}
        process.kill()
        process.wait()
        assert guard.holders_of({guard.file_of(page)}, SHM) == {}
    finally:
        page.unlink()


GUARD_ONLY = """
import os, tempfile
from tlt_verl.shared_memory.leftovers import guard_run
print(guard_run(), guard_run(), tempfile.gettempdir(), os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"))
"""


def ask(environment: dict[str, str], script: str = GUARD_ONLY) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (guard.MARK, "RAY_TMPDIR", "TMPDIR")}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


def test_one_guard_a_run_and_rays_folder_stays_where_it_was(folder):
    first, second, private, ray, new = ask({"TMPDIR": str(folder)})
    assert (first, second) == ("True", "False")
    assert private == new and Path(private).parent == folder and ray == str(folder)
    assert ask({})[3] == "/tmp"
    assert ask({"RAY_TMPDIR": "/elsewhere"})[3] == "/elsewhere"
    wait_until(lambda: not list(folder.iterdir()))


def test_a_mark_of_a_run_that_has_ended_does_not_count():
    me = guard.status_of(os.getpid()).process
    assert ask({guard.MARK: f"{me.pid}-{me.started}"})[0] == "False", "a process of a guarded run"
    for mark in (f"{me.pid}-{me.started - 1}", "nonsense", ""):
        assert ask({guard.MARK: mark})[0] == "True"


def test_a_user_can_keep_everything_and_a_long_name_keeps_the_folder(tmp_path):
    assert ask({leftovers.SWITCH: "keep", "TMPDIR": str(tmp_path)}) == [
        "False",
        "False",
        str(tmp_path),
        "None",
        str(tmp_path),
    ]
    long = tmp_path / ("x" * 90)
    long.mkdir()
    first, _, folder, *_ = ask({"TMPDIR": str(long)})
    assert first == "True" and folder == str(long) and not list(long.iterdir())


def test_a_guard_that_cannot_start_fails_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv(guard.MARK, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    assert not leftovers.guard_run()
    assert "there is no guard" in caplog.text
    assert guard.MARK not in os.environ and os.environ["TMPDIR"] == str(tmp_path) and not list(tmp_path.iterdir())
