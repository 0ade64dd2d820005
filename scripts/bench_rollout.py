"""Rollout speed at temperature 1: stock SGLang without speculation, its EAGLE, its NGRAM, and the algorithm TLT.

    scripts/bench_rollout.py                          # the arithmetic task, drafter of scripts/warmup.sh arithmetic
    scripts/bench_rollout.py --untrained --turns 1 --batches 1 8      # a quick look without one
    scripts/bench_rollout.py --model models/smollm2-135m-instruct --data data/chat/test.parquet \\
        --drafter drafters/chat/latest --held-out 32 --max-new-tokens 192

All engines are alive and take turns in one run, in rotating order, on the same prompts (others in each turn), so that a
noisy machine disturbs all of them; what counts is the ratio to the baseline within a turn, its median over the turns.
Caches, and what a model-free drafter has collected, are flushed before every turn; what the tuner learnt stays.

Batch sizes. Exactly B requests run: whenever one ends, the next prompt is sent; when there is none left, the turn is
over and the others are aborted. So there is no tail in which fewer run, every contender begins the same prompts, and
all that was produced counts. Responses end where the model ends them. With forced lengths (ignore_eos) all would
produce equally many tokens, but behind its own end a model babbles: no rollout contains that, and no drafter knows it.

The long-tail step. `--step-requests` requests, `--group` to a prompt as in GRPO, are sent at once; the time is from the
first one sent to the last token. Lengths are the model's own here too: they are the tail that is asked about. They
differ between contenders, so the ratio is that of tokens per second, and time, tokens and longest response stand
beside it. One more step, which is not timed, is traced: every 0.2 s, how many requests run and what the tuner chose.

Writes the result after every turn; `plot_rollout.py` draws it. Knows how to measure, not what the contenders are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_contenders import BASELINE, NAMES, OFF, ROOT, Contender, add_arguments, make_contenders
from bench_engine import EngineProcess
from bench_table import legend, table
from plot_rollout import plot
from transformers import AutoTokenizer

from tlt_verl.config import Strategy
from tlt_verl.drafter import prepare_drafter
from tlt_verl.warmup.prompts import read_prompts, split_prompts

RESULT, FIGURE = "result.json", "figure.svg"
TRACE_S = 0.2
Engines = dict[str, tuple[Contender, EngineProcess]]


class Prompts:
    """The prompts of a file in random order, again and again: a turn gets others than the one before."""

    def __init__(self, prompts: Sequence[list[int]], rng: random.Random) -> None:
        self._all, self._rng = list(prompts), rng
        self._left: list[list[int]] = []

    def take(self, count: int) -> list[list[int]]:
        """The next ones."""
        while len(self._left) < count:
            self._left += self._rng.sample(self._all, len(self._all))
        taken, self._left = self._left[:count], self._left[count:]
        return taken


class Bench:
    """What is asked of the engines, and what came of it.

    Args:
        engines: those that take part; the baseline is one of them.
        prompts: of the turns.
        sampling: SGLang's sampling parameters.
        options: of the command line.
        result: to be filled in; written into the folder `options.out`.
    """

    def __init__(
        self,
        engines: Engines,
        prompts: Prompts,
        sampling: dict[str, Any],
        options: argparse.Namespace,
        result: dict[str, Any],
    ) -> None:
        self._engines, self._prompts, self._sampling = engines, prompts, sampling
        self._options, self.result = options, result

    def run(self) -> None:
        """Everything, the result written after every turn."""
        options = self._options
        self._warm_up()
        for batch in options.batches:
            count = max(options.requests * batch, options.least_requests)
            prompts = partial(self._groups, count, options.siblings)
            self._turns(f"batch {batch}", prompts, at_once=batch, keep_full=True)
        if options.step_requests:
            prompts = partial(self._groups, options.step_requests, options.group)
            self._turns("step", prompts, at_once=options.step_requests, keep_full=False)
            self._trace_step(prompts())
        for name, (contender, engine) in self._engines.items():
            if contender.tunes:
                self.result["contenders"][name]["state"] = engine.state()["speculation"]
        self._write()

    def _warm_up(self) -> None:
        """First passes fault in pages and compile; the tuner sees a few steps of the largest and the smallest batch."""
        sampling = {**self._sampling, "max_new_tokens": 8}
        prompts = self._prompts.take(max([*self._options.batches, 2]))
        for _, engine in self._engines.values():
            for some in (prompts, prompts[:1]):
                engine.run(some, sampling, at_once=len(some), keep_full=False)

    def _groups(self, count: int, size: int) -> list[list[int]]:
        """So many prompts, `size` times each, one after the other."""
        return [prompt for prompt in self._prompts.take(-(-count // size)) for _ in range(size)][:count]

    def _turns(self, part: str, prompts: Callable[[], list[list[int]]], **how: Any) -> None:
        """All turns of one part, the contenders in rotating order."""
        turns: list[dict[str, Any]] = []
        self.result["parts"][part] = {"at_once": how["at_once"], "turns": turns}
        names = list(self._engines)
        for turn in range(self._options.turns):
            begun, given = time.monotonic(), prompts()
            first = turn % len(names)
            turns.append({name: self._window(name, given, **how) for name in names[first:] + names[:first]})
            speeds = "  ".join(f"{name} {turns[-1][name]['tokens'] / turns[-1][name]['seconds']:.1f}" for name in names)
            print(f"{part}, turn {turn + 1}: {speeds} tokens/s ({time.monotonic() - begun:.0f} s)", flush=True)
            self._write()
        print(table(self.result, [part]), flush=True)

    def _window(self, name: str, prompts: list[list[int]], **how: Any) -> dict[str, Any]:
        contender, engine = self._engines[name]
        engine.flush()
        before = _counts(engine) if contender.tunes else {}
        window = engine.run(prompts, self._sampling, **how)
        window["begun"] = len(prompts)
        if contender.tunes:
            window["strategies"] = _difference(_counts(engine), before)
        return window

    def _trace_step(self, prompts: list[list[int]]) -> None:
        how = {"at_once": self._options.step_requests, "keep_full": False}
        self.result["parts"]["step"]["traced"] = {
            name: self._window(name, prompts, trace_s=TRACE_S, **how)
            for name, (contender, _) in self._engines.items()
            if contender.tunes
        }

    def _write(self) -> None:
        out = self._options.out / RESULT
        out.write_text(json.dumps(self.result, indent=1), encoding="utf-8")


def _counts(engine: EngineProcess) -> dict[str, dict[str, int]]:
    return engine.state()["speculation"]["strategies"]


def _difference(after: dict[str, dict[str, int]], before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """What was counted in between, of the strategies that ran."""
    found = {}
    for strategy, counts in after.items():
        less = Counter(counts)
        less.subtract(before.get(strategy, {}))
        if less["steps"]:
            found[strategy] = dict(less)
    return found


@contextlib.contextmanager
def started(contenders: Sequence[Contender], result: dict[str, Any], logs: Path) -> Iterator[Engines]:
    """The engines, one after the other; what does not start is left out, and why is said in the result.

    Raises:
        SystemExit: the baseline does not start.
    """
    engines: Engines = {}
    try:
        for contender in contenders:
            print(f"{contender.name}: {contender.about}", flush=True)
            engine = EngineProcess(contender.engine, contender.environment, logs / f"{contender.name}.log")
            engines[contender.name] = contender, engine
            about = result["contenders"][contender.name] = {"about": contender.about, "remark": contender.remark}
            try:
                engine.start()
            except RuntimeError as error:
                print(f"    left out, it does not start here: {error}", flush=True)
                about["left_out"] = str(error)
                del engines[contender.name]
                engine.close()
        if BASELINE not in engines:
            raise SystemExit(f"the baseline {BASELINE} did not start, {logs / BASELINE}.log says why")
        yield engines
    finally:
        for _, engine in engines.values():
            engine.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_arguments(parser)
    names = f"beside {BASELINE}, which always runs; {OFF}: tlt without drafts (not a default: it takes 3 GiB more)"
    add("--contenders", nargs="+", choices=(*NAMES, OFF), default=list(NAMES), help=names)
    add("--batches", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32], help="requests that run")
    add("--turns", type=int, default=5)
    add("--requests", type=int, default=4, help="in a turn, for each that runs (4)")
    add("--least-requests", type=int, default=16, help="in a turn, at least (16)")
    add("--held-out", type=int, default=0, help="only prompts that a warm-up with this option kept back; 0: all")
    add("--siblings", type=int, default=1, help="responses to a prompt, one after the other, in those turns (1)")
    add("--step-requests", type=int, default=64, help="of the long-tail step; 0: none (64)")
    add("--group", type=int, default=8, help="responses to a prompt in that step (8)")
    add("--max-new-tokens", type=int, default=512)
    add("--temperature", type=float, default=1.0)
    add("--out", type=Path, default=ROOT / "runs/bench_rollout", help="folder for result.json, figure.svg and logs")
    options = parser.parse_args()
    options.contenders = list(dict.fromkeys([BASELINE, *options.contenders]))
    return options


def setting(options: argparse.Namespace, drafter: Path, prompts: int) -> dict[str, Any]:
    """What the figures hold for."""
    given = {name: str(value) if isinstance(value, Path | Strategy) else value for name, value in vars(options).items()}
    packages = {package: version(package) for package in ("torch", "sglang", "transformers")}
    given |= {"arms": [str(arm) for arm in options.arms or []], "drafter": str(drafter), "prompts": prompts}
    return {**given, "packages": packages, "machine": platform.machine(), "cores": os.cpu_count()}


def main() -> None:
    options = parse_args()
    if not options.untrained and not options.drafter.exists():
        raise SystemExit(f"--drafter: got {options.drafter}, which is not there: scripts/warmup.sh, or --untrained")
    options.out.mkdir(parents=True, exist_ok=True)
    drafter = prepare_drafter(str(options.model), None if options.untrained else str(options.drafter))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = read_prompts(options.data, tokenizer)
    if options.held_out:
        _, prompts = split_prompts(prompts, options.held_out, seed=0)
    sampling = {
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "stop_token_ids": [tokenizer.eos_token_id],
    }
    result = {"setting": setting(options, drafter, len(prompts)), "contenders": {}, "parts": {}}
    contenders = make_contenders(options, drafter, max([*options.batches, options.step_requests]))
    with started(contenders, result, options.out) as engines:
        Bench(engines, Prompts(prompts, random.Random(options.seed)), sampling, options, result).run()
    print("\n" + table(result, list(result["parts"])) + "\n\n" + legend(result))
    plot(result, options.out / FIGURE)
    print(f"written: {options.out / RESULT}, {options.out / FIGURE}")


if __name__ == "__main__":
    main()
