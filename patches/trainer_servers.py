"""The replicas' servers of verl's V1 trainer, for the seams that ask them; those name what it relies on."""

from __future__ import annotations

from typing import Any


def server_handles(trainer: Any) -> list[Any]:
    """The handles of the replicas' server actors, in their order."""
    return [handle for manager in trainer._rollout_server_managers() for handle in manager.server_handles]
