"""What a spot worker asks of the others: its replica's engine, and the coordinator. Types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class LinkError(RuntimeError):
    """The coordinator or the engine does not answer. Training of the drafter waits; nothing else does."""


class CopyRefused(LinkError):  # noqa: N818 - what happened, in the coordinator's word
    """The coordinator will not merge this copy: the next window begins with the master."""


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy's tensors that the drafter uses, on the host.

    Args:
        version: the engine's count of the weights that it computes with.
        embed, head: [V, H] each, in the policy's dtype; one tensor where they are tied.
    """

    version: int
    embed: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, eq=False)
class Master:
    """The state that every worker's window begins with.

    Args:
        version: of the master; submissions name it as their base.
        state: all of a trainer's state, or `drafter` alone where nobody has trained yet. None: the worker has it.
        hot: int64 [Vh]; None for the whole vocabulary, or while none was chosen.
        serving_version: of the drafter that the engines draft with; 0 while they do not.
        serving: its weights, or None where the worker has them, or nothing serves.
    """

    version: int
    state: Mapping[str, Any] | None
    hot: torch.Tensor | None
    serving_version: int
    serving: Mapping[str, torch.Tensor] | None


@dataclass(frozen=True)
class Published:
    """What became of a drafter that passed the gate.

    Args:
        version: under which it serves, or will.
        rejected: replicas that did not take it, and why.
        serves: whether a replica has taken it. Where none has, the first that can will, and `fetch` says so then.
    """

    version: int
    rejected: Mapping[str, str]
    serves: bool = True


class Links(Protocol):
    """Every call has a bound, and raises `LinkError` when it is reached or the other side is gone."""

    def policy(self) -> Policy | None:
        """The policy's tensors as the engine has them now; None while others come in."""

    def fetch(self, version: int, serving_version: int) -> Master:
        """The master, without what the worker says that it has."""

    def choose_hot(self, hot: torch.Tensor) -> torch.Tensor:
        """Propose a hot vocabulary; the one that was chosen first, by whomever."""

    def submit(self, base: int, state: Mapping[str, Any], tokens: int, report: Mapping[str, float]) -> int:
        """Give a trained copy to the average; the master's version with it.

        Args:
            state: the trainer's own tensors, which go on changing when this has returned.
        """

    def publish(self, weights: Mapping[str, torch.Tensor], hot: torch.Tensor | None, accept_len: float) -> Published:
        """Let a drafter that passed the gate serve, on every replica."""
