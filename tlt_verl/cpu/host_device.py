"""The host as a device: the part of `torch.cuda`'s interface that verl and megatron-core call, answered by a CPU.

Knows torch and the operating system; knows nothing of verl or Megatron. It is a module, because that is what verl's
`PlatformBase.device_module` promises, and what `torch.cuda` is. There is one device, its name is "cpu", everything on
it is already finished when a call returns, and its memory is the process's. A name that is not here raises an
`AttributeError` that says so: nothing is answered with a silent no-op that was not thought about.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import torch


class HostIndex(str):
    """What `current_device()` returns: a device name where torch wants a device, an index where a string is built.

    `tensor.to(0)` means the first accelerator, so an int is of no use; `f"{device_name}:{index}"` must give "cpu:0".
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return format("0", spec)


HOST = HostIndex("cpu")
default_generators = {HOST: torch.default_generator}

# --- which device -----------------------------------------------------------------------------------------------------


def is_available() -> bool:
    """The host is always there."""
    return True


def is_initialized() -> bool:
    """The host needs no context."""
    return True


def device_count() -> int:
    """One host in every process."""
    return 1


def current_device() -> HostIndex:
    """The host, as torch and as a string template want it."""
    return HOST


def set_device(device: object) -> None:
    """Nothing to select."""


def get_device_name(device: object = None) -> str:
    """The name that verl's FLOPS table knows."""
    return "CPU"


def get_device_capability(device: object = None) -> tuple[None, None]:
    """A compute capability is CUDA's notion."""
    return None, None


@contextlib.contextmanager
def device(index: object) -> Iterator[None]:
    """Select a device for a block: nothing to select."""
    yield


# --- order of execution -----------------------------------------------------------------------------------------------


class Event:
    """A point in the host's only queue; `elapsed_time` is measured with a clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._recorded_s: float | None = None

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self._recorded_s = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Everything recorded has already run."""

    def synchronize(self) -> None:
        """Everything recorded has already run."""

    def query(self) -> bool:
        """Whether everything recorded has run."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        if self._recorded_s is None or end._recorded_s is None:
            raise RuntimeError("both events must be recorded before elapsed_time is asked")
        return (end._recorded_s - self._recorded_s) * 1e3


class Stream:
    """The host's only queue."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Everything enqueued has already run."""

    def wait_stream(self, stream: object) -> None:
        """Everything enqueued has already run."""

    def wait_event(self, event: Event) -> None:
        """Everything recorded has already run."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event now."""
        event = event or Event()
        event.record()
        return event


_STREAM = Stream()


def current_stream(device: object = None) -> Stream:
    """The host's only queue."""
    return _STREAM


default_stream = current_stream


def set_stream(stream: object) -> None:
    """Nothing to select."""


@contextlib.contextmanager
def stream(stream: object) -> Iterator[None]:
    """Select a queue for a block: there is only one."""
    yield


def synchronize(device: object = None) -> None:
    """Everything has already run."""


def is_current_stream_capturing() -> bool:
    """Graph capture does not exist here."""
    return False


# --- random numbers: the host has one generator, torch's own ----------------------------------------------------------


def manual_seed(seed: int) -> None:
    """Seed torch's CPU generator."""
    torch.default_generator.manual_seed(int(seed))


manual_seed_all = manual_seed


def get_rng_state(device: object = None) -> torch.Tensor:
    """State of torch's CPU generator, uint8."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: object = None) -> None:
    """Set the state of torch's CPU generator."""
    torch.set_rng_state(new_state)


random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=manual_seed)


def _lazy_init() -> None:
    """Nothing to initialise (imported by name by megatron-core)."""


def _lazy_call(callback: Callable[[], None], **_: object) -> None:
    """Run at once: nothing is lazy here (imported by name by megatron-core)."""
    callback()


# --- memory: the process's --------------------------------------------------------------------------------------------


def memory_allocated(device: object = None) -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def max_memory_allocated(device: object = None) -> int:
    """Largest resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(device: object = None) -> None:
    """The operating system's peak cannot be reset."""


reset_max_memory_allocated = reset_peak_memory_stats


def mem_get_info(device: object = None) -> tuple[int, int]:
    """Available and total bytes of the machine."""
    with open("/proc/meminfo") as meminfo:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def empty_cache() -> None:
    """torch keeps no cache of host memory."""


ipc_collect = empty_cache

# --- profiling: ranges are for a GPU's timeline -----------------------------------------------------------------------


@contextlib.contextmanager
def _no_range(message: str) -> Iterator[None]:
    yield


def _no_mark(message: str = "") -> None:
    """No timeline to mark."""


nvtx = SimpleNamespace(range=_no_range, range_push=_no_mark, range_pop=_no_mark, mark=_no_mark)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise AttributeError(
        f"torch.cuda.{name} has no counterpart on the CPU device ({__name__}): turn off the option that needs it."
    )
