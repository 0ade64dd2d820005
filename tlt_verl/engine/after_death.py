"""What is done when this process has ended, however it ended: a scheduler is always killed, never asked to stop."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import BinaryIO

# The inner shell waits for the end of the pipe. The outer one ends at once, so that the inner one is nobody's child and
# in nobody's session: SGLang kills all descendants of an engine one by one.
_WAIT_AND_REMOVE = 'exec 3<&0; (read -r _ <&3; rm -rf -- "$1") >/dev/null 2>&1 &'


def remove_after_death(path: Path) -> BinaryIO:
    """Let a shell wait for the end of this process, at the other end of a pipe, and then remove a file or a folder.

    Returns:
        This end of the pipe: keep it, for closing it is taken for the end.

    Raises:
        OSError: no process could be started.
    """
    reading, writing = os.pipe()
    try:
        subprocess.run(
            ["sh", "-c", _WAIT_AND_REMOVE, "sh", str(path)], stdin=reading, check=True, start_new_session=True
        )
    finally:
        os.close(reading)
    return os.fdopen(writing, "wb")
