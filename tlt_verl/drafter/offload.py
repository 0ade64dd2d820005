"""The trainer's tensors, off the accelerator and back: what a spot worker does when it gives a device back.

Knows parameters and optimizer state; nothing of why.
"""

from __future__ import annotations

import ctypes

import torch

from tlt_verl.drafter.snapshot import HostCopy
from tlt_verl.drafter.trainer import DrafterTrainer


class Offload:
    """Moves one trainer's weights and optimizer state between its device and page-locked host memory.

    On a CPU device there is nothing to move: weights stay, and what the allocator has kept is given back to the system.

    Args:
        trainer: whose tensors these are. Its shared tensors (embedding and head) are dropped by `release`.
    """

    def __init__(self, trainer: DrafterTrainer) -> None:
        self._trainer, self._host = trainer, HostCopy()
        if trainer.device.type != "cpu":
            self._host.reserve(trainer.tensors_to_come())
        self.is_released = False
        """Whether the device's memory has been given back. The trainer's tensors are then on the host."""

    def release(self) -> None:
        """Copy to the host, let go of the device's memory, and give the allocator's cache back."""
        if self.is_released:
            return
        self.is_released = True
        if self._trainer.device.type == "cpu":
            _trim()
            return
        tensors = self._trainer.own_tensors()
        for name, copied in self._host.take(tensors).items():
            tensors[name].data = copied
        self._trainer.unfollow()
        torch.get_device_module(self._trainer.device).empty_cache()

    def restore(self) -> None:
        """Copy back to the device. `follow` has to be called before the next step."""
        if not self.is_released:
            return
        self.is_released = False
        if self._trainer.device.type != "cpu":
            for tensor in self._trainer.own_tensors().values():
                tensor.data = tensor.data.to(self._trainer.device, non_blocking=True)
            torch.accelerator.synchronize(self._trainer.device)


def _trim() -> None:
    """Let glibc give free pages back; other C libraries keep them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
