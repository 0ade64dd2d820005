"""What NVML says of this machine. The only room that imports pynvml; knows nothing of torch, verl or sglang.

A machine without an NVIDIA driver is an ordinary one: no function here raises for it, the report names NVML's error.
"""

from __future__ import annotations

from dataclasses import dataclass

_CURES = {
    "NVMLError_LibraryNotFound": "there is no NVIDIA driver here, or this container does not see it",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not loaded",
    "NVMLError_LibRmVersionMismatch": "the driver was updated while it was loaded: restart the machine",
    "NVMLError_NoPermission": "this user may not ask the driver",
    "NVMLError_GpuIsLost": "a device has fallen off the bus: restart the machine",
    "NVMLError_NotSupported": "this driver does not answer the question",
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
        return NvmlReport(error=f"{type(error).__name__}: {error}; pip install nvidia-ml-py")
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


def _text(value: str | bytes) -> str:
    """Old bindings answer with bytes."""
    return value.decode() if isinstance(value, bytes) else value
