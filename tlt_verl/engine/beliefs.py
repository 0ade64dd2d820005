"""What is known of each strategy at each batch size: how many tokens per second, and how sure that is.

Tokens per second are accept length times pace (verified requests per second). The reward of a strategy in a bucket is
the median of its last observations there. Where that says little, the two factors are known from elsewhere: accept
length hardly depends on the batch size, so what one bucket saw holds in all of them; pace does not depend on policy or
drafter, so it is kept when those change, and that of a neighbouring bucket is a first guess. So a drafter that accepts
nothing is tried once, not in every bucket. Knows nothing of choosing, of time or of chance.

All quantities are natural logarithms; a difference of 0.05 is 5%.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from tlt_verl.strategy import OFF, Strategy

_ACCEPT_SPREAD = 0.55
"""Relative standard deviation of the accept length of one request in one step: 0.25 to 0.6 for chains."""
_REWARD_SD = 0.05  # of an observation, beside what acceptance does
_ACCEPT_SD = 0.05  # of an arm's accept length between buckets
_DRIFT_PER_STEP = 1e-4  # variance: what was not looked at for 400 steps may be 20% off
_SIBLING_SD = 0.25  # of a guess from another strategy of the same drafter
_NEIGHBOUR_SD = 0.15  # of a guess from the next bucket
_SHRINKS = 0.75  # what is left of a difference in pace at half the batch size
_SLOPE_PRIOR = (0.025, 0.05)  # pace grows with the square root of the batch size until it is known


class Belief(NamedTuple):
    """The logarithm of tokens per second that a strategy is expected to produce, and its variance."""

    mean: float
    variance: float


class Observation(NamedTuple):
    """A strategy's steps in a row, in one bucket.

    `lengths` has how many verified requests had which accept length; `pace` is verified requests per second, and
    `batch_size` the average.
    """

    lengths: Mapping[int, int]
    pace: float
    batch_size: float

    @property
    def requests(self) -> int:
        """How many were verified, each as often as there were steps."""
        return sum(self.lengths.values())

    def accept_len(self, num_steps: int | None = None) -> float:
        """Tokens per verification; of a chain that is cut to so many steps, had it been one."""
        most = math.inf if num_steps is None else num_steps + 1
        return sum(min(length, most) * count for length, count in self.lengths.items()) / self.requests


@dataclass
class Cell:
    """What was seen of one strategy in one bucket; `age` is the step of the last observation."""

    rewards: deque[float]
    paces: deque[float]
    doubt: float = 0.0
    seen: int = 0
    reward: float = 0.0
    pace: float = 0.0
    last: tuple[float, float] | None = None  # logarithms of batch size and pace of the last observation


@dataclass
class Bucket:
    """One range of batch sizes: a cell for each strategy that ran in it, and how pace grows with the batch size."""

    name: str
    edge: float
    cells: dict[Strategy, Cell] = field(default_factory=dict)
    slope: tuple[float, float] = _SLOPE_PRIOR  # sums of products, of squares


@dataclass
class Acceptance:
    """The logarithm of a strategy's accept length, over all buckets; the accept rate of its drafts once it is asked."""

    mean: float
    variance: float
    seen: int
    rate: float | None = None


class Beliefs:
    """Beliefs about `arms` in the buckets with upper `edges`, each from the last `window` observations."""

    def __init__(self, arms: Sequence[Strategy], edges: Sequence[int], window: int) -> None:
        self.arms, self.window = tuple(arms), window
        self._edges = list(edges)
        self.buckets = [Bucket(str(edge), edge) for edge in edges]
        self.buckets.append(Bucket(f"above_{edges[-1]}", 2 * edges[-1]))
        self.tried: set[Strategy] = set()  # that were ever observed
        self._acceptance: dict[Strategy, Acceptance] = {}
        self._shorter = {arm: [other for other in arms if _is_cut_of(other, arm)] for arm in arms}

    def bucket_of(self, batch_size: int) -> int:
        """Index of the bucket: of the first edge that is not below the batch size."""
        return bisect.bisect_left(self._edges, batch_size)

    def noise(self, requests: float) -> float:
        """Variance of an observation of so many verified requests."""
        return _ACCEPT_SPREAD**2 / requests + _REWARD_SD**2

    def learn(self, index: int, arm: Strategy, seen: Observation, step: int) -> None:
        """Add an observation, made at this step."""
        self.tried.add(arm)
        bucket = self.buckets[index]
        cell = bucket.cells.setdefault(arm, Cell(deque(maxlen=self.window), deque(maxlen=self.window)))
        pace = self._at_edge(bucket, cell, seen)
        accept = math.log(seen.accept_len())
        cell.rewards.append(accept + pace)
        cell.paces.append(pace)
        cell.reward, cell.pace = median(cell.rewards), median(cell.paces)
        cell.doubt, cell.seen = (cell.doubt / 4 if len(cell.rewards) > 1 else 0.0), step
        if arm == OFF:
            return
        self._learn_acceptance(arm, accept, seen.requests, step)
        for shorter in self._shorter[arm]:  # what it would have accepted is known, too
            self._learn_acceptance(shorter, math.log(seen.accept_len(shorter.num_steps)), seen.requests, step)

    def changed(self, drafter: str | None, variance: float) -> None:
        """Accept lengths of the `drafter` (None: of all) are no more what they were, by about this variance.

        Every window is shrunk to its median, which the next observations outweigh, or emptied where even that would say
        less than what is known from other strategies of the drafter. Paces are kept.
        """
        for arm, known in self._acceptance.items():
            if drafter in (None, arm.drafter):
                known.variance += variance
        for bucket in self.buckets:
            for arm, cell in bucket.cells.items():
                if arm != OFF and drafter in (None, arm.drafter):
                    keeps = cell.rewards and variance < _SIBLING_SD**2
                    cell.rewards = deque([cell.reward] if keeps else [], maxlen=self.window)
                    cell.doubt += variance

    def of(self, index: int, arm: Strategy, step: int) -> Belief | None:
        """What is believed at this step; None where nothing is known to believe anything from."""
        prior = self._prior(index, arm, step)
        cell = self.buckets[index].cells.get(arm)
        if cell is None or not cell.rewards:
            return prior
        noise = self.noise(self._usual_requests(index))
        own = (noise + cell.doubt) / len(cell.rewards)
        if arm != OFF:
            own += _DRIFT_PER_STEP * (step - cell.seen)
        if prior is None:
            return Belief(cell.reward, own)
        weight = 1 / own
        weight_prior = 1 / prior.variance if prior.variance else 0.0
        total = weight + weight_prior
        return Belief((weight * cell.reward + weight_prior * prior.mean) / total, 1 / total)

    def seconds(self, index: int, arm: Strategy, batch_size: float) -> float:
        """Expected time of a step at a batch size of the bucket; 0 where nothing is known."""
        pace = self._pace(index, arm)
        return 0.0 if pace is None else batch_size / self.rate(index, pace, batch_size)

    def rate(self, index: int, belief: Belief, batch_size: float) -> float:
        """Tokens per second (or verified requests per second) at a batch size of the bucket."""
        bucket = self.buckets[index]
        return math.exp(belief.mean + self._exponent(bucket) * math.log(batch_size / bucket.edge))

    # --- the two factors

    def _prior(self, index: int, arm: Strategy, step: int) -> Belief | None:
        accept = self._accept(arm, step)
        pace = self._pace(index, arm) if accept is not None else None
        if accept is None or pace is None:
            return None
        return Belief(accept.mean + pace.mean, accept.variance + pace.variance)

    def _accept(self, arm: Strategy, step: int) -> Belief | None:
        if arm == OFF:
            return Belief(0.0, 0.0)
        own = self._own_accept(arm, step)
        if own is not None and own.variance < _SIBLING_SD**2:
            return own
        guesses = [self._accept_like(s, arm, step) for s in self._acceptance if s.drafter == arm.drafter and s != arm]
        return min([own, *guesses] if own is not None else guesses, key=lambda b: b.variance, default=None)

    def _own_accept(self, arm: Strategy, step: int) -> Belief | None:
        known = self._acceptance.get(arm)
        return None if known is None else Belief(known.mean, known.variance + _DRIFT_PER_STEP * (step - known.seen))

    def _accept_like(self, sibling: Strategy, arm: Strategy, step: int) -> Belief:
        """A guess from another strategy of the same drafter: its drafts would be accepted at the same rate."""
        known = self._acceptance[sibling]
        if known.rate is None:
            known.rate = accept_rate(math.exp(known.mean), sibling.num_steps)
        variance = known.variance + _DRIFT_PER_STEP * (step - known.seen) + _SIBLING_SD**2
        return Belief(math.log(accept_len(known.rate, arm.num_steps)), variance)

    def _learn_acceptance(self, arm: Strategy, accept: float, requests: int, step: int) -> None:
        """A Kalman filter's step: the mean follows a random walk."""
        noise = _ACCEPT_SPREAD**2 / requests + _ACCEPT_SD**2
        known = self._acceptance.get(arm)
        if known is None:
            self._acceptance[arm] = Acceptance(accept, noise, step)
            return
        variance = known.variance + _DRIFT_PER_STEP * (step - known.seen)
        gain = variance / (variance + noise)
        known.mean, known.rate = known.mean + gain * (accept - known.mean), None
        known.variance, known.seen = max(variance * (1 - gain), _ACCEPT_SD**2), step

    def _pace(self, index: int, arm: Strategy) -> Belief | None:
        """Measured here, or in the nearest bucket, or guessed from another strategy of the same drafter."""
        cells = self.buckets[index].cells
        if arm in cells:
            return Belief(cells[arm].pace, _REWARD_SD**2 / len(cells[arm].paces))
        siblings = [s for s in self.arms if s.drafter == arm.drafter and s != OFF and s in self.tried]
        if with_arm := [i for i, bucket in enumerate(self.buckets) if arm in bucket.cells]:
            nearest = min(with_arm, key=lambda i: (abs(i - index), -i))
            here = [s for s in siblings if s in cells]
            if not here or OFF not in cells or cells.keys() & self.buckets[nearest].cells.keys():
                return Belief(self._moved(nearest, index, arm), _NEIGHBOUR_SD**2 * abs(nearest - index))
            siblings = here
        if not siblings or OFF not in self.tried:
            return None
        sibling = min(siblings, key=lambda s: (s.topk != arm.topk, abs(s.num_draft_tokens - arm.num_draft_tokens)))
        return self._pace_like(index, sibling, arm)

    def _pace_like(self, index: int, sibling: Strategy, arm: Strategy) -> Belief | None:
        """A guess from another strategy of the same drafter: a draft token takes as long in either."""
        known, plain = self._pace(index, sibling), self._pace(index, OFF)
        if known is None or plain is None:
            return None
        plain_s, known_s = math.exp(-plain.mean), math.exp(-known.mean)
        per_draft_s = max(known_s - plain_s, 0.0) / (sibling.num_draft_tokens - 1)
        deviation = _SIBLING_SD * (1 if sibling.topk == arm.topk else 2)
        return Belief(-math.log(plain_s + per_draft_s * (arm.num_draft_tokens - 1)), known.variance + deviation**2)

    def _moved(self, source: int, index: int, arm: Strategy) -> float:
        """The pace that a strategy has in the bucket `source`, as it would be in the bucket `index`: it keeps its
        distance, as far as the batch size lets it, to what was seen in both, most often here.
        """
        there, here = self.buckets[source].cells, self.buckets[index].cells
        shared = [s for s in there if s in here]
        anchor = max(shared, key=lambda s: (len(here[s].paces), s.drafter == arm.drafter), default=None)
        if anchor is None:
            anchor, here = (OFF if OFF in there else arm), there
        return here[anchor].pace + _SHRINKS ** (source - index) * (there[arm].pace - there[anchor].pace)

    # --- inside a bucket

    def _usual_requests(self, index: int) -> float:
        return max(8.0, 3.0 * self.buckets[index].edge)

    def _exponent(self, bucket: Bucket) -> float:
        return min(max(bucket.slope[0] / bucket.slope[1], 0.0), 1.0)

    def _at_edge(self, bucket: Bucket, cell: Cell, seen: Observation) -> float:
        """The pace as it would be at the bucket's edge: so it compares with what was seen at another batch size."""
        size, pace = math.log(seen.batch_size), math.log(seen.pace)
        if cell.last is not None:
            dx = size - cell.last[0]
            dy = min(max(pace - cell.last[1], -abs(dx)), abs(dx))
            products, squares = bucket.slope
            bucket.slope = (0.98 * products + dx * dy, max(0.98 * squares + dx * dx, 1e-6))
        cell.last = size, pace
        return pace + self._exponent(bucket) * (math.log(bucket.edge) - size)

    # --- to be kept

    def state(self, step: int) -> dict[str, Any]:
        """All of it in plain containers; steps are stored as ages."""
        return {
            "acceptance": {str(arm): [a.mean, a.variance, step - a.seen] for arm, a in self._acceptance.items()},
            "buckets": {
                bucket.name: {
                    "slope": list(bucket.slope),
                    "cells": {str(arm): _cell_state(cell, step) for arm, cell in bucket.cells.items()},
                }
                for bucket in self.buckets
            },
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Take what `state` returned, as far as it is of the same arms and buckets."""
        arms = {str(arm): arm for arm in self.arms}
        for name, (mean, variance, age) in _known(state["acceptance"], arms):
            self._acceptance[arms[name]] = Acceptance(mean, variance, step - age)
        buckets = {bucket.name: bucket for bucket in self.buckets}
        for name, kept in _known(state["buckets"], buckets):
            buckets[name].slope = (float(kept["slope"][0]), float(kept["slope"][1]))
            for arm, cell in _known(kept["cells"], arms):
                buckets[name].cells[arms[arm]] = _cell(cell, self.window, step)
                self.tried.add(arms[arm])


def _is_cut_of(chain: Strategy, longer: Strategy) -> bool:
    """Whether both are chains of one drafter, and the first the beginning of the second."""
    same = chain.drafter == longer.drafter and chain.topk == longer.topk == 1
    return same and chain.num_steps < longer.num_steps


def accept_len(rate: float, num_steps: int) -> float:
    """Expected tokens per verification of a chain, each of whose drafts is accepted at this rate, if its parent was."""
    return sum(rate**i for i in range(num_steps + 1))


def accept_rate(length: float, num_steps: int) -> float:
    """The accept rate at which a chain has this expected accept length (the inverse of `accept_len`), 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if accept_len(middle, num_steps) < length else (low, middle)
    return (low + high) / 2


def _known(entries: dict[str, Any], names: Iterable[str]) -> Iterable[tuple[str, Any]]:
    return [(name, entry) for name, entry in entries.items() if name in names]


def _cell_state(cell: Cell, step: int) -> dict[str, Any]:
    return {
        "rewards": list(cell.rewards),
        "paces": list(cell.paces),
        "doubt": cell.doubt,
        "age": step - cell.seen,
    }


def _cell(kept: dict[str, Any], window: int, step: int) -> Cell:
    rewards, paces = deque(kept["rewards"], maxlen=window), deque(kept["paces"], maxlen=window)
    return Cell(rewards, paces, kept["doubt"], step - kept["age"], median(rewards or [0.0]), median(paces))
