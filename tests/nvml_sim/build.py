"""Builds the simulated `libnvidia-ml.so.1` with the machine's C compiler, and runs a Python program that finds it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARY = "libnvidia-ml.so.1"


def build(folder: Path) -> Path:
    """Compile into `folder`; returns it, for LD_LIBRARY_PATH."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "no C compiler (cc, gcc or clang): torch needs one as well"
    flags = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}")
    command = [compiler, *flags, "-o", str(folder / LIBRARY), str(HERE / "nvml_sim.c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@dataclass
class Played:
    """What a program that ran over the simulation said.

    Args:
        said: one JSON value a line.
        log: its standard error.
        calls: the functions of NVML that it called, in order.
    """

    said: list[Any]
    log: str
    calls: list[str]


def play(library: Path | None, folder: Path, trace: str, task: dict[str, Any], **environment: str) -> Played:
    """Run `player.py` with a task over a trace; without a library, where the machine has none either."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace").write_text(trace)
    (folder / "moment").write_text("0")
    (folder / "calls").write_text("")
    paths = {f"NVML_SIM_{name.upper()}": str(folder / name) for name in ("trace", "moment", "calls")}
    search = {} if library is None else {"LD_LIBRARY_PATH": str(library)}
    base = {name: value for name, value in os.environ.items() if name not in ("LD_LIBRARY_PATH", "CUDA_DEVICE_ORDER")}
    python_path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [base.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / "player.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=120,
        env=base | {"PYTHONPATH": python_path} | paths | search | environment,
    )
    assert done.returncode == 0, done.stderr
    calls = (folder / "calls").read_text().split()
    return Played([json.loads(line) for line in done.stdout.splitlines()], done.stderr, calls)
