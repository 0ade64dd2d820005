"""What goes wrong in a run of verl while it goes on, and how it is seen from outside: processes, board, rings, log.

No hook of the product is used. Every wait has a bound.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tlt_verl.board import Board
from tlt_verl.report.console import is_training_step, parse_step
from tlt_verl.segments import Segment, SegmentWriter

HERE = Path(__file__).parent
WORKER, COORDINATOR = "ray::SpotService", "ray::SpotCoordinator"


class Machine:
    """`bad_machine.c`, compiled into a folder, and the switches of its faults.

    Args:
        folder: new; for the library and the switches.
        paths: parts of the paths that are meant.
    """

    def __init__(self, folder: Path, *paths: str) -> None:
        folder.mkdir()
        self.library = folder / "bad_machine.so"
        self._switches = folder / "faults"
        self._switches.mkdir()
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        assert compiler, "no C compiler (cc, gcc or clang): torch needs one as well"
        flags = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
        command = [compiler, *flags, "-o", str(self.library), str(HERE / "bad_machine.c"), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        self.environment = {
            "LD_PRELOAD": str(self.library),
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
            "BAD_MACHINE": str(self._switches),
            "BAD_MACHINE_PATHS": ":".join(paths),
        }

    @contextlib.contextmanager
    def wrong(self, fault: str, number: int = 1):
        """This fault, for as long as the block takes."""
        unnamed = self._switches / f".{fault}"
        unnamed.write_text(str(number))
        unnamed.rename(self._switches / fault)
        try:
            yield
        finally:
            (self._switches / fault).unlink()


class Watched:
    """A run that goes on.

    Args:
        process: of the trainer.
        task: the run's folder, with its logs.
    """

    def __init__(self, process: subprocess.Popen, task: Path) -> None:
        self.process, self._task = process, task
        self.shm = Path(f"/proc/{process.pid}/root/dev/shm")  # the run's own, where it has one
        self._board: Board | None = None

    # --- what is seen

    def wait_for(self, what: str, is_so: Callable[[], object], seconds: float) -> None:
        """Look until it is so; fail when the run has ended, or after so many seconds."""
        end = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, f"the run ended before {what}"
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
            time.sleep(0.1)

    def find(self, name: str) -> list[psutil.Process]:
        """The run's processes whose name begins so."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if " ".join(process.cmdline()).startswith(name):
                        found.append(process)
        return found

    def log(self) -> str:
        """What the run has said so far."""
        return "".join((self._task / name).read_text(errors="replace") for name in ("stdout.log", "stderr.log"))

    def steps(self) -> list[dict[str, float]]:
        """The metrics of the steps so far."""
        found = [step[1] for line in self.log().splitlines() if (step := parse_step(line))]
        return [metrics for metrics in found if is_training_step(metrics)]

    def total(self, metric: str) -> float:
        """A metric that counts what each step did, of all steps so far."""
        return sum(step.get(metric, 0.0) for step in self.steps())

    def latest(self, metric: str) -> float:
        """A metric as the last step says it."""
        return next((step[metric] for step in reversed(self.steps()) if metric in step), 0.0)

    @property
    def board(self) -> Board:
        """Of the run's only replica."""
        if self._board is None:
            (path,) = self.shm.glob("tlt-*.board")
            self._board = Board(path)
        return self._board

    def wait_for_training(self, tokens: int = 1, seconds: float = 180) -> None:
        """Wait until the drafter has been trained on so many more tokens."""
        self.wait_for("a board", lambda: list(self.shm.glob("tlt-*.board")), 300)
        goal = self.board.trained_tokens + tokens
        self.wait_for("training goes on", lambda: self.board.trained_tokens >= goal, seconds)

    # --- what is done to it

    def kill(self, name: str, rng: random.Random, most_s: float) -> psutil.Process:
        """Kill -9 the one process of this name, at a random moment after it was there."""
        self.wait_for(f"a process {name}", lambda: self.find(name), 240)
        (victim, *_) = self.find(name)
        time.sleep(rng.uniform(0, most_s))
        assert self.process.poll() is None, f"the run ended before {name} was killed"
        victim.send_signal(signal.SIGKILL)
        self.wait_for("its death", lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, 60)
        return victim

    @contextlib.contextmanager
    def full_shm(self, spared: int):
        """Take all of the run's shared memory but so many bytes, for as long as the block takes."""
        path = self.shm / "filled"
        size = os.statvfs(self.shm)
        assert size.f_blocks * size.f_frsize < 1 << 30, "this is the machine's own /dev/shm"
        free = size.f_bavail * size.f_frsize
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - spared)
        try:
            yield
        finally:
            path.unlink()

    @contextlib.contextmanager
    def poisoned_ring(self, hidden_width: int, vocabulary: int):
        """A ring of this run, beside the engine's, with hidden states that are no numbers."""
        rng = torch.Generator().manual_seed(0)
        job = self.board.path.name.split("-")[1]
        sizes = {"hidden_width": hidden_width, "slots": 64, "slot_tokens": 64}
        with contextlib.closing(SegmentWriter(f"{job}-poison", **sizes, folder=self.shm)) as writer:
            for number in range(16):
                segment = Segment(
                    policy_version=self.board.policy_version,
                    request_id=f"poison-{number}",
                    prompt_id=number,
                    start=0,
                    prompt_len=4,
                    final=True,
                    tokens=torch.randint(0, vocabulary, (48,), generator=rng, dtype=torch.int32),
                    hidden=torch.full((48, hidden_width), float("nan"), dtype=torch.bfloat16),
                    logprobs=torch.zeros(48, dtype=torch.float16),
                )
                writer.write(segment)
            yield
