"""verl's registry of weight adapters: the name `tlt`. Installed when verl's module is imported."""

from __future__ import annotations

from tlt_verl.patches.seam import Seam, Target

MODULE = "verl.workers.rollout.base"


def _install(name: str, adapter: str) -> None:
    """Register the class with the dotted path `adapter`, which verl imports when a run asks for `name`."""
    from verl.workers.rollout import base

    base._ROLLOUT_REGISTRY[(name, "async")] = adapter


SEAM = Seam(
    name="verl.rollout_adapter",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(path=f"{MODULE}:_ROLLOUT_REGISTRY"),
        Target(path=f"{MODULE}:get_rollout_class", source_contains=("_ROLLOUT_REGISTRY[(rollout_name, mode)]",)),
    ),
    why="The rollout backend `tlt`: its weight adapter.",
    install=_install,
)
