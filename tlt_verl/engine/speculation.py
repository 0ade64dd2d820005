"""How each step of a scheduler's loop is drafted: which strategy runs, what it needs, what is learnt from it.

Between two steps the tuner names a strategy for the batch, the arm of that strategy is set, and the drafter's cache is
made whole where it fell behind. When a step's result is processed, its time and its accept lengths go to the tuner and
its tokens to the model-free drafter. Losslessness does not depend on any of it: every strategy is verified alike.

Knows SGLang's batches; what is a good choice is the tuner's to know, what a tree looks like the drafters'.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tlt_verl.config import StrategyConfig
from tlt_verl.engine.arms import Arm, Arms, own_strategy, plan_graphs
from tlt_verl.engine.catch_up import CatchUp
from tlt_verl.engine.graph_plan import GraphPlan
from tlt_verl.engine.ngram_draft import NgramDrafter
from tlt_verl.engine.options import EngineOptions
from tlt_verl.engine.tuner import Tuner
from tlt_verl.strategy import OFF, Strategy

logger = logging.getLogger(__name__)

_STRATEGY = "tlt_strategy"  # attribute of a GenerationBatchResult

EAGLE, NGRAM = "eagle", "ngram"


class Speculation:
    """The strategies of one scheduler.

    Args:
        worker: an `EAGLEWorkerV2` whose own backends and graphs are there.
        options: the strategies and how one is chosen.
        agree: what all tensor-parallel ranks do, from what each of them would.
        clock: seconds.
    """

    def __init__(
        self,
        worker: Any,
        options: EngineOptions,
        agree: Callable[[int], int] = int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        own = own_strategy(worker)
        strategies = options.strategies() or (own,)
        self.arms = Arms(worker, plan_of(worker, options))
        self._list = list(dict.fromkeys([OFF, *strategies]))
        self._agree, self._clock = agree, clock
        self._rng = random.Random(options.seed)
        self._random = options.choose_at_random
        self._fixed = strategies[0] if options.is_fixed else None
        chooses = self._fixed is None and not self._random
        self.tuner = Tuner.from_config(StrategyConfig(**options.strategy), self._rng) if chooses else None
        self._catch_up = CatchUp(worker._draft_worker)
        self._catches_up = any(strategy.drafter == EAGLE for strategy in strategies)
        proposes = any(strategy.drafter == NGRAM for strategy in strategies)
        self._ngram = NgramDrafter(worker.target_worker) if proposes else None
        self.trained = True
        """Whether the trained drafter may be drafted with."""
        self._skipped: tuple[Any, ...] | None = None
        self._before_s: float | None = None
        self.counts: dict[Strategy, Counter[str]] = {strategy: Counter() for strategy in self._list}
        """Of each strategy: `steps`, `verified` requests, `tokens` and `drafts` that were verified."""
        self.arms.start(self._fixed or OFF)

    # --- between two steps

    def may_draft(self, trained: bool) -> None:
        """Whether there is a trained drafter that may serve."""
        self.trained = trained
        if self.tuner is not None:
            self.tuner.available({NGRAM, EAGLE} if trained else {NGRAM})

    def policy_changed(self) -> None:
        """The policy was updated: what was learnt of it counts less."""
        if self.tuner is not None:
            self.tuner.changed()
        if self._ngram is not None:
            self._ngram.epoch += 1

    def drafter_changed(self) -> None:
        """Another trained drafter serves."""
        if self.tuner is not None:
            self.tuner.changed(EAGLE)

    def before_decode(self, batch: Any) -> Arm:
        """Choose a strategy, set its arm, and make ready what it reads."""
        self._note_skipped()
        arm = self.arms.apply(self._choose(len(batch.reqs)))
        if arm.draft is not None and batch.spec_info is not None:
            self._catch_up.close(batch)
            _fit(batch.spec_info, arm.strategy.topk)
        return arm

    def after_decode(self, batch: Any, result: Any, arm: Arm) -> None:
        """Note what the drafter has not read, and make what the next step reads as wide as any strategy needs."""
        setattr(result, _STRATEGY, arm.strategy)
        if arm.draft is None and self._catches_up and self.trained and not batch.forward_mode.is_idle():
            hidden = result.logits_output.hidden_states
            if result.can_run_cuda_graph:  # a captured graph writes its next answer to the same memory
                hidden = hidden.clone()
            lens = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens
            self._skipped = (list(batch.reqs), lens.clone(), result, hidden)
        if self._ngram is not None:
            self._ngram.launched(batch, result)
        _fit(result.next_draft_input, self.arms.most_topk)

    def after_prefill(self, batch: Any, result: Any) -> None:
        """The drafter has read the prompts."""
        self._note_skipped()
        self._catch_up.forget(batch.reqs)
        if self._ngram is not None:
            self._ngram.launched(batch, result)
        _fit(result.next_draft_input, self.arms.most_topk)
        self._before_s = None

    def drafts(self, batch: Any) -> Any:
        """The tree of the model-free drafter that is to be verified."""
        assert self._ngram is not None
        return self._ngram.verify_input(batch, self.arms.active.strategy)

    # --- behind a step

    def processed(self, batch: Any, result: Any, live: Sequence[bool]) -> None:
        """A result has been processed: what the step was worth."""
        if self._ngram is not None:
            self._ngram.read(batch.reqs)
        now, before = self._clock(), self._before_s
        strategy = getattr(result, _STRATEGY, None)
        self._before_s = now if strategy is not None else None
        if strategy is None:
            return
        lens = [n for n, is_live in zip(result.accept_lens.tolist(), live, strict=True) if is_live]
        counts = self.counts[strategy]
        counts["steps"] += 1
        counts["verified"] += len(lens)
        counts["tokens"] += sum(lens)
        counts["drafts"] += len(lens) * max(strategy.num_draft_tokens - 1, 0)
        if self.tuner is not None and before is not None and lens:
            self.tuner.observe(strategy, len(lens), lens, now - before)

    def idle(self) -> None:
        """Nothing is running."""
        self._before_s, self._skipped = None, None
        if self._ngram is not None:
            self._ngram.forget()

    def save_tuner(self, path: Path) -> bool:
        """Write what the tuner has learnt; False where there is none, or it cannot be written (the log says why)."""
        if self.tuner is None:
            return False
        try:
            path.write_text(json.dumps(self.tuner.state()), encoding="utf-8")
        except OSError as error:
            logger.error("tlt: the tuner's state is not written: %s", error)
            return False
        return True

    def load_tuner(self, path: Path) -> bool:
        """Go on from what `save_tuner` wrote; False where it cannot be used (the log says why)."""
        if self.tuner is None:
            return False
        try:
            self.tuner.load_state(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("tlt: the tuner begins anew: %s", error)
            return False
        return True

    def state(self) -> dict[str, Any]:
        """Counters, for the engine's front."""
        found: dict[str, Any] = {"strategies": {str(s): dict(c) for s, c in self.counts.items() if c}}
        found["caught_up_tokens"] = self._catch_up.tokens
        if self.tuner is not None:
            found["tuner"], found["best"] = self.tuner.metrics(), self.tuner.best()
        if self._ngram is not None:
            found["ngram"] = self._ngram.metrics()
        return found

    # --- parts

    def _choose(self, batch_size: int) -> Strategy:
        if self._fixed is not None:
            return self._fixed if self.trained or self._fixed.drafter != EAGLE else OFF
        if self._random:
            return self._list[self._agree(self._rng.choice(self._usable()))]
        assert self.tuner is not None
        return self._list[self._agree(self._list.index(self.tuner.choose(batch_size)))]

    def _usable(self) -> list[int]:
        return [i for i, strategy in enumerate(self._list) if self.trained or strategy.drafter != EAGLE]

    def _note_skipped(self) -> None:
        """What the last step's tokens were is known by now, or waited for."""
        if self._skipped is None:
            return
        reqs, lens, result, hidden = self._skipped
        self._skipped = None
        counts = [1] * len(reqs) if result.speculative_num_draft_tokens == 1 else result.accept_lens.tolist()
        self._catch_up.note(reqs, lens.tolist(), counts, result.next_token_ids, hidden)


def plan_of(worker: Any, options: EngineOptions) -> GraphPlan:
    """The graphs of what the options let run, once SGLang's memory pools are there. Only a tuner is bounded."""
    if not options.strategies():
        return plan_graphs(worker, (own_strategy(worker),))
    most = None if options.choose_at_random else StrategyConfig(**options.strategy).max_running_for_drafting
    return plan_graphs(worker, options.strategies(), most)


def _fit(info: Any, topk: int) -> None:
    """Make a draft input's candidates [B, topk] wide: the likeliest, or padded with some that are never likely."""
    have = info.topk_p.shape[1]
    if have > topk:
        info.topk_p, info.topk_index = info.topk_p[:, :topk], info.topk_index[:, :topk]
    elif have < topk:
        pad = (0, topk - have)
        info.topk_p = torch.nn.functional.pad(info.topk_p, pad)
        info.topk_index = torch.nn.functional.pad(info.topk_index, pad)
