"""What an engine with the algorithm TLT costs on a GPU, strategy by strategy, beside stock: graphs, steps, waits.

    scripts/check_engine.py --model models/smollm2-135m-reasoner --drafter drafters/arithmetic/latest
    scripts/check_engine.py --model DIR --tokenizer DIR --untrained --engine load_format=dummy    # sizes alone

Stock SGLang, its EAGLE and TLT are alive at the same time, on one device and on the same prompts.

Graphs.  What the worker captured, held against the plan (`tlt_verl.engine.graph_plan`): how many, for how long, and the
         device memory of each set: what torch reserved for it, and what the driver took beside that.
Steps.   One strategy at every step of TLT (`engine_recorder`), B requests that all produce `--tokens` tokens behind
         the same prompts. The time of a window in which each produces one token is taken off. A step's time is what is
         left, over the steps: those that TLT counts; of stock SGLang a request's tokens, of its EAGLE the mean of the
         requests' verifications, which is too few where requests end early. In rotating order, the median of
         `--turns`.
Waits.   In how many places of a step, and where, the scheduler waits for the device, by torch's own count.
Rollout. With `--rollout`, bench_rollout.py's windows on the same engines: the tuner's own choices against stock.

Prints tables; writes `engine.json` and the engines' logs into `--out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_contenders import BASELINE, ROOT, Contender, add_arguments, make_contenders
from bench_engine import EngineProcess
from bench_rollout import Bench, Prompts
from bench_table import legend, table
from captured_graphs import graph_rows, graphs
from engine_plugin import write_plugin
from engine_recorder import ENVIRONMENT, FREE, Control
from transformers import AutoTokenizer

from tlt_verl.config import Strategy
from tlt_verl.drafter import prepare_drafter
from tlt_verl.strategy import OFF
from tlt_verl.warmup.prompts import read_prompts

HERE = Path(__file__).resolve().parent
ARMS = ("eagle:3x1@4", "eagle:7x1@8", "eagle:5x4@16", "ngram:7x1@8")
TUNED = "tlt, tuned"
Mode = tuple[str, str, int]
"""A row of the tables: its name, the engine, and what `Control.strategy` is meanwhile."""

Measured = dict[str, dict[int, dict[str, Any]]]
"""Of each mode and batch size, what its steps are like."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(device="cuda", arms=[Strategy.parse(arm) for arm in ARMS])
    add = parser.add_argument
    add("--tokenizer", type=Path, help="folder (the model's)")
    add("--contenders", nargs="+", default=["eagle", "tlt"], help=f"beside {BASELINE}: eagle, tlt")
    add("--batches", nargs="+", type=int, default=[1, 8, 32])
    add("--tokens", type=int, default=128, help="of each request of a step's window")
    add("--turns", type=int, default=3)
    add("--rollout", action="store_true", help="bench_rollout.py's windows too")
    add("--rollout-turns", type=int, default=3)
    add("--max-new-tokens", type=int, default=512, help="of the rollout")
    add("--out", type=Path, default=ROOT / "runs/check_engine")
    options = parser.parse_args()
    options.contenders = list(dict.fromkeys([BASELINE, *options.contenders]))
    return options


def main() -> None:
    options = parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    drafter = prepare_drafter(str(options.model), None if options.untrained else str(options.drafter))
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    prompts = read_prompts(options.data, tokenizer)
    result: dict[str, Any] = {"setting": {name: str(value) for name, value in vars(options).items()}}
    controls: dict[str, Control] = {}
    engines: dict[str, EngineProcess] = {}
    contenders = {each.name: each for each in recorded(options, drafter, controls)}
    try:
        begin = time.monotonic()
        for name, contender in contenders.items():
            engines[name] = EngineProcess(contender.engine, contender.environment, options.out / f"{name}.log")
            if options.device == "cpu":
                engines[name].start()
        for name in list(engines):
            start(name, engines, options.device == "cpu")
        print(f"engines started in {time.monotonic() - begin:.0f} s", flush=True)
        check(options, tokenizer, prompts, contenders, engines, controls, result)
    finally:
        for engine in engines.values():
            engine.close()


def start(name: str, engines: dict[str, EngineProcess], started: bool) -> None:
    """Wait for one engine; without it where it does not start."""
    try:
        if not started:
            engines[name].start()
    except RuntimeError as error:
        print(f"{name}: does not start: {error}", flush=True)
        engines.pop(name).close()
        if name == BASELINE:
            raise SystemExit(1) from error


def recorded(options: argparse.Namespace, drafter: Path, controls: dict[str, Control]) -> Iterator[Contender]:
    """bench_rollout's contenders, each with the recorder in it."""
    plugins = write_plugin(options.out / "plugins", "engine_recorder", function="plugin")
    paths = [str(plugins.resolve()), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    for contender in make_contenders(options, drafter, max(options.batches)):
        folder = options.out / contender.name
        for name in ("control", "graphs.jsonl", "waits.jsonl"):
            (folder / name).unlink(missing_ok=True)
        controls[contender.name] = Control(folder)
        more = {ENVIRONMENT: str(folder.resolve()), "PYTHONPATH": os.pathsep.join(paths)}
        if contender.name == BASELINE:
            more["SGLANG_PLUGINS"] = "engine_recorder"
        yield dataclasses.replace(contender, environment={**contender.environment, **more})


def check(
    options: argparse.Namespace,
    tokenizer: Any,
    prompts: list[list[int]],
    contenders: dict[str, Contender],
    engines: dict[str, EngineProcess],
    controls: dict[str, Control],
    result: dict[str, Any],
) -> None:
    """All parts, the result written after each."""
    out = options.out / "engine.json"

    def keep() -> None:
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")

    if "tlt" in engines:
        result["graphs"] = graphs(read(options, "tlt", "graphs.jsonl"), options.model, options.arms)
        print("\n".join(graph_rows(result["graphs"])), flush=True)
    result["stock graphs"] = {name: read(options, name, "graphs.jsonl") for name in engines if name != "tlt"}
    keep()
    modes: list[Mode] = [(name, name, FREE) for name in engines if name != "tlt"]
    if "tlt" in engines:
        listed = list(dict.fromkeys([OFF, *options.arms]))
        modes += [(f"tlt, {strategy}", "tlt", place) for place, strategy in enumerate(listed)]
        modes.append((TUNED, "tlt", FREE))
    steps = Steps(options, engines, controls, prompts)

    def keep_steps(found: Measured) -> None:
        result["steps"] = found
        keep()

    try:
        steps.run(modes, keep_steps)
    finally:  # also where the time for all of it was too short
        print("\n".join(step_rows(result.get("steps", {}))), flush=True)
    result["waits"] = steps.waits(modes)
    print("\n".join(wait_rows(result["waits"])), flush=True)
    keep()
    if options.rollout:
        for control in controls.values():
            control.strategy = FREE
        result["rollout"] = rollout(options, tokenizer, prompts, contenders, engines)
        keep()
    for name, engine in engines.items():
        result[f"{name} state"] = engine.state()
    keep()


def read(options: argparse.Namespace, name: str, file: str) -> list[dict[str, Any]]:
    path = options.out / name / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- steps and waits


class Steps:
    """Windows with one strategy at every step."""

    def __init__(
        self,
        options: argparse.Namespace,
        engines: dict[str, EngineProcess],
        controls: dict[str, Control],
        prompts: list[list[int]],
    ) -> None:
        self._options, self._engines, self._controls = options, engines, controls
        self._prompts = Prompts(prompts, random.Random(options.seed))

    def run(self, modes: Sequence[Mode], keep: Callable[[Measured], None]) -> None:
        """Of each mode and batch size: ms a step, tokens a second and a step. `keep` gets what there is, ever again."""
        found: dict[str, dict[int, list[dict[str, Any]]]] = {mode[0]: {} for mode in modes}
        for turn in range(self._options.turns):
            for batch in self._options.batches:
                begin = time.monotonic()
                given, first = self._prompts.take(batch), turn % len(modes)
                if turn == 0:
                    for mode in modes:  # compile, fault in, fill the caches of the allocator
                        self._window(mode, given, 16)
                for mode in [*modes[first:], *modes[:first]]:
                    found[mode[0]].setdefault(batch, []).append(self._measured(mode, given))
                keep({name: {size: _middle(turns) for size, turns in each.items()} for name, each in found.items()})
                print(f"turn {turn + 1}, batch {batch}: {time.monotonic() - begin:.0f} s", flush=True)

    def waits(self, modes: Sequence[Mode], batch: int = 8, tokens: int = 48) -> dict[str, dict[str, Any]]:
        """Of each mode, what was waited for in a window of decoding, over its steps."""
        given = self._prompts.take(min(batch, max(self._options.batches)))
        for number, mode in enumerate(modes, 1):
            control = self._controls[mode[1]]
            control.window = number
            self._window(mode, given, tokens)
            control.window = 0
            self._window(mode, given[:1], 2)  # the scheduler writes when it sees that the window has ended
        written = {each["window"]: each for name in self._engines for each in read(self._options, name, "waits.jsonl")}
        return {mode[0]: written.get(number, {}) for number, mode in enumerate(modes, 1)}

    def _window(self, mode: Mode, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        _, name, place = mode
        engine = self._engines[name]
        self._controls[name].strategy = place
        engine.flush()
        before = self._counted(engine)
        sampling = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
        window = engine.run(prompts, sampling, at_once=len(prompts), keep_full=False)
        window["passes"], window["verified"] = (b - a for a, b in zip(before, self._counted(engine), strict=True))
        return window

    @staticmethod
    def _counted(engine: EngineProcess) -> tuple[int, int]:
        """Decoding passes of TLT and the requests in them, since the start; zeros for another algorithm."""
        counts = engine.state().get("speculation", {}).get("strategies", {}).values()
        return sum(each["steps"] for each in counts), sum(each["verified"] for each in counts)

    def _measured(self, mode: Mode, prompts: list[list[int]]) -> dict[str, Any]:
        alone = self._window(mode, prompts, 1)["seconds"]
        window = self._window(mode, prompts, self._options.tokens)
        seconds, batch = window["seconds"] - alone, len(prompts)
        decoded = window["tokens"] - batch
        verified = window["verified"] or window["verifications"] or decoded
        passes = window["passes"] or verified / batch
        return {
            "ms_a_step": 1e3 * seconds / passes,
            "tokens_per_s": decoded / seconds,
            "tokens_a_step": decoded / verified,
            "prefill_ms": 1e3 * alone,
        }


def step_rows(found: Measured) -> list[str]:
    """A table: of each batch size ms a step, tokens a step, and tokens a second over stock's."""
    batches = list(found.get(BASELINE, {}))
    lines = [
        f"{'':<22}" + "".join(f"{f'batch {batch}':>32}" for batch in batches),
        f"{'':<22}" + f"{'ms/step':>10}{'tok/step':>10}{'of stock':>12}" * len(batches),
    ]
    for name, each in found.items():
        cells = ""
        for batch in batches:
            here, stock = each[batch], found[BASELINE][batch]
            ratio = here["tokens_per_s"] / stock["tokens_per_s"]
            cells += f"{here['ms_a_step']:>10.3f}{here['tokens_a_step']:>10.2f}{ratio:>12.3f}"
        lines.append(f"{name:<22}{cells}")
    return [*lines, ""]


def _middle(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians, and every turn's time of a step."""
    middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return middle | {"turns_ms": [turn["ms_a_step"] for turn in turns]}


def wait_rows(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["waits for the device, a pass through the scheduler's loop (prefills included)"]
    for name, each in found.items():
        steps = each.get("steps") or 1
        lines.append(f"{name}: {sum(count for _, count in each.get('waits', [])) / steps:.2f} in {steps} passes")
        lines += [f"    {count / steps:7.2f}  {place}" for place, count in each.get("waits", [])[:12]]
    return [*lines, ""]


# --- rollout


def rollout(
    options: argparse.Namespace,
    tokenizer: Any,
    prompts: list[list[int]],
    contenders: dict[str, Contender],
    engines: dict[str, EngineProcess],
) -> dict[str, Any]:
    """bench_rollout's windows: lengths are the model's own, the tuner chooses."""
    settings = argparse.Namespace(
        batches=options.batches,
        turns=options.rollout_turns,
        requests=4,
        least_requests=16,
        siblings=1,
        step_requests=64 if max(options.batches) >= 8 else 0,
        group=8,
        out=options.out,
    )
    sampling = {
        "temperature": 1.0,
        "max_new_tokens": options.max_new_tokens,
        "stop_token_ids": [tokenizer.eos_token_id],
    }
    about = {name: {"about": contenders[name].about, "remark": contenders[name].remark} for name in engines}
    result: dict[str, Any] = {"setting": {}, "contenders": about, "parts": {}}
    pairs = {name: (contenders[name], engine) for name, engine in engines.items()}
    Bench(pairs, Prompts(prompts, random.Random(options.seed)), sampling, settings, result).run()
    print("\n" + table(result, list(result["parts"])) + "\n\n" + legend(result), flush=True)
    return result


if __name__ == "__main__":
    main()
