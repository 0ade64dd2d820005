"""verl's registry of checkpoint engines: the name `gloo`, for policy and rollout on separate devices that are hosts."""

from __future__ import annotations

from collections.abc import Callable

from tlt_verl.patches.seam import Seam, Target

MODULE = "verl.checkpoint_engine.base"


def _install(name: str, engine: Callable[[], type]) -> None:
    """Register the class that `engine()` returns."""
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    CheckpointEngineRegistry._registry[name] = engine()


SEAM = Seam(
    name="verl.gloo_weights",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(path=f"{MODULE}:CheckpointEngineRegistry._registry"),
        Target(path=f"{MODULE}:CheckpointEngineRegistry.get", source_contains=("cls._registry[backend]",)),
        Target(
            path=f"{MODULE}:CheckpointEngineManager.build_process_group",
            source_contains=(
                '["prepare"] * actor_wg.world_size',
                "actor_wg.world_size, rollout.world_size, metadata",
                '["init_process_group"] * rollout.world_size',
            ),
        ),
        Target(
            path=f"{MODULE}:CheckpointEngineManager.update_weights",
            source_contains=("await self.abort_replicas()", "await self.resume_generation_replicas()", '["finalize"]'),
        ),
        Target(path=f"{MODULE}:CheckpointEngine.send_weights", parameters=("weights", "global_steps")),
        Target(path=f"{MODULE}:CheckpointEngine.receive_weights", parameters=("global_steps",)),
        Target(path="verl.workers.rollout.utils:ensure_async_iterator"),
    ),
    why="verl's transfers between separate devices need CUDA, NPUs or RDMA.",
    install=_install,
    cpu_only=True,
)
