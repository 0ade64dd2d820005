"""The warm-up: rollouts and training in turn, publications into the engine that rolls out, and two measurements.

Wall time, not steps, is what it is given. Cycle by cycle the rollouts get faster, because the drafter that is being
trained drafts for them. Before and after, accept length is measured in the engine on prompts that are never rolled out
otherwise; the same responses are replayed, to compare what the trainer computes with what the engine does.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from tlt_verl.config import ConfigError
from tlt_verl.drafter.checkpoint import load_checkpoint
from tlt_verl.drafter.prepare import prepare_drafter
from tlt_verl.drafter.trainer import StepReport
from tlt_verl.drafter.versions import latest
from tlt_verl.engine.offline import OfflineEngine, Rollouts
from tlt_verl.segments import Segment
from tlt_verl.spot.gate import Gate
from tlt_verl.warmup.learner import Learner
from tlt_verl.warmup.options import WarmupOptions
from tlt_verl.warmup.prompts import read_prompts, split_prompts
from tlt_verl.warmup.responses import whole_samples

CYCLES = ((0.15, 0.20), (0.10, 0.20), (0.05, 0.22))
"""Shares of the time behind the engine's start: rollouts, then training, cycle by cycle. The rest is for measuring."""

_LEAST_MEASURE_S = 15.0
_LEAST_ACCEPT_LEN = 1.05
"""What the first drafter must reach. Whether it pays is told by the measurements at the end."""

_LEAST_S = 20.0  # behind the engine's start
_BEFORE_PROMPTS, _BEFORE_TOKENS = 8, 24  # an untrained drafter is slow


@dataclass(frozen=True)
class Measured:
    """Accept length in the engine, and what replaying the same responses gives.

    Args:
        accept_len, replayed: tokens per verification, the bonus token included.
        prompts: that were rolled out; ended: responses that ended in time, over which accept length is.
        tokens: produced.
        tokens_per_s: at the rollouts' batch.
    """

    accept_len: float
    replayed: float
    prompts: int
    ended: int
    tokens: int
    tokens_per_s: float


class Warmup:
    """One warm-up, from its options to its report.

    Raises:
        ConfigError, DrafterError: an option that cannot be used, before a model is loaded.
    """

    def __init__(self, options: WarmupOptions) -> None:
        from transformers import AutoTokenizer

        self._begin = time.monotonic()
        self.options = options
        self._config = options.target_config()
        tokenizer = AutoTokenizer.from_pretrained(options.target)
        self._eos = sorted({tokenizer.eos_token_id, *_as_list(self._config.get("eos_token_id"))} - {None})
        prompts = read_prompts(options.prompts, tokenizer)
        self._check_lengths(prompts)
        self._training, self._held_out = split_prompts(prompts, options.held_out, options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        found = latest(options.out)
        path = found or prepare_drafter(str(options.target), None, option="--out", target_option="--target")
        self._start, self._start_path = load_checkpoint(path), path if found else None
        self._serving: dict[str, torch.Tensor] | None = self._start.weights if found else None
        strategy = options.parsed_strategy()
        self._strategy, self._gate = strategy, Gate(strategy.num_steps, least=_LEAST_ACCEPT_LEN)
        self._gate.keep_rejected(options.out / "rejected")
        self._next_prompt = 0
        self._rejection = "none was trained"
        hot_size = 0 if self._start.hot is None else len(self._start.hot)
        if found and options.hot_vocab not in (None, hot_size):
            raise ConfigError(
                f"--hot-vocab: got {options.hot_vocab}, and --out has a drafter with {hot_size}; "
                "a drafter that goes on keeps its hot vocabulary. Leave it out, or choose another --out."
            )

    def run(self) -> dict[str, Any]:
        """Roll out, train, publish, measure; write `report.json` and return what is in it."""
        options = self.options
        total_s = 60 * options.minutes
        with tqdm(total=round(total_s), unit="s", bar_format="{l_bar}{bar}| {n}/{total} s {postfix}") as bar:
            self._bar = bar
            self._say("starting the engine")
            with self._engine() as engine:
                left_s = total_s - self._elapsed()
                if left_s < _LEAST_S:
                    started = f"the engine started after {self._elapsed():.0f} s"
                    raise ConfigError(f"--minutes: got {options.minutes}, and {started}; takes more than that")
                self._learner = self._make_learner(0.9 * left_s * sum(train for _, train in CYCLES))
                try:
                    report = self._with(engine, total_s - self._elapsed())
                finally:
                    self._learner.close()
            self._tick()
        (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def _with(self, engine: OfflineEngine, available_s: float) -> dict[str, Any]:
        before = None if self._start_path else self._measure_untrained(engine)
        rolled, stopped = Rollouts(), False
        for rollout_share, train_share in CYCLES:
            self._roll_out(engine, rollout_share * available_s, rolled)
            if self._learner.hot is None and self.options.hot_vocab != 0:
                self._learner.choose_hot(self.options.hot_vocab, self._eos)
            self._say("training")
            self._learner.train(train_share * available_s, self.options.tokens, self._show)
            self._publish(engine)
            if stopped := self.options.tokens is not None and self._learner.tokens >= self.options.tokens:
                break
        if self._serving is None:
            raise RuntimeError(f"no drafter was good enough to be published: {self._rejection}")
        self._say("measuring")
        left_s = max(_LEAST_MEASURE_S, 60 * self.options.minutes - self._elapsed())
        after = self._measure(engine, self._held_out, self.options.max_new_tokens, left_s)
        hot = self._learner.hot
        return {
            "minutes": self._elapsed() / 60,
            "stopped_by_tokens": stopped,
            "before": None if before is None else asdict(before),
            "after": asdict(after),
            "rollouts": {"tokens": rolled.tokens, "seconds": rolled.seconds},
            "trained": {"tokens": self._learner.tokens, "seconds": self._learner.trained_s},
            "hot_vocab": 0 if hot is None else len(hot),
            "version": engine.state()["drafter"]["version"],
            "gate": {"published": self._gate.published, "rejected": dict(self._gate.reasons)},
            "segments_lost": engine.lost_segments(),
            "checkpoint": str(latest(self.options.out)),
        }

    # --- parts

    def _engine(self) -> OfflineEngine:
        options = self.options
        length = self._longest + options.max_new_tokens + 32
        arguments = {
            "device": options.device,
            "dtype": options.dtype,
            "random_seed": options.seed,
            "max_total_tokens": options.batch * length,
            "context_length": length,
            **options.engine,
        }
        return OfflineEngine(
            options.target,
            self._start_path,
            self._strategy,
            publications=options.out,
            max_running=options.batch,
            **arguments,
        )

    def _make_learner(self, planned_s: float) -> Learner:
        options = self.options
        return Learner(
            options.target,
            self._config,
            self._start,
            options.out,
            num_steps=self._strategy.num_steps,
            pack_tokens=options.pack_tokens,
            lr=options.lr,
            planned_s=planned_s,
            begun=self._begin,
            seed=options.seed,
            device=options.device,
            dtype=options.dtype,
        )

    def _roll_out(self, engine: OfflineEngine, seconds: float, rolled: Rollouts) -> None:
        """Rollouts of the training prompts in their order, again and again, into the buffer."""
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            start = self._next_prompt
            done = engine.run(
                self._training[start:] + self._training[:start],
                self._sampling(self.options.max_new_tokens),
                seconds=left_s,
                on_segments=self._learner.buffer.add,
                on_progress=lambda done: self._say(f"rollouts: {rolled.tokens + done.tokens} tokens"),
            )
            self._next_prompt = (start + done.begun) % len(self._training)
            rolled.tokens += done.tokens
            rolled.seconds += done.seconds

    def _publish(self, engine: OfflineEngine) -> None:
        """Where the gate says so, save a checkpoint and let it serve. `latest` is what serves."""
        self._say("gate")
        learner = self._learner
        weights = learner.weights()
        verdict = self._gate.judge(weights, self._serving, learner.config, learner.shared, learner.held_out())
        if not verdict.published:
            self._rejection = verdict.reason
            tqdm.write(f"not published: {verdict.reason}")
            return
        learner.save(verdict.candidate_accept_len or 0.0)
        if (reason := engine.publish(learner.version)) is not None:
            raise RuntimeError(f"the engine did not take the drafter: {reason}")
        self._serving = weights

    def _measure_untrained(self, engine: OfflineEngine) -> Measured:
        """What the drafter is worth as it was made from the target."""
        self._say("measuring the untrained drafter")
        engine.command(drafting=1)
        try:
            return self._measure(engine, self._held_out[:_BEFORE_PROMPTS], _BEFORE_TOKENS)
        finally:
            engine.command(drafting=0)

    def _measure(
        self, engine: OfflineEngine, prompts: list[list[int]], max_new_tokens: int, seconds: float | None = None
    ) -> Measured:
        """Roll out held-out prompts, then replay the responses that ended with the trainer's drafter."""
        segments: list[Segment] = []
        sampling = self._sampling(max_new_tokens)
        done = engine.run(prompts, sampling, seconds=seconds, on_segments=segments.extend)
        if not done.responses:
            raise RuntimeError(f"none of {done.begun} responses ended in the time that was left to measure with")
        samples = whole_samples(prompts, done.responses, segments)
        return Measured(
            accept_len=done.accept_len,
            replayed=self._learner.accept_len(samples, self._serving),
            prompts=len(prompts),
            ended=len(done.responses),
            tokens=done.tokens,
            tokens_per_s=done.tokens / done.seconds,
        )

    def _sampling(self, max_new_tokens: int) -> dict[str, Any]:
        return {
            "temperature": self.options.temperature,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": self._eos,
        }

    def _check_lengths(self, prompts: list[list[int]]) -> None:
        self._longest = max(map(len, prompts))
        context = int(self._config.get("max_position_embeddings") or 1 << 30)
        if self._longest + self.options.max_new_tokens + 32 > context:
            raise ConfigError(
                f"--max-new-tokens: got {self.options.max_new_tokens}, takes at most "
                f"{context - self._longest - 32}: the target's context is {context}, the longest prompt {self._longest}"
            )

    # --- what is shown

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    def _show(self, report: StepReport, accept_len: float) -> None:
        self._say(f"training: loss {report.loss:.3f}, accept {report.accept:.3f}, accept len {accept_len:.2f}")

    def _say(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._tick()

    def _tick(self) -> None:
        now = min(round(self._elapsed()), self._bar.total)
        if now > self._bar.n:
            self._bar.update(now - self._bar.n)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
