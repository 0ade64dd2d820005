"""The metrics of a step, from what each response reports. Pure arithmetic; knows neither Ray nor SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counters:
    """What one response reports: tokens it has, and what speculation did for it (0 where it did nothing)."""

    tokens: int
    accepted: int
    verifications: int


def step_metrics(responses: Sequence[Counters], generation_s: float) -> dict[str, float]:
    """Metrics of one step, under the names of verl's logger.

    `tlt/accept_len` is tokens produced per verification, the bonus token included, over the step's tokens, so a long
    response counts as much as it took; `tlt/draft_share/off` the share of the tokens that nobody drafted for. Ratios
    without a denominator are left out. What the strategies did is `EngineMetrics`' to say.

    Args:
        generation_s: wall time of the step's generation, seconds.
    """
    tokens = sum(r.tokens for r in responses)
    accepted = sum(r.accepted for r in responses)
    verifications = sum(r.verifications for r in responses)
    metrics: dict[str, float] = {}
    if verifications:
        metrics["tlt/accept_len"] = (accepted + verifications) / verifications
    if tokens:
        metrics["tlt/draft_share/off"] = 1.0 - min(1.0, (accepted + verifications) / tokens)
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
        `tlt/drafter/pause_ms` how long a scheduler stood still for its last publication, at most. `tlt/accept_rate` is
        accepted over verified drafts; `tlt/draft_share/*` the shares of what decoding produced by who drafted it;
        `tlt/tuner/<batch sizes>/<strategy>` the share of the steps at these batch sizes that ran with it.

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
        _strategies(metrics)
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


_COUNT = "count/"  # of a counter that is not a metric itself: it goes into ratios


def _strategies(metrics: dict[str, float]) -> None:
    """Shares and rates from the step's counts of strategies, in their place."""
    counts = {name.removeprefix(_COUNT): metrics.pop(name) for name in list(metrics) if name.startswith(_COUNT)}
    tokens, drafts, accepted = (
        sum(count for name, count in counts.items() if name.startswith(f"{what}/"))
        for what in ("tokens", "drafts", "accepted")
    )
    if drafts:
        metrics["tlt/accept_rate"] = accepted / drafts
    if tokens:
        for drafter in ("eagle", "ngram", "off"):
            metrics[f"tlt/draft_share/{drafter}"] = counts.get(f"tokens/{drafter}", 0.0) / tokens
    steps = {name.removeprefix("steps/"): n for name, n in counts.items() if name.startswith("steps/")}
    for name, count in steps.items():
        bucket = name.partition("/")[0]
        if all_steps := sum(n for other, n in steps.items() if other.partition("/")[0] == bucket):
            metrics[f"tlt/tuner/{name}"] = count / all_steps


def _strategy_counters(speculation: dict) -> dict[str, float]:
    """What one replica's strategies have counted since its start."""
    counted: dict[str, float] = {}
    for strategy, counts in speculation.get("strategies", {}).items():
        drafter = strategy.partition(":")[0]
        for what, count in (
            (f"tokens/{drafter}", counts["tokens"]),
            (f"drafts/{drafter}", counts["drafts"]),
            (f"accepted/{drafter}", counts["tokens"] - counts["verified"]),
        ):
            counted[_COUNT + what] = counted.get(_COUNT + what, 0.0) + count
    for name, value in speculation.get("tuner", {}).items():
        if name.endswith("/steps"):
            counted[f"{_COUNT}steps/{name.removesuffix('/steps')}"] = value
        elif name == "lost_seconds":
            counted["tlt/tuner/lost_s"] = value
    return counted


def _engine_counters(state: dict) -> dict[str, float]:
    """What one replica has counted since its start."""
    drafter, tap = state["drafter"], state["tap"]
    counted = {
        "tlt/drafter/published": float(drafter["published"]),
        "tlt/drafter/rejected": float(sum(drafter["rejected"].values())),
    }
    counted |= _strategy_counters(state.get("speculation", {}))
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
        accepted=int(extra_fields.get("spec_num_accepted_tokens", 0)),
        verifications=int(extra_fields.get("spec_num_verify_steps", 0)),
    )
