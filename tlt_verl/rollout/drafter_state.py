"""The drafter and the tuners beside verl's checkpoints: the trainer's process asks those who have them.

The drafter is the coordinator's; what the tuners have learnt is the engines', one a replica. Nothing here ends a run: a
drafter that is not saved, or does not come back, costs speed until another is trained.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from tlt_verl.rollout.spot import coordinator_name

logger = logging.getLogger(__name__)

FOLDER = "tlt_drafter"
TUNERS = "tlt_tuners.json"
_FIND_S = 60.0
_ANSWER_S = 120.0


def save(checkpoint: str, servers: Sequence[Any]) -> None:
    """Write the drafter's state into the folder of verl's checkpoint, if one is trained in this run, and the tuners'.

    Args:
        servers: the replicas' server actors.
    """
    _save_tuners(Path(checkpoint, TUNERS), servers)
    try:
        coordinator = ray.get_actor(coordinator_name())
    except ValueError:
        return
    _ask(coordinator.save, Path(checkpoint, FOLDER), "saved in")


def load(checkpoint: str, servers: Sequence[Any]) -> None:
    """Go on from the states in the folder of verl's checkpoint, where there are some."""
    _load_tuners(Path(checkpoint, TUNERS), servers)
    folder = Path(checkpoint, FOLDER)
    if not folder.is_dir():
        logger.warning("tlt: %s has no drafter: training of it begins anew", checkpoint)
        return
    if (coordinator := _find()) is None:
        logger.warning("tlt: the drafter in %s is not used: no drafter is trained in this run", folder)
        return
    _ask(coordinator.load, folder, "goes on from")


def _save_tuners(path: Path, servers: Sequence[Any]) -> None:
    try:
        states = ray.get([server.tuner_state.remote() for server in servers], timeout=_ANSWER_S)
        if any(states):
            path.write_text(json.dumps(states), encoding="utf-8")
            print(f"tlt: what the tuners learnt is saved in {path}", flush=True)
    except Exception as error:  # as below
        logger.error("tlt: not so that the tuners are saved in %s: %s: %s", path, type(error).__name__, error)


def _load_tuners(path: Path, servers: Sequence[Any]) -> None:
    if not path.is_file():
        return
    try:
        states = [state for state in json.loads(path.read_text(encoding="utf-8")) if state]
        asked = [server.set_tuner_state.remote(states[i % len(states)]) for i, server in enumerate(servers)]
        if all(ray.get(asked, timeout=_ANSWER_S)):
            print(f"tlt: the tuners go on from {path}", flush=True)
        else:
            logger.error("tlt: a replica did not take its tuner's state in %s: its log says why", path)
    except Exception as error:  # as below
        logger.error("tlt: not so that the tuners go on from %s: %s: %s", path, type(error).__name__, error)


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
