"""An engine that only says how long its steps take and what they accept: to see what a tuner does, without a model.

A step takes the time that a table of measured times says, times noise; each request accepts drafts at a rate, one after
the other until the first refusal. The first step after a switch takes longer, and the first ones after plain decoding
accept less, as the drafter's cache lacks what was decoded. Knows neither torch nor SGLang, nor any tuner.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tlt_verl.strategy import OFF, Strategy


class Policy(Protocol):
    """What chooses strategies and learns from steps: a tuner, or what it is compared with."""

    def choose(self, batch_size: int) -> Strategy:
        """The strategy of the next step."""
        ...

    def observe(self, strategy: Strategy, batch_size: int, accept_lens: Sequence[int], elapsed_s: float) -> None:
        """What the step did."""
        ...


class Fixed:
    """Always one strategy."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def choose(self, batch_size: int) -> Strategy:
        """The same."""
        return self._strategy

    def observe(self, strategy: Strategy, batch_size: int, accept_lens: Sequence[int], elapsed_s: float) -> None:
        """Learns nothing."""


class Costs:
    """Seconds of a step by strategy and batch size, from a few measured ones: `{strategy: {batch size: ms}}`.

    Between two measured batch sizes the time is on a line; beyond them it goes on as the nearest line does.
    """

    def __init__(self, table: Mapping[str, Mapping[int, float]]) -> None:
        self._rows = {Strategy.parse(name): sorted(row.items()) for name, row in table.items()}

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All that the table has times of."""
        return tuple(self._rows)

    def seconds(self, strategy: Strategy, batch_size: int) -> float:
        """Of one step; without noise.

        Raises:
            KeyError: the table has no row of the strategy.
        """
        row = self._rows[strategy]
        at = min(max(bisect.bisect_left(row, (batch_size, 0.0)), 1), len(row) - 1)
        (low, low_ms), (high, high_ms) = row[at - 1], row[at]
        return (low_ms + (high_ms - low_ms) * (batch_size - low) / (high - low)) / 1e3


CPU = Costs(
    {
        "off": {1: 44, 2: 55, 8: 95, 32: 180},
        "eagle:1x1@2": {1: 48, 8: 105, 32: 230},
        "eagle:3x1@4": {1: 56, 8: 125, 32: 330},
        "eagle:7x1@8": {1: 70, 8: 165, 32: 480},
    }
)
"""SmolLM2-135M on two cores: measured, but for `eagle:1x1@2`, which lies on a line between its neighbours."""

GPU = Costs(
    {
        "off": {1: 12.0, 8: 12.5, 32: 14, 64: 17, 128: 24},
        "eagle:1x1@2": {1: 13.5, 8: 14.3, 32: 25, 64: 40, 128: 70},
        "eagle:3x1@4": {1: 16, 8: 17, 32: 40, 64: 75, 128: 150},
        "eagle:7x1@8": {1: 21, 8: 24, 32: 62, 64: 120, 128: 240},
        "eagle:6x4@24": {1: 22, 2: 23, 8: 34, 32: 120, 64: 240, 128: 480},
    }
)
"""As on a GPU, made up: speculation pays at small batches and costs at large ones, trees pay at one or two requests."""


@dataclass(frozen=True)
class Noise:
    """How steps differ: `sd` relative deviation of a step's time, and `hiccups` of them take ten times as long.

    `first_step` is how much longer the first after a switch takes; `missed` is the share of the accept rate that is
    gone after plain decoding, and comes back within about `recovers` steps.
    """

    sd: float = 0.05
    hiccups: float = 0.005
    first_step: float = 0.2
    missed: float = 0.5
    recovers: float = 2.0


class SimulatedEngine:
    """Runs steps. `elapsed_s` is the time that they took, `usual_s` the same without noise and hiccups: without luck.

    Args:
        costs: how long they take.
        rates: accept rate of a draft of each strategy, if its parent was accepted; 0 where a strategy is not named. May
            be changed while the engine runs.
        rng: where chance comes from.
        noise: how much of it there is.
        load: what the time of a step is multiplied with, given the seconds that have passed; 1 by default.
    """

    def __init__(
        self,
        costs: Costs,
        rates: Mapping[Strategy, float],
        rng: random.Random,
        noise: Noise | None = None,
        load: Callable[[float], float] = lambda elapsed_s: 1.0,
    ) -> None:
        self.costs, self.rates = costs, rates
        self.elapsed_s = self.usual_s = 0.0
        self._rng, self._noise, self._load = rng, noise or Noise(), load
        self._last, self._since_plain = OFF, math.inf

    def step(self, strategy: Strategy, batch_size: int) -> tuple[list[int], float]:
        """Accept lengths of `batch_size` requests, and seconds."""
        elapsed_s = self._seconds(strategy, batch_size)
        self._since_plain = 0 if strategy == OFF else self._since_plain + 1
        self._last = strategy
        missed = self._noise.missed * math.exp(-self._since_plain / self._noise.recovers)
        rate = self.rates.get(strategy, 0.0) * (1 - missed)
        self.elapsed_s += elapsed_s
        return [self._accept_len(rate, strategy.num_steps) for _ in range(batch_size)], elapsed_s

    def expected(self, strategy: Strategy, batch_size: int) -> float:
        """Tokens per second without noise and without switches."""
        rate = self.rates.get(strategy, 0.0)
        tokens = batch_size * sum(rate**i for i in range(strategy.num_steps + 1))
        return tokens / self.costs.seconds(strategy, batch_size)

    def best(self, batch_size: int) -> Strategy:
        """The fixed strategy that produces most at this batch size."""
        return max(self.costs.strategies, key=lambda strategy: self.expected(strategy, batch_size))

    def _seconds(self, strategy: Strategy, batch_size: int) -> float:
        seconds = self.costs.seconds(strategy, batch_size) * self._load(self.elapsed_s)
        if strategy != self._last:
            seconds *= 1 + self._noise.first_step
        self.usual_s += seconds
        if self._rng.random() < self._noise.hiccups:
            seconds *= 10
        return seconds * math.exp(self._rng.gauss(0.0, self._noise.sd))

    def _accept_len(self, rate: float, num_steps: int) -> int:
        length, random = 1, self._rng.random
        while length <= num_steps and random() < rate:
            length += 1
        return length


class Rollouts(NamedTuple):
    """What the rollouts of one policy took, and produced."""

    seconds: float
    steps: int
    tokens: int


def response_lengths(count: int, rng: random.Random, median: float = 64.0, sd: float = 0.6) -> list[int]:
    """Tokens of each response: log-normal, as those of reasoning models are (`sd` of the logarithm)."""
    return [max(1, round(median * math.exp(rng.gauss(0.0, sd)))) for _ in range(count)]


def roll_out(policy: Policy, engine: SimulatedEngine, lengths: Sequence[int]) -> Rollouts:
    """Run responses of these lengths to their ends, all from the beginning: batches shrink, the longest ends alone."""
    left = list(lengths)
    seconds, steps = 0.0, 0
    while left:
        strategy = policy.choose(len(left))
        accept_lens, elapsed_s = engine.step(strategy, len(left))
        policy.observe(strategy, len(left), accept_lens, elapsed_s)
        left = [tokens - done for tokens, done in zip(left, accept_lens, strict=True) if tokens > done]
        seconds, steps = seconds + elapsed_s, steps + 1
    return Rollouts(seconds, steps, sum(lengths))
