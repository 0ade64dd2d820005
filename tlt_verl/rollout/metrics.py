"""The metrics of a step, from what each response reports. Pure arithmetic; knows neither Ray nor SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counters:
    """What one response reports: tokens it has, and what speculation did for it (0 where it did nothing)."""

    tokens: int
    proposed: int
    accepted: int
    verifications: int


def step_metrics(responses: Sequence[Counters], generation_s: float) -> dict[str, float]:
    """Metrics of one step, under the names of verl's logger.

    `tlt/accept_len` is tokens produced per verification, the bonus token included; `tlt/accept_rate` accepted over
    proposed drafts; both are over the step's tokens, so a long response counts as much as it took. `tlt/draft_share/*`
    are shares of the step's tokens by what produced them. Ratios without a denominator are left out.

    Args:
        generation_s: wall time of the step's generation, seconds.
    """
    tokens = sum(r.tokens for r in responses)
    proposed = sum(r.proposed for r in responses)
    accepted = sum(r.accepted for r in responses)
    verifications = sum(r.verifications for r in responses)
    metrics: dict[str, float] = {}
    if verifications:
        metrics["tlt/accept_len"] = (accepted + verifications) / verifications
    if proposed:
        metrics["tlt/accept_rate"] = accepted / proposed
    if tokens:
        drafted = min(1.0, (accepted + verifications) / tokens)
        metrics["tlt/draft_share/eagle"] = drafted
        metrics["tlt/draft_share/off"] = 1.0 - drafted
    if generation_s > 0:
        metrics["tlt/tokens_per_s"] = tokens / generation_s
    return metrics


class EngineMetrics:
    """The metrics of a step from the replicas' states (`TLTWorker.state`), which count since their start."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, float]] = {}

    def step(self, states: Sequence[dict]) -> dict[str, float]:
        """Counters are what this step did, on all replicas that answered.

        `tlt/drafter/version` is the oldest that serves, `tlt/drafter/drafting` the share of the replicas that draft,
        `tlt/drafter/pause_ms` how long a scheduler stood still for its last publication, at most.

        Args:
            states: one a replica, in their order; empty where it does not speculate or did not answer.
        """
        metrics: dict[str, float] = {}
        for replica, state in enumerate(states):
            now = _engine_counters(state) if state else {}
            before = self._before.setdefault(replica, {})
            for name, total in now.items():
                began_again = total < before.get(name, 0.0)
                change = total - (0.0 if began_again else before.get(name, 0.0))
                metrics[name] = metrics.get(name, 0.0) + change
            before.update(now)
        self._spot(metrics, [state["spot"] for state in states if state and "spot" in state])
        metrics |= next((state["coordinator"] for state in states if state.get("coordinator")), {})
        drafters = [(state["drafter"], state["drafting"]) for state in states if state]
        if drafters:
            metrics["tlt/drafter/version"] = float(min(drafter["version"] for drafter, _ in drafters))
            metrics["tlt/drafter/drafting"] = sum(drafting for _, drafting in drafters) / len(drafters)
            metrics["tlt/drafter/pause_ms"] = float(max(drafter["pause_ms"] for drafter, _ in drafters))
        return metrics

    @staticmethod
    def _spot(metrics: dict[str, float], boards: Sequence[dict[str, Any]]) -> None:
        """What is not counted: `tlt/spot/harvest` is trained over idle time, of the step and of all replicas."""
        idle_s, trained_s = metrics.get("tlt/spot/idle_s", 0.0), metrics.get("tlt/spot/trained_s", 0.0)
        if idle_s > 0:
            metrics["tlt/spot/harvest"] = trained_s / idle_s
        if boards:
            metrics["tlt/spot/yield_ms_max"] = max(board["yield_ns_max"] for board in boards) / 1e6
        trained = [board for board in boards if board["trained_steps"]]
        for name in ("loss", "ce", "accept") if trained else ():
            metrics[f"tlt/drafter/{name}"] = sum(board[f"{name}_micro"] for board in trained) / len(trained) / 1e6
        judged = [board["gate_accept_micro"] for board in boards if board["gate_accept_micro"]]
        if judged:
            metrics["tlt/gate/accept_len"] = max(judged) / 1e6


_SPOT = {
    "tlt/spot/idle_s": ("idle_ns", 1e-9),
    "tlt/spot/trained_s": ("trained_ns", 1e-9),
    "tlt/spot/judged_s": ("judged_ns", 1e-9),
    "tlt/spot/windows": ("windows", 1.0),
    "tlt/spot/yields": ("yields", 1.0),
    "tlt/spot/failures": ("failures", 1.0),
    "tlt/spot/worker_starts": ("worker_starts", 1.0),
    "tlt/spot/host_failures": ("host_failures", 1.0),
    "tlt/spot/tokens": ("trained_tokens", 1.0),
    "tlt/gate/published": ("gate_published", 1.0),
    "tlt/gate/rejected": ("gate_rejected", 1.0),
}
"""Counters of a replica's board: the field and its unit's size."""


def _engine_counters(state: dict) -> dict[str, float]:
    """What one replica has counted since its start."""
    drafter, tap = state["drafter"], state["tap"]
    counted = {
        "tlt/drafter/published": float(drafter["published"]),
        "tlt/drafter/rejected": float(sum(drafter["rejected"].values())),
    }
    if "spot" in state:
        spot = state["spot"]
        counted |= {name: spot[field] * scale for name, (field, scale) in _SPOT.items()}
        for kind, counts in spot.get("counts", {}).items():
            counted |= {f"tlt/spot/{kind}/{cause}": float(count) for cause, count in counts.items()}
    names = ("segments", "tokens", "bytes", "dropped", "skipped", "overwritten", "failures")
    return counted | {f"tlt/tap/{name}": float(tap[name]) for name in names if name in tap}


def counters(extra_fields: dict, tokens: int) -> Counters:
    """The counters of one response from verl's `extra_fields`; a response without them was not drafted for."""
    return Counters(
        tokens=tokens,
        proposed=int(extra_fields.get("spec_num_draft_tokens", 0)),
        accepted=int(extra_fields.get("spec_num_accepted_tokens", 0)),
        verifications=int(extra_fields.get("spec_num_verify_steps", 0)),
    )
