"""What only an engine's scheduler can see of itself, recorded for check_engine.py: a plugin of SGLang.

- For each set of CUDA graphs: how many, for what shape, how long they took and what device memory they hold.
- On demand, every operation that waits for the device, by the line of code that asked for it.
- On demand, one strategy at every step, instead of the tuner's choice.

Without `TLT_RECORDER`, a folder, it does nothing. In that folder `control` holds two bytes that are read at every step:
the place of the strategy that is to run among the worker's (255: the tuner chooses), and the number of the window in
which waits are counted (0: they are not). `graphs.jsonl` and `waits.jsonl` are what was recorded.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

FREE = 255
ENVIRONMENT = "TLT_RECORDER"
_RUNNERS = {
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner": "DecodeCudaGraphRunner",
    "sglang.srt.speculative.eagle_draft_cuda_graph_runner": "EAGLEDraftCudaGraphRunner",
    "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner": "EAGLEDraftExtendCudaGraphRunner",
}
_WAITS = "synchronizing CUDA operation"


class Control:
    """The two bytes, from either side."""

    def __init__(self, folder: Path) -> None:
        path = folder / "control"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([FREE, 0]))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 2)

    strategy = property(lambda self: self._bytes[0], lambda self, place: self._bytes.__setitem__(0, place))
    window = property(lambda self: self._bytes[1], lambda self, number: self._bytes.__setitem__(1, number))


def plugin() -> None:
    """SGLang's entry point, run in every process of the engine."""
    if ENVIRONMENT not in os.environ:
        return
    from tlt_verl.patches.after_import import after_import

    folder = Path(os.environ[ENVIRONMENT])
    control = Control(folder)
    for module, name in _RUNNERS.items():
        after_import(module, functools.partial(_record_graphs, module, name, folder / "graphs.jsonl"))
    after_import("tlt_verl.engine.speculation", functools.partial(_choose_for, control))
    after_import("sglang.srt.managers.scheduler", functools.partial(_count_waits, control, folder / "waits.jsonl"))


def _append(path: Path, **fields: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


# --- graphs


class _Memory:
    """Device memory of this process now: what torch has reserved and allocated, and what the driver says in all."""

    def __init__(self) -> None:
        from tlt_verl.spot.nvml import Device

        torch.cuda.synchronize()
        self.reserved, self.allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        self.held = (Device("0").sample().processes or {}).get(os.getpid())
        self.free = torch.cuda.mem_get_info()[0]


def _record_graphs(module: str, name: str, path: Path) -> None:
    runner_class = getattr(sys.modules[module], name)
    original = runner_class.__init__

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not runner_class:  # a subclass that calls its parent's
            return original(self, *args, **kwargs)
        before, begin = _Memory(), time.perf_counter()
        original(self, *args, **kwargs)
        after, seconds = _Memory(), time.perf_counter() - begin
        spec = self.model_runner.server_args
        _append(
            path,
            runner=name,
            draft_model=bool(self.model_runner.is_draft_worker),
            batch_sizes=list(self.capture_bs),
            tokens_per_request=self.captured_req_width,
            steps=getattr(self, "speculative_num_steps", None),
            topk=spec.speculative_eagle_topk,
            width=spec.speculative_num_draft_tokens,
            seconds=seconds,
            reserved=after.reserved - before.reserved,
            allocated=after.allocated - before.allocated,
            held=None if None in (after.held, before.held) else after.held - before.held,
            free=before.free - after.free,
        )

    runner_class.__init__ = recorded


# --- one strategy at every step


def _choose_for(control: Control) -> None:
    speculation = sys.modules["tlt_verl.engine.speculation"].Speculation
    original = speculation._choose

    @functools.wraps(original)
    def choose(self: Any, batch_size: int) -> Any:
        place = control.strategy
        return original(self, batch_size) if place == FREE else self._list[place]

    speculation._choose = choose


# --- waits


class _Waits:
    """Counts torch's warnings of operations that wait, by the code that asked for them, while a window is open."""

    def __init__(self, control: Control, path: Path) -> None:
        self._control, self._path = control, path
        self._window, self._steps = 0, 0
        self._counts: Counter[str] = Counter()
        self._shown = warnings.showwarning

    def step(self) -> None:
        """Another pass through the scheduler's loop."""
        if self._control.window != self._window:
            self._turn(self._control.window)
        self._steps += 1

    def _turn(self, window: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn" if window else "default")
        if self._window:
            _append(self._path, window=self._window, steps=self._steps, waits=self._counts.most_common())
        self._window, self._steps = window, 0
        self._counts = Counter()
        if window:
            warnings.simplefilter("always")
            warnings.showwarning = self._note
        else:
            warnings.showwarning = self._shown

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if _WAITS in str(message):
            self._counts[_asked_by(sys._getframe(1), f"{filename}:{lineno}")] += 1


def _asked_by(frame: FrameType | None, place: str) -> str:
    """The warning's place, and the innermost line of this project that led to it."""
    while frame is not None:
        name = frame.f_code.co_filename
        if "tlt_verl" in name or "/patches/" in name:
            return f"{_short(place)} < {_short(f'{name}:{frame.f_lineno}')}"
        frame = frame.f_back
    return _short(place)


def _short(place: str) -> str:
    return "/".join(place.split("/")[-3:])


def _count_waits(control: Control, path: Path) -> None:
    scheduler = sys.modules["sglang.srt.managers.scheduler"].Scheduler
    original: Callable[..., Any] = scheduler.run_batch
    waits = _Waits(control, path)

    @functools.wraps(original)
    def run_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        waits.step()
        return original(self, *args, **kwargs)

    scheduler.run_batch = run_batch
