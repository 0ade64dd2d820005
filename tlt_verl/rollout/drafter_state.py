"""The drafter beside verl's checkpoints: the trainer's process asks the coordinator to write it and to read it.

Nothing here ends a run: a drafter that is not saved, or does not come back, costs speed until another is trained.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import ray

from tlt_verl.rollout.spot import coordinator_name

logger = logging.getLogger(__name__)

FOLDER = "tlt_drafter"
_FIND_S = 60.0
_ANSWER_S = 120.0


def save(checkpoint: str) -> None:
    """Write the drafter's state into the folder of verl's checkpoint, if one is trained in this run."""
    try:
        coordinator = ray.get_actor(coordinator_name())
    except ValueError:
        return
    _ask(coordinator.save, Path(checkpoint, FOLDER), "saved in")


def load(checkpoint: str) -> None:
    """Go on from the drafter's state in the folder of verl's checkpoint, if there is one."""
    folder = Path(checkpoint, FOLDER)
    if not folder.is_dir():
        logger.warning("tlt: %s has no drafter: training of it begins anew", checkpoint)
        return
    if (coordinator := _find()) is None:
        logger.warning("tlt: the drafter in %s is not used: no drafter is trained in this run", folder)
        return
    _ask(coordinator.load, folder, "goes on from")


def _ask(method: Any, folder: Path, what: str) -> None:
    try:
        problem = ray.get(method.remote(str(folder)), timeout=_ANSWER_S)
    except Exception as error:  # the policy's own checkpoint is complete, and the run goes on
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        print(f"tlt: the drafter {what} {folder}", flush=True)
    else:
        logger.error("tlt: not so that the drafter %s %s: %s", what, folder, problem)


def _find() -> Any:
    """The coordinator, for which the replicas' servers ask when their engines are up; None where none comes."""
    end = time.monotonic() + _FIND_S
    while time.monotonic() < end:
        try:
            return ray.get_actor(coordinator_name())
        except ValueError:
            time.sleep(0.2)
    return None
