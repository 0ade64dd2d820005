"""Which strategy a batch is drafted with: a bucketed epsilon-greedy bandit, after TLT's (arXiv 2511.16665, section 5).

Each range of batch sizes (a bucket) has the strategy that produced most tokens per second there, and now and then tries
another one: the likelier it is to be better, the oftener. Strategies are held for a few steps and judged by those; what
is known of them is in `beliefs`. "Never slower" is kept by an account: what trying has lost, measured, may be 1% of all
time (and of the first thousand steps, in advance), and plain decoding (`off`) is always one of the arms.

Pure Python; knows neither torch nor SGLang. Time comes in with the observations, chance with the constructor.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

from tlt_verl.config import StrategyConfig
from tlt_verl.engine.beliefs import Belief, Beliefs, Observation
from tlt_verl.strategy import OFF, Strategy

DWELL_STEPS = 4
"""Steps that a strategy is held and judged by. The first after a switch is not typical and comes on top, not judged."""
DWELL_REQUESTS = 8
"""Verified requests that an observation has at least: at batch size 1 a strategy is held for eight steps."""

LOSS_SHARE = 0.01
"""Most of the time that trying may lose, ..."""
_LOSS_CREDIT_STEPS = 1000  # ... as if so many steps had been before the first

_POLICY_VARIANCE = 0.01  # an update of the policy changes accept lengths by about 10%
_DRAFTER_VARIANCE = 0.25  # a new drafter may be another one altogether
_UNKNOWN = 1.0  # the chance of a strategy that nothing is known of
_LEAST_CHANCE = 0.02  # below it a strategy is not tried
_EAGER_DWELLS = 4  # in which a bucket is not known yet, and every other dwell tries
_STAYS = 0.02  # the best is replaced by what is better by 2%
_SLOWEST = 1.5  # a step counts as 1.5 times the median of its dwell at most: a hiccup is not the strategy's
_FREE_STEPS = 0.1  # what a try may lose in any case: as good as the best, it would never be known otherwise
_NEW_STEPS = 15  # what the account may be overdrawn by, in steps, to see what is new
_LEAST_STEPS = 3  # of a try: one that is not judged, two that show that it is hopeless
_FORMAT = 1


@dataclass
class Dwell:
    """A strategy held in a bucket. `lengths`, `requests` and `seconds` are of the steps that it is judged by."""

    arm: Strategy
    explores: bool
    lengths: Counter[int] = field(default_factory=Counter)
    requests: int = 0
    seconds: list[float] = field(default_factory=list)
    done: bool = False

    def observation(self) -> Observation:
        """What the judged steps say; there is at least one."""
        usual = _SLOWEST * median_low(self.seconds)
        elapsed_s = sum([min(seconds, usual) for seconds in self.seconds])
        return Observation(self.lengths, self.requests / elapsed_s, self.requests / len(self.seconds))


class Tuner:
    """The bandit.

    Args:
        arms: the strategies that may be used; `off` is added where it is missing.
        rng: where chance comes from. Ranks that must agree have the same seed and observe the same.
        buckets: upper edges of the ranges of batch sizes, ascending; one more range is above the last.
        epsilon: how often a dwell tries another strategy, once the bucket is known; 0 tries each strategy once.
        window: observations (dwells) of a strategy in a bucket that count.
        max_running_for_drafting: above this batch size it is `off`, and nothing is tried or learnt; None for no bound.
    """

    def __init__(
        self,
        arms: Iterable[Strategy],
        rng: random.Random,
        *,
        buckets: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        epsilon: float = 0.1,
        window: int = 16,
        max_running_for_drafting: int | None = None,
    ) -> None:
        self.arms = tuple(dict.fromkeys([OFF, *arms]))
        self._rng, self._epsilon, self._most = rng, epsilon, max_running_for_drafting
        self._beliefs = Beliefs(self.arms, buckets, window)
        count = len(self._beliefs.buckets)
        self._dwells: list[Dwell | None] = [None] * count
        self._dwells_since_change = [0] * count
        self._best: list[Strategy | None] = [None] * count
        self._available = self.arms
        self._published: set[str] = set()  # drafters of which nothing was seen since
        self._last: Strategy | None = None
        self._steps, self._total_s, self._lost_s, self._tried_steps = 0, 0.0, 0.0, 0
        self._ran: dict[tuple[int, Strategy], list[float]] = {}  # steps, tokens, seconds

    @classmethod
    def from_config(cls, config: StrategyConfig, rng: random.Random) -> Tuner:
        """The tuner that the options describe."""
        return cls(
            config.parsed(),
            rng,
            buckets=config.buckets,
            epsilon=config.epsilon,
            window=config.window,
            max_running_for_drafting=config.max_running_for_drafting,
        )

    def choose(self, batch_size: int) -> Strategy:
        """The strategy of the next step, for so many running requests."""
        if self._most is not None and batch_size > self._most:
            return OFF
        index = self._beliefs.bucket_of(batch_size)
        dwell = self._dwells[index]
        if dwell is None or dwell.done or dwell.arm not in self._available:
            dwell = self._dwells[index] = self._next(index, dwell, batch_size)
        return dwell.arm

    def observe(self, strategy: Strategy, batch_size: int, accept_lens: Sequence[int], elapsed_s: float) -> None:
        """What a step did.

        A step of another strategy than was chosen last is not learnt from: a result may come one choice later.

        Args:
            strategy: that the step ran with.
            batch_size: running requests that it had.
            accept_lens: tokens that it produced, a number for each request; 1 each where nothing is drafted.
            elapsed_s: seconds that it took. A step without requests or without time is ignored.
        """
        if not accept_lens or not 0 < elapsed_s < math.inf:
            return
        index, tokens = self._beliefs.bucket_of(batch_size), sum(accept_lens)
        self._count(index, strategy, tokens, elapsed_s)
        is_first, self._last = strategy != self._last, strategy
        dwell = self._dwells[index]
        if dwell is None or dwell.done or dwell.arm != strategy or (self._most is not None and batch_size > self._most):
            return
        if dwell.explores:
            self._charge(index, strategy, batch_size, tokens, elapsed_s)
        if is_first:
            return
        dwell.lengths.update(accept_lens)
        dwell.requests += len(accept_lens)
        dwell.seconds.append(elapsed_s)
        if self._is_over(index, dwell):
            dwell.done = True
            self._dwells_since_change[index] += 1
            self._published.discard(strategy.drafter)
            self._beliefs.learn(index, strategy, dwell.observation(), self._steps)

    def changed(self, drafter: str | None = None) -> None:
        """The policy was updated (None), or another version of this drafter serves: what was learnt counts little."""
        self._beliefs.changed(drafter, _POLICY_VARIANCE if drafter is None else _DRAFTER_VARIANCE)
        if drafter is not None:
            self._published.add(drafter)
        self._dwells = [None] * len(self._dwells)
        self._dwells_since_change = [0] * len(self._dwells)

    def available(self, drafters: Iterable[str]) -> None:
        """Only strategies of these drafters can run from now on, and `off`."""
        there = {*drafters, OFF.drafter}
        self._available = tuple(arm for arm in self.arms if arm.drafter in there)

    # --- choosing

    def _next(self, index: int, before: Dwell | None, batch_size: int) -> Dwell:
        """The dwell after `before`. Two in a row never try, so what is tried is compared with a fresh reading."""
        beliefs = {arm: self._beliefs.of(index, arm, self._steps) for arm in self._available}
        best = self._best[index] = self._best_of(index, beliefs)
        if before is not None and before.done and not before.explores:
            challenger = self._challenger(index, best, beliefs, batch_size)
            if challenger is not None:
                return Dwell(challenger, explores=True)
        return Dwell(best, explores=False)

    def _best_of(self, index: int, beliefs: dict[Strategy, Belief | None]) -> Strategy:
        """The highest mean of what was tried somewhere; `off` where nothing is known."""
        tried = self._beliefs.tried
        means = {arm: belief.mean for arm, belief in beliefs.items() if belief is not None and arm in tried}
        if (best := self._best[index]) in means:
            means[best] += _STAYS
        return max(means, key=means.__getitem__, default=OFF)

    def _challenger(
        self, index: int, best: Strategy, beliefs: dict[Strategy, Belief | None], batch_size: int
    ) -> Strategy | None:
        """Another strategy to try now, or None: what was never seen first, then by the chance to win."""
        chances = self._chances(index, best, beliefs, batch_size)
        if new := [arm for arm in chances if self._is_new(arm)]:
            return min(new, key=lambda arm: arm.num_draft_tokens)
        known = self._dwells_since_change[index]
        rate = max(self._epsilon, _EAGER_DWELLS / (_EAGER_DWELLS + known)) if self._epsilon else 0.0
        if not chances or self._rng.random() >= rate * max(chances.values()):
            return None
        return self._rng.choices(list(chances), list(chances.values()))[0]

    def _is_new(self, arm: Strategy) -> bool:
        """Whether nothing was seen of the strategy, or of its drafter since that was published."""
        return arm.drafter in self._published or arm not in self._beliefs.tried

    def _chances(
        self, index: int, best: Strategy, beliefs: dict[Strategy, Belief | None], batch_size: int
    ) -> dict[Strategy, float]:
        """What may be tried, and how likely each is to win; what the account cannot pay is left out."""
        mean_s = self._total_s / max(self._steps, 1)
        left_s = LOSS_SHARE * mean_s * (self._steps + _LOSS_CREDIT_STEPS) - self._lost_s
        found = {}
        for arm, belief in beliefs.items():
            chance = chance_to_win(belief, beliefs[best])
            if arm == best or chance <= _LEAST_CHANCE:
                continue
            may_lose_s = max(left_s + _NEW_STEPS * mean_s * self._is_new(arm), _FREE_STEPS * mean_s)
            if self._least_loss(index, arm, belief, beliefs[best], batch_size) <= may_lose_s:
                found[arm] = chance
        return found

    def _least_loss(
        self, index: int, arm: Strategy, belief: Belief | None, best: Belief | None, batch_size: int
    ) -> float:
        """Seconds that trying it loses if it is as bad as is believed, and is given up early; 0 if not known."""
        if belief is None or best is None:
            return 0.0
        share = 1 - math.exp(min(belief.mean - best.mean, 0.0))
        return _LEAST_STEPS * share * self._beliefs.seconds(index, arm, batch_size)

    # --- judging

    def _is_over(self, index: int, dwell: Dwell) -> bool:
        if dwell.requests < DWELL_REQUESTS or len(dwell.seconds) < 2:
            return False
        return len(dwell.seconds) >= DWELL_STEPS or (dwell.explores and self._is_hopeless(index, dwell))

    def _is_hopeless(self, index: int, dwell: Dwell) -> bool:
        """Whether what is tried is so far below the best that the rest of the dwell would only cost."""
        best = self._belief_of_best(index)
        if best is None:
            return False
        seen = dwell.observation()
        expected = self._beliefs.rate(index, best, seen.batch_size)
        difference = math.log(seen.accept_len() * seen.pace / expected)
        return difference < -2.5 * math.sqrt(self._beliefs.noise(dwell.requests))

    def _belief_of_best(self, index: int) -> Belief | None:
        best = self._best[index]
        return None if best is None else self._beliefs.of(index, best, self._steps)

    def _charge(self, index: int, arm: Strategy, batch_size: int, tokens: int, elapsed_s: float) -> None:
        """The time that the best strategy would not have needed for these tokens; what is won pays it back."""
        self._tried_steps += 1
        best = self._belief_of_best(index)
        if best is not None:
            usual_s = self._beliefs.seconds(index, arm, batch_size)
            elapsed_s = min(elapsed_s, 3 * usual_s) if usual_s else elapsed_s  # a hiccup is nobody's
            lost_s = elapsed_s - tokens / self._beliefs.rate(index, best, batch_size)
            self._lost_s = max(0.0, self._lost_s + lost_s)

    def _count(self, index: int, strategy: Strategy, tokens: int, elapsed_s: float) -> None:
        self._steps += 1
        self._total_s += elapsed_s
        ran = self._ran.setdefault((index, strategy), [0, 0, 0.0])
        ran[0] += 1
        ran[1] += tokens
        ran[2] += elapsed_s

    # --- reporting, keeping

    def best(self) -> dict[str, str]:
        """The best strategy of each bucket that was there."""
        names = [bucket.name for bucket in self._beliefs.buckets]
        return {name: str(best) for name, best in zip(names, self._best, strict=True) if best is not None}

    def metrics(self) -> dict[str, float]:
        """Counters since the start: `<bucket>/<strategy>/steps`, `…/tokens` and `…/seconds`, and what trying cost."""
        found: dict[str, float] = {
            "steps": self._steps,
            "tried_steps": self._tried_steps,
            "seconds": self._total_s,
            "lost_seconds": self._lost_s,
        }
        for (index, arm), ran in self._ran.items():
            prefix = f"{self._beliefs.buckets[index].name}/{arm}"
            found[f"{prefix}/steps"], found[f"{prefix}/tokens"], found[f"{prefix}/seconds"] = ran
        return found

    def state(self) -> dict[str, Any]:
        """What was learnt, JSON-able, for the run's checkpoint. A dwell that is not over is not part of it."""
        return {
            "format": _FORMAT,
            "account": [self._steps, self._total_s, self._lost_s],
            "best": self.best(),
            "beliefs": self._beliefs.state(self._steps),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; what it says of strategies or buckets that are not here is left out.

        Raises:
            ValueError: it is not a state that this version wrote.
        """
        if state.get("format") != _FORMAT:
            got = state.get("format")
            raise ValueError(f"the tuner's state: got format {got!r}, takes {_FORMAT}; begin without it")
        self._steps, self._total_s, self._lost_s = state["account"]
        self._beliefs.load_state(state["beliefs"], self._steps)
        arms = {str(arm): arm for arm in self.arms}
        self._best = [arms.get(state["best"].get(bucket.name, "")) for bucket in self._beliefs.buckets]
        self._dwells = [None] * len(self._dwells)


def chance_to_win(belief: Belief | None, best: Belief | None) -> float:
    """How plausible it is that a strategy is better than the best: 1 where they are equal, towards 0 where it is not.

    Twice the probability, both beliefs being normal.
    """
    if belief is None or best is None:
        return _UNKNOWN
    deviation = math.sqrt(2 * (belief.variance + best.variance))
    return min(1.0, math.erfc((best.mean - belief.mean) / deviation))
