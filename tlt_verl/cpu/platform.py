"""verl's platform "cpu": chosen by VERL_PLATFORM=cpu, never detected.

Knows verl's `PlatformBase`; everything that a device does is in `tlt_verl.cpu.host_device`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from verl.plugin.platform import PlatformBase, PlatformRegistry

from tlt_verl.cpu import host_device

# What a rollout engine needs in its environment before it is imported: sglang decides at import time what it runs on.
ROLLOUT_ENV = {"SGLANG_USE_CPU_ENGINE": "1"}


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """A machine without accelerators. One device a process; collectives over gloo."""

    @property
    def device_name(self) -> str:
        """The device type in torch's spelling."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """Engines are registered by vendor; none is registered for this one."""
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        """The host's counterpart of `torch.cuda`."""
        return host_device

    def is_available(self) -> bool:
        """The host is always there."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never: a GPU job whose driver is broken must fail, not continue on the host."""
        return False

    def current_device(self) -> host_device.HostIndex:  # type: ignore[override]
        """The host; see `HostIndex` for why this is not an int."""
        return host_device.current_device()

    def device_count(self) -> int:
        """One host in every process."""
        return host_device.device_count()

    def set_device(self, device_index: int) -> None:
        """Nothing to select."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Everything has already run."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch's CPU generator."""
        host_device.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch's CPU generator."""
        host_device.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The host's allocator takes no settings of this kind."""

    def empty_cache(self) -> None:
        """torch keeps no cache of host memory."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """Not applicable."""
        return None, None

    def communication_backend_name(self) -> str:
        """Collectives of host tensors."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable that Ray sets for the resource below."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """The name is GPU: verl asks Ray for GPUs whatever the platform says, so Ray is started with made-up ones."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """The same as CUDA's, because the resource is the same."""
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def rollout_env_vars(self) -> dict[str, str]:
        """The environment of a rollout server's actor."""
        return dict(ROLLOUT_ENV)

    def is_ipc_supported(self) -> bool:
        """False: CUDA's IPC handles are meant."""
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No timeline to mark."""
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def cudart(self) -> None:
        """No CUDA runtime."""
