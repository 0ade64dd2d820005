"""What NVML says of this machine and of one device. The only room that imports pynvml; knows nothing of torch, verl or
sglang, nor what makes a device idle (`tlt_verl.spot.idle`).

A machine without an NVIDIA driver is an ordinary one: the report names NVML's error, and a `Device` fails with one that
says so (`DeviceError.absent`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHARES_HELD_S = 1.0
"""The longest that a driver takes from one sample of utilisation to the next; a share counts as long without news."""

_ABSENT = (
    "ImportError",
    "ModuleNotFoundError",
    "NVMLError_LibraryNotFound",
    "NVMLError_DriverNotLoaded",
    "NVMLError_LibRmVersionMismatch",
)

_CURES = {
    "NVMLError_LibraryNotFound": "there is no NVIDIA driver here, or this container does not see it",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not loaded",
    "NVMLError_LibRmVersionMismatch": "the driver was updated while it was loaded: restart the machine",
    "NVMLError_NoPermission": "this user may not ask the driver",
    "NVMLError_GpuIsLost": "a device has fallen off the bus: restart the machine",
    "NVMLError_NotSupported": "this driver does not answer the question",
    "NVMLError_FunctionNotFound": "this driver is older than the question",
    "NVMLError_NotFound": "there is no such device",
    "NVMLError_ResetRequired": "the device must be reset",
    "NVMLError_Timeout": "the driver did not answer in time",
}


@dataclass(frozen=True, kw_only=True)
class NvmlReport:
    """Driver and devices, or the error that kept NVML from telling.

    Args:
        driver: the driver's version, None where it could not be read.
        names: one name a device.
        error: NVML's error by its name, with what it means where that is known; None when everything was answered.
    """

    driver: str | None = None
    names: tuple[str, ...] = ()
    error: str | None = None


def report() -> NvmlReport:
    """Ask NVML for the driver and the devices. Raises nothing that NVML or its absence can raise."""
    try:
        import pynvml
    except ImportError as error:
        return NvmlReport(error=_not_installed(error))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NvmlReport(error=named(error))
    driver, names = None, []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            names.append(_text(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))))
        return NvmlReport(driver=driver, names=tuple(names))
    except pynvml.NVMLError as error:
        return NvmlReport(driver=driver, names=tuple(names), error=named(error))
    finally:
        pynvml.nvmlShutdown()


def named(error: Exception) -> str:
    """An NVML error by its name, with NVML's own words and, where it is known, what it means."""
    name = type(error).__name__
    meaning = f"; {_CURES[name]}" if name in _CURES else ""
    return f"{name} ({error}){meaning}"


class DeviceError(RuntimeError):
    """NVML could not be asked, or did not answer; its text is that of `named`.

    Args:
        text: what happened.
        name: the error's class in pynvml, such as "NVMLError_GpuIsLost".
    """

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name

    @property
    def absent(self) -> bool:
        """Whether this machine has no NVML at all, and not only none at this moment."""
        return self.name in _ABSENT


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one device answered at one moment. None: it does not answer that question.

    Args:
        free_bytes: device memory that nobody holds.
        utilisation: percent of the driver's last sampling period (up to a second) in which a kernel ran.
        processes: compute processes by pid, with the device memory they hold in bytes (None where that is not told).
        shares: utilisation in percent by pid; a pid that is not there did not compute.
    """

    free_bytes: int | None = None
    utilisation: int | None = None
    processes: Mapping[int, int | None] | None = None
    shares: Mapping[int, int] | None = None


class Device:
    """One device behind an entry of CUDA_VISIBLE_DEVICES, found again by its UUID.

    An entry is an index, "GPU-<uuid>" (or as much of it as names one device), "MIG-<uuid>", or the older
    "MIG-GPU-<uuid>/<gpu instance>/<compute instance>". NVML counts devices by PCI bus, CUDA does so with
    CUDA_DEVICE_ORDER=PCI_BUS_ID only: an index is taken as NVML's, with a warning where the devices differ and the two
    orders can too. An index is asked for once, at the first answer; from then on the device is its UUID, so that it may
    change its place. The index of a device in MIG mode is its first instance, as in CUDA.

    Args:
        entry: the entry.
        clock: seconds that never go back.

    Raises:
        ValueError: the entry is none of these.
    """

    def __init__(self, entry: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not re.fullmatch(r"\d+|GPU-[0-9a-fA-F-]+|MIG-[0-9a-fA-F-]+|MIG-GPU-[0-9a-fA-F-]+/\d+/\d+", entry):
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES: got {entry!r} for one device, takes an index, GPU-<uuid>, MIG-<uuid> or "
                "MIG-GPU-<uuid>/<gpu instance>/<compute instance>"
            )
        self.entry = entry
        self.uuid: str | None = None
        self._clock = clock
        self._nvml: Any = None
        self._handle: Any = None
        self._said: set[str] = set()
        self._shares: dict[int, tuple[int, float]] = {}  # percent, and when it was told
        self._seen_us = 0

    def open(self) -> None:
        """Start NVML and find the device, unless that is done.

        Raises:
            DeviceError: there is no NVML, or it does not know the device.
            ValueError: the entry names several devices.
        """
        if self._nvml is not None:
            return
        try:
            import pynvml
        except ImportError as error:
            raise DeviceError(_not_installed(error), type(error).__name__) from error
        with self._failing(pynvml):
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = self._found()

    def close(self) -> None:
        """Let go of NVML; the next `open` or `sample` finds the device again."""
        if self._nvml is None:
            return
        nvml, self._nvml, self._handle = self._nvml, None, None
        self._shares, self._seen_us = {}, 0
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()

    def sample(self) -> Sample:
        """Ask the device everything. Opens it first; any error closes it.

        Raises:
            DeviceError: NVML does not answer, for another reason than that the device never answers this question.
            ValueError: the entry names several devices.
        """
        self.open()
        nvml = self._nvml
        with self._failing(nvml):
            if _text(nvml.nvmlDeviceGetUUID(self._handle)) != self.uuid:
                self._handle = self._found()
            handle = self._handle
            return Sample(
                free_bytes=self._asked("free memory", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).free)),
                utilisation=self._asked("utilisation", lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
                processes=self._asked("compute processes", lambda: _processes(nvml, handle)),
                shares=self._asked("utilisation by process", self._recent_shares),
            )

    @contextlib.contextmanager
    def _failing(self, nvml: Any) -> Iterator[None]:
        try:
            yield
        except nvml.NVMLError as error:
            self.close()
            raise DeviceError(named(error), type(error).__name__) from error
        except ValueError:
            self.close()
            raise

    def _asked(self, question: str, answer: Callable[[], T]) -> T | None:
        try:
            return answer()
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound) as error:
            if question not in self._said:
                self._said.add(question)
                logger.info("%s does not tell its %s, which is left out: %s", self.uuid, question, named(error))
            return None

    def _found(self) -> Any:
        """The device's handle in this session of NVML."""
        nvml = self._nvml
        if self.uuid is not None:
            return nvml.nvmlDeviceGetHandleByUUID(self.uuid.encode())
        if self.entry.isdigit():
            handle = _by_index(nvml, int(self.entry))
        elif self.entry.startswith("GPU-"):
            handle = nvml.nvmlDeviceGetHandleByUUID(_full_uuid(nvml, self.entry).encode())
        else:
            handle = _mig_by_name(nvml, self.entry)
        self.uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        return handle

    def _recent_shares(self) -> dict[int, int]:
        """The driver tells each sample once, and not of all processes together: held until news, or until it is old."""
        now = self._clock()
        self._shares = {pid: told for pid, told in self._shares.items() if now - told[1] <= SHARES_HELD_S}
        samples = self._samples_since(self._seen_us)
        if not samples and not self._shares and self._seen_us:
            samples = self._samples_since(0)
            if max((sample.timeStamp for sample in samples), default=self._seen_us) >= self._seen_us:
                samples = []  # nothing new; otherwise the machine's clock was set back, and these are
        for sample in sorted(samples, key=lambda each: each.timeStamp):
            self._shares[sample.pid], self._seen_us = (sample.smUtil, now), sample.timeStamp
        return {pid: share for pid, (share, _) in self._shares.items()}

    def _samples_since(self, microseconds: int) -> list[Any]:
        nvml = self._nvml
        try:
            return list(nvml.nvmlDeviceGetProcessUtilization(self._handle, microseconds))
        except nvml.NVMLError_NotFound:
            return []
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_SUCCESS:  # the binding's way to say that there are none
                return []
            raise


def _processes(nvml: Any, handle: Any) -> dict[int, int | None]:
    """By the functions with a version: over an older driver the one without raises what is no error of NVML."""
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except nvml.NVMLError_FunctionNotFound:
        found = nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
    return {process.pid: process.usedGpuMemory for process in found}


def _by_index(nvml: Any, index: int) -> Any:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    names = {_text(nvml.nvmlDeviceGetName(each)) for each in _devices(nvml)}
    if len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        logger.warning(
            "CUDA_VISIBLE_DEVICES names device %d by its index, and the devices here differ (%s): CUDA may count them "
            "in another order than NVML. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the device by its UUID.",
            index,
            ", ".join(sorted(names)),
        )
    try:
        in_mig_mode = nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        in_mig_mode = False
    return _only(nvml, _instances(nvml, handle)) if in_mig_mode else handle


def _full_uuid(nvml: Any, prefix: str) -> str:
    """The UUID that begins so, in any case, as CUDA takes it."""
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in _devices(nvml)]
    found = [uuid for uuid in uuids if uuid.lower().startswith(prefix.lower())]
    if len(found) > 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES: {prefix!r} begins the UUIDs of {', '.join(found)}; takes one device")
    return str(_only(nvml, found))


def _mig_by_name(nvml: Any, entry: str) -> Any:
    gpu, *instance = entry.removeprefix("MIG-").split("/")
    if not instance:
        return nvml.nvmlDeviceGetHandleByUUID(entry.encode())
    wanted = [int(number) for number in instance]
    parent = nvml.nvmlDeviceGetHandleByUUID(gpu.encode())
    return _only(nvml, (mig for mig in _instances(nvml, parent) if _instance_ids(nvml, mig) == wanted))


def _instance_ids(nvml: Any, mig: Any) -> list[int]:
    return [nvml.nvmlDeviceGetGpuInstanceId(mig), nvml.nvmlDeviceGetComputeInstanceId(mig)]


def _instances(nvml: Any, parent: Any) -> Iterator[Any]:
    """The MIG instances of a device; places may be free in between."""
    for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        with contextlib.suppress(nvml.NVMLError_NotFound):
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, place)


def _devices(nvml: Any) -> Iterator[Any]:
    """Every device that answers; one that is lost is not looked for here."""
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError_GpuIsLost, nvml.NVMLError_NoPermission):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceGetUUID(handle)
            yield handle


def _only(nvml: Any, found: Any) -> Any:
    """The first, or NVML's own error where there is none."""
    for one in found:
        return one
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)


def _not_installed(error: ImportError) -> str:
    return f"{type(error).__name__}: {error}; pip install nvidia-ml-py"


def _text(value: str | bytes) -> str:
    """Old bindings answer with bytes."""
    return value.decode() if isinstance(value, bytes) else value
