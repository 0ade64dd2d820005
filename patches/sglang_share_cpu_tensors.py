"""Sending tensors between processes on a CPU device, for SGLang's weight update.

SGLang replaces torch's tensor reducer by one that rewrites the device index, argument 6 of a CUDA reduction; a CPU
tensor reduces to three arguments. Shared memory is named by file, since the sender of a file descriptor would have to
outlive the receiver. A view is copied first: a reducer sends its whole storage, and a policy's export is a set of views
of one buffer.

torch registers every file with a process of its own, `torch_shm_manager`, and gives that one second to answer. On a
machine whose cores are all busy it may take longer, and a weight update, with it the run, would end there: it is asked
again until it answers.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from tlt_verl.patches.seam import Seam, Target

logger = logging.getLogger(__name__)

MODULE = "sglang.srt.utils.patch_torch"
PATIENCE_S = 60.0
"""How long a file is asked to be registered again."""
_TIMED_OUT = "Shared memory manager connection has timed out"


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy when its storage holds more than it shows."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _patiently(register: Callable[..., Any]) -> Callable[..., Any]:
    """`register`, again where the manager did not answer in time; a late answer to the former try does no harm."""

    @functools.wraps(register)
    def patient(*args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic()
        while True:
            try:
                return register(*args, **kwargs)
            except RuntimeError as error:
                waited_s = time.monotonic() - begun
                if _TIMED_OUT not in str(error) or waited_s > PATIENCE_S:
                    raise
                logger.warning("tlt: torch's shared memory manager has not answered for %.0f s: asked again", waited_s)

    return patient


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
    storage = torch.UntypedStorage
    storage._share_filename_cpu_ = _patiently(storage._share_filename_cpu_)  # type: ignore[method-assign]
    storage._new_shared_filename_cpu = staticmethod(_patiently(storage._new_shared_filename_cpu))  # type: ignore[method-assign]


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
        Target(path="torch.multiprocessing.reductions:reduce_storage", source_contains=("_share_filename_cpu_()",)),
        Target(
            path="torch.multiprocessing.reductions:rebuild_storage_filename",
            source_contains=("torch.UntypedStorage._new_shared_filename_cpu(",),
        ),
    ),
    why="Weight updates by shared memory on a CPU device.",
    install=_install,
    cpu_only=True,
)
