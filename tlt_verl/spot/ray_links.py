"""The links of a spot worker: over the board to its replica's server, over Ray to the coordinator, all with a bound.

It has no handle of the server: Ray would import verl and SGLang with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from tlt_verl.board import Board
from tlt_verl.policy_files import read_share
from tlt_verl.spot.links import CopyRefused, LinkError, Master, Policy, Published

_CALL_S = 10.0
_PUBLISH_S = 90.0  # for the servers' answers
_BYTES_PER_S = 100e6  # that a call takes at least, on cores that others want
_POLICY_S = 10.0
_POLL_S = 0.01


class RayLinks:
    """See `Links`.

    Args:
        replica: its number.
        board: the replica's.
        coordinator: the job's.
        policy: folder into which the engine writes the policy's tensors.
        ranks: of the engine, each of which writes its share.
        vocab_size: the target's.
        state_bytes: of the drafter with its optimizer, which `fetch` may bring.
    """

    def __init__(
        self,
        replica: int,
        board: Board,
        coordinator: Any,
        policy: Path,
        ranks: int,
        vocab_size: int,
        state_bytes: int = 0,
    ) -> None:
        self._replica, self._board, self._coordinator, self._state_bytes = replica, board, coordinator, state_bytes
        self._policy, self._ranks, self._vocab_size = policy, ranks, vocab_size

    def policy(self) -> Policy | None:
        """See `Links`."""
        board, end = self._board, time.monotonic() + _POLICY_S
        board.share_wanted = wanted = board.share_wanted + 1
        while board.share_given != wanted:
            if time.monotonic() > end:
                raise LinkError(f"the replica's server did not answer in {_POLICY_S:.0f} s")
            time.sleep(_POLL_S)
        version = board.share_version
        while version >= 0 and board.policy_version <= version and time.monotonic() < end:
            try:
                found = read_share(self._policy, version, self._ranks, self._vocab_size)
            except (OSError, ValueError) as error:
                raise LinkError(f"the policy's embedding and head cannot be read: {error}") from error
            if found is not None:
                return Policy(version, *found)
            time.sleep(_POLL_S)
        if time.monotonic() < end:
            return None
        raise LinkError(f"the engine did not write the policy's embedding and head in {_POLICY_S:.0f} s")

    def fetch(self, version: int, serving_version: int) -> Master:
        """See `Links`."""
        answer = self._get(self._coordinator.fetch.remote(version, serving_version), _bound(self._state_bytes))
        return Master(
            version=answer["version"],
            state=answer.get("state"),
            hot=answer["hot"],
            serving_version=answer["serving_version"],
            serving=answer.get("serving"),
        )

    def choose_hot(self, hot: torch.Tensor) -> torch.Tensor:
        """See `Links`."""
        return self._get(self._coordinator.choose_hot.remote(hot), _bound(bytes_of(hot)))

    def submit(self, base: int, state: Mapping[str, Any], tokens: int, report: Mapping[str, float]) -> int:
        """See `Links`. A refused copy is an error too: the next window begins with the master."""
        sent = self._coordinator.submit.remote(str(self._replica), base, state, tokens, dict(report))
        answer = self._get(sent, _bound(bytes_of(state)))
        if "refused" in answer:
            raise CopyRefused(f"the coordinator refused a copy ({answer['refused']}): {answer['reason']}")
        return answer["version"]

    def publish(self, weights: Mapping[str, torch.Tensor], hot: torch.Tensor | None, accept_len: float) -> Published:
        """See `Links`."""
        sent = self._coordinator.publish.remote(str(self._replica), dict(weights), hot, accept_len)
        answer = self._get(sent, _PUBLISH_S + _bound(bytes_of(weights)))
        if "refused" in answer:
            raise LinkError(f"the coordinator refused a drafter ({answer['refused']}): {answer['reason']}")
        return Published(answer["version"], answer["rejected"], answer["serves"])

    @staticmethod
    def _get(reference: Any, seconds: float) -> Any:
        try:
            return ray.get(reference, timeout=seconds)
        except GetTimeoutError:
            raise LinkError(f"the coordinator did not answer in {seconds:.0f} s") from None
        except RayError as error:
            raise LinkError(f"the coordinator cannot be reached: {error}") from error


def bytes_of(value: Any) -> int:
    """Of all tensors in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


def _bound(size: int) -> float:
    """Seconds for a call that carries so many bytes."""
    return _CALL_S + size / _BYTES_PER_S
