"""verl asks for a backend for the CPU and one for the device: an entry twice when they are one, which torch refuses."""

from __future__ import annotations

import functools
import os

from tlt_verl.patches.seam import Seam, Target

_BACKEND = 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"'


def _install() -> None:
    from verl.utils import distributed

    init_ray = distributed.initialize_global_process_group_ray

    @functools.wraps(init_ray)
    def gloo_ray(timeout_second: float | None = None, backend: str | None = None) -> None:
        init_ray(timeout_second, backend or "gloo")

    @functools.wraps(distributed.initialize_global_process_group)
    def gloo(timeout_second: float = 36000) -> tuple[int, int, int]:
        gloo_ray(timeout_second)
        return int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    distributed.initialize_global_process_group_ray = gloo_ray
    distributed.initialize_global_process_group = gloo


SEAM = Seam(
    name="verl.gloo_backend",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path="verl.utils.distributed:initialize_global_process_group_ray",
            parameters=("timeout_second", "backend"),
            source_contains=(_BACKEND,),
        ),
        Target(
            path="verl.utils.distributed:initialize_global_process_group",
            parameters=("timeout_second",),
            source_contains=(_BACKEND,),
        ),
    ),
    why="torch refuses the process-group backend 'cpu:gloo,cpu:gloo'.",
    install=_install,
    cpu_only=True,
)
