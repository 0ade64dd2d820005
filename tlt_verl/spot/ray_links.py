"""The links of a spot worker over Ray: to its replica's server and to the coordinator, every call with a bound."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from tlt_verl.policy_files import read_share
from tlt_verl.spot.links import CopyRefused, LinkError, Master, Policy, Published

_CALL_S = 10.0
_PUBLISH_S = 90.0
_POLICY_S = 10.0
_POLL_S = 0.01


class RayLinks:
    """See `Links`.

    Args:
        replica: its number.
        server: the replica's server actor.
        coordinator: the job's.
        vocab_size: the target's.
    """

    def __init__(self, replica: int, server: Any, coordinator: Any, vocab_size: int) -> None:
        self._replica, self._server, self._coordinator, self._vocab_size = replica, server, coordinator, vocab_size

    def policy(self) -> Policy:
        """See `Links`."""
        folder, version, ranks = self._get(self._server.share_policy.remote(), _POLICY_S, "the replica's server")
        end = time.monotonic() + _POLICY_S
        while time.monotonic() < end:
            try:
                found = read_share(Path(folder), version, ranks, self._vocab_size)
            except (OSError, ValueError) as error:
                raise LinkError(f"the policy's embedding and head cannot be read: {error}") from error
            if found is not None:
                return Policy(version, *found)
            time.sleep(_POLL_S)
        raise LinkError(f"the engine did not write the policy's embedding and head in {_POLICY_S:.0f} s")

    def fetch(self, version: int, serving_version: int) -> Master:
        """See `Links`."""
        answer = self._get(self._coordinator.fetch.remote(version, serving_version), _CALL_S)
        return Master(
            version=answer["version"],
            state=answer.get("state"),
            hot=answer["hot"],
            serving_version=answer["serving_version"],
            serving=answer.get("serving"),
        )

    def choose_hot(self, hot: torch.Tensor) -> torch.Tensor:
        """See `Links`."""
        return self._get(self._coordinator.choose_hot.remote(hot), _CALL_S)

    def submit(self, base: int, state: Mapping[str, Any], tokens: int, report: Mapping[str, float]) -> int:
        """See `Links`. A refused copy is an error too: the next window begins with the master."""
        answer = self._get(
            self._coordinator.submit.remote(str(self._replica), base, state, tokens, dict(report)), _CALL_S
        )
        if "refused" in answer:
            raise CopyRefused(f"the coordinator refused a copy ({answer['refused']}): {answer['reason']}")
        return answer["version"]

    def publish(self, weights: Mapping[str, torch.Tensor], hot: torch.Tensor | None, accept_len: float) -> Published:
        """See `Links`."""
        answer = self._get(
            self._coordinator.publish.remote(str(self._replica), dict(weights), hot, accept_len), _PUBLISH_S
        )
        if "refused" in answer:
            raise LinkError(f"the coordinator refused a drafter ({answer['refused']}): {answer['reason']}")
        return Published(answer["version"], answer["rejected"])

    @staticmethod
    def _get(reference: Any, seconds: float, who: str = "the coordinator") -> Any:
        try:
            return ray.get(reference, timeout=seconds)
        except GetTimeoutError:
            raise LinkError(f"{who} did not answer in {seconds:.0f} s") from None
        except RayError as error:
            raise LinkError(f"{who} cannot be reached: {error}") from error
