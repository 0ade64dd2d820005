"""Lets nothing of a run stay on its node, however the run ends: by itself, by an error, or killed.

The process that starts a run starts a guard (`guard.py`), which outlives it, and gives the run a temporary folder of
its own: whatever the run's processes make with `tempfile`, or where TMPDIR says, goes with the run. What is a cache on
purpose stays where it was: Ray's sessions with their logs, and compiled kernels.

Only the node of that process is guarded. On other nodes, and where Ray was running before the run, the workers are not
the process's descendants and keep their temporary folder; each server of a replica then guards itself and its engine.
"""

from __future__ import annotations

import contextlib
import gc
import getpass
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tlt_verl.shared_memory import guard

logger = logging.getLogger(__name__)

SWITCH = "TLT_LEFTOVERS"
"""`keep` in this variable: nothing is guarded or removed."""
_SOCKET_PATH = 107  # bytes; the longest name of a Unix socket
_IN_FOLDER = 36  # bytes that SGLang, torch and wandb need below the temporary folder for theirs


def guard_run(*, own_folder: bool = True, grace_s: float = 5.0) -> bool:
    """Guards the run that this process starts, unless another guard already does. Never fails.

    Args:
        own_folder: the run's processes get a temporary folder of their own; this process's environment is changed.
        grace_s: after this process has ended, the others have this long to end by themselves.

    Returns:
        Whether a guard was started.
    """
    if os.environ.get(SWITCH) == "keep" or _is_guarded():
        return False
    try:
        _start(own_folder, grace_s)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("tlt: what this run leaves behind will not be removed, there is no guard: %s", error)
        return False
    return True


def _is_guarded() -> bool:
    """Whether the run that this process belongs to has a guard: its first process lives."""
    pid, _, started = os.environ.get(guard.MARK, "").partition("-")
    return pid.isdigit() and started.isdigit() and guard.lives(guard.Process(int(pid), int(started)))


def _start(own_folder: bool, grace_s: float) -> None:
    status = guard.status_of(os.getpid())
    if status is None:
        raise OSError("/proc does not show this process")
    pid, started = map(str, status.process)
    mark = f"{pid}-{started}"
    folder = _make_folder() if own_folder else None
    folders = [*_promised_folders(), *([] if folder is None else [folder])]
    try:
        _launch(pid, started, mark, str(grace_s), *map(str, folders))
    except BaseException:
        if folder is not None:
            folder.rmdir()
        raise
    os.environ[guard.MARK] = mark
    if folder is not None:
        _use(folder)


def _launch(*arguments: str) -> None:
    """Starts a guard, and returns when it has noted what there is."""
    subprocess.run(
        [sys.executable, "-IS", "-Wignore", guard.__file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
        start_new_session=True,
        timeout=60,
    )


def _make_folder() -> Path | None:
    """A new folder in the temporary one; None where the names of sockets in it would be too long."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) + len("/tlt-12345678") + _IN_FOLDER > _SOCKET_PATH:
        logger.warning(
            "tlt: %s is too long a name for sockets in a folder of it: temporary files of this run stay", usual
        )
        return None
    return Path(tempfile.mkdtemp(prefix="tlt-"))


def _use(folder: Path) -> None:
    """Makes it the temporary folder of this process and of those that it starts; caches stay where they are."""
    usual = tempfile.gettempdir()
    os.environ.setdefault("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))  # Ray's own default, before the next line
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{usual}/torchinductor_{_user()}")
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # read anew


def _user() -> str:
    with contextlib.suppress(KeyError, OSError):
        return getpass.getuser()
    return str(os.getuid())


def _promised_folders() -> list[Path]:
    """Temporary folders that this process means to remove when it ends, and does not when it is killed."""
    found = (one for one in gc.get_objects() if issubclass(type(one), tempfile.TemporaryDirectory))
    return [Path(one.name).absolute() for one in found]
