"""Sending tensors between processes on a CPU device, for SGLang's weight update.

SGLang replaces torch's tensor reducer by one that rewrites the device index, argument 6 of a CUDA reduction; a CPU
tensor reduces to three arguments. Shared memory is named by file, since the sender of a file descriptor would have to
outlive the receiver. A view is copied first: a reducer sends its whole storage, and a policy's export is a set of views
of one buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tlt_verl.patches.seam import Seam, Target

MODULE = "sglang.srt.utils.patch_torch"


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy when its storage holds more than it shows."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _install() -> None:
    import torch.multiprocessing.reductions as reductions
    from sglang.srt.utils import patch_torch

    torch.multiprocessing.set_sharing_strategy("file_system")
    modified: Callable[..., Any] = patch_torch._reduce_tensor_modified

    @functools.wraps(modified)
    def reduce_tensor(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "cpu":
            return modified(tensor)
        return reductions._reduce_tensor_original(_compact(tensor))  # type: ignore[attr-defined]

    patch_torch._reduce_tensor_modified = reduce_tensor


SEAM = Seam(
    name="sglang.share_cpu_tensors",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(path=f"{MODULE}:_reduce_tensor_modified", source_contains=("_REDUCE_TENSOR_ARG_DEVICE_INDEX",)),
        Target(
            path=f"{MODULE}:monkey_patch_torch_reductions",
            source_contains=("reductions.reduce_tensor = _reduce_tensor_modified", "_reduce_tensor_original"),
        ),
    ),
    why="Weight updates by shared memory on a CPU device.",
    install=_install,
    cpu_only=True,
)
