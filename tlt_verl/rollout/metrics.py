"""The metrics of a step, from what each response reports. Pure arithmetic; knows neither Ray nor SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
        self._before: dict[str, float] = {}

    def step(self, states: Sequence[dict]) -> dict[str, float]:
        """`tlt/drafter/version` is the oldest that serves; the others count what this step did, on all replicas.

        Args:
            states: one a replica; empty ones do not speculate.
        """
        states = [state for state in states if state]
        if not states:
            return {}
        totals = {"tlt/drafter/rejected": float(sum(sum(s["drafter"]["rejected"].values()) for s in states))}
        for name in ("segments", "tokens", "bytes", "dropped", "overwritten", "failures"):
            if any(name in state["tap"] for state in states):
                totals[f"tlt/tap/{name}"] = float(sum(state["tap"].get(name, 0) for state in states))
        metrics = {name: total - self._before.get(name, 0.0) for name, total in totals.items()}
        self._before = totals
        return {**metrics, "tlt/drafter/version": float(min(state["drafter"]["version"] for state in states))}


def counters(extra_fields: dict, tokens: int) -> Counters:
    """The counters of one response from verl's `extra_fields`; a response without them was not drafted for."""
    return Counters(
        tokens=tokens,
        proposed=int(extra_fields.get("spec_num_draft_tokens", 0)),
        accepted=int(extra_fields.get("spec_num_accepted_tokens", 0)),
        verifications=int(extra_fields.get("spec_num_verify_steps", 0)),
    )
