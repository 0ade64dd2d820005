"""What is done when this process has ended, however it ended: a scheduler is always killed, never asked to stop."""

from __future__ import annotations

import subprocess
from pathlib import Path


def remove_after_death(path: Path) -> subprocess.Popen:
    """Let a shell wait for the end of this process, at the other end of a pipe, and then remove a file.

    The shell is in a session of its own, so that what ends this process's group does not end it first.

    Returns:
        The shell. It sees the end of this process when the object is collected: keep it.
    """
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; rm -f -- "$1"', "sh", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
