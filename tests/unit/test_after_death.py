"""What a process leaves behind is removed when it has been killed, with all of its descendants, as SGLang kills."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

KEEPER = """
import sys, time
from pathlib import Path
from tlt_verl.engine.after_death import remove_after_death
kept = [remove_after_death(Path(path)) for path in sys.argv[1:]]
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("descendants", [False, True])
def test_a_killed_process_leaves_neither_file_nor_folder(tmp_path, descendants):
    file, folder = tmp_path / "a ring", tmp_path / "a folder"
    file.write_text("x")
    (folder / "v1").mkdir(parents=True)
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(file), str(folder)], stdout=subprocess.PIPE, text=True)
    assert keeper.stdout.readline() == "ready\n"
    assert file.exists() and folder.exists(), "removed while the process lives"
    for child in psutil.Process(keeper.pid).children(recursive=True) if descendants else []:
        child.kill()
    keeper.kill()
    keeper.wait()
    deadline = time.monotonic() + 10
    while (file.exists() or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not file.exists() and not folder.exists()
