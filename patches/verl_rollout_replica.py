"""verl's registry of rollout replicas: the name `tlt`. Installed when verl's module is imported."""

from __future__ import annotations

from collections.abc import Callable

from tlt_verl.patches.seam import Seam, Target

MODULE = "verl.workers.rollout.replica"


def _install(name: str, replica: Callable[[], type]) -> None:
    """`replica()` is called when a run asks for `name`; SGLang's own replica is loaded first, for what that sets up."""
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def load() -> type:
        RolloutReplicaRegistry.get("sglang")
        return replica()

    RolloutReplicaRegistry.register(name, load)


SEAM = Seam(
    name="verl.rollout_replica",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(path=f"{MODULE}:RolloutReplicaRegistry.register", parameters=("name", "loader")),
        Target(path=f"{MODULE}:RolloutReplicaRegistry.get", parameters=("name",)),
        Target(path=f"{MODULE}:RolloutReplica.max_concurrency"),
    ),
    why="The rollout backend `tlt`: its replica.",
    install=_install,
)
