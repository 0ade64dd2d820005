"""Where a decode step's time goes, part by part, and how far the speed-up is from its bound.

    scripts/profile_step.py                                  # the arithmetic task, eagle:7x1@8, batch 1, 8 and 32
    scripts/profile_step.py --strategy eagle:15x1@16 --batches 1

One strategy at every step, and stock SGLang without speculation beside it, in turn, exactly so many requests running
(bench_rollout.py). Of the target's forward pass a row says what its matrix products alone take, measured on weights of
the same shapes: the rest is attention, norms and the interpreter. The bound is accept_len / (1 + draft / target): draft
is all that the drafter computes in a step, target a stock decode step. It would be reached if verifying a tree cost as
much as decoding one token and nothing else took time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_contenders import BASELINE, add_arguments, fixed, make_contenders
from bench_engine import EngineProcess
from bench_rollout import Prompts
from step_times import Call, read, record
from torch.nn.functional import linear
from transformers import AutoConfig, AutoTokenizer

from tlt_verl.config import Strategy
from tlt_verl.drafter import prepare_drafter
from tlt_verl.warmup.prompts import read_prompts

_WHOLE_S = 1.0  # from a step's begin to the next one's: more, and the engine was idle in between
_PARTS = ("draft", "target", "products", "sample", "extend", "worker", "process", "scheduler", "step")
_ABOUT = {
    "draft": "draft: the chain or tree, and the verification's input",
    "target": "verify: the target's forward pass",
    "products": "  of it matrix products alone",
    "sample": "verify: sampling and acceptance",
    "extend": "draft extend: the drafter reads what was accepted",
    "worker": "worker: strategy, catch-up, what the tap needs",
    "process": "scheduler: the result (tap, tuner, requests that end)",
    "scheduler": "scheduler: everything else",
    "step": "**a step**",
}


def steps_of(calls: list[Call]) -> list[dict[str, float]]:
    """Milliseconds of each part, of every step that another decode step follows and in which something was drafted."""
    found: list[dict[str, float]] = []
    inner: dict[str, float] = {}
    step: dict[str, float] = {}
    for call in calls:  # inner calls end, and are written, before the one that they are in
        if call.part in ("decode", "prefill"):
            if step and call.part == "decode" and (whole := call.begin_s - step["begin"]) < _WHOLE_S:
                found.append(_parts(step, 1e3 * whole))
            drafted = call.part == "decode" and "draft" in inner
            step = {**inner, "decode": call.seconds, "begin": call.begin_s} if drafted else {}
            inner = {}
        elif call.part == "process":
            if step:
                step["process"] = call.seconds
        else:
            inner[call.part] = call.seconds
    return found


def _parts(step: dict[str, float], whole_ms: float) -> dict[str, float]:
    parts = {name: 1e3 * step[name] for name in ("draft", "target", "extend", "process")}
    parts["sample"] = 1e3 * (step["verify"] - step["target"])
    parts["worker"] = 1e3 * (step["decode"] - step["draft"] - step["verify"] - step["extend"])
    parts["scheduler"] = whole_ms - 1e3 * (step["decode"] + step["process"])
    return parts | {"step": whole_ms}


@torch.inference_mode()
def products_ms(config: Any, rows: int, dtype: torch.dtype, times: int = 7) -> float:
    """Median time of a forward pass's matrix products for so many rows, each layer with weights of its own."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    H, inner = config.hidden_size, config.intermediate_size
    shapes = [((heads + 2 * kv) * width, H), (H, heads * width), (2 * inner, H), (H, inner)]
    shapes = shapes * config.num_hidden_layers + [(config.vocab_size, H)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    given = {n: torch.randn(rows, n).to(dtype) for n in {n for _, n in shapes}}
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        for weight in weights:
            linear(given[weight.shape[1]], weight)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def profile(options: argparse.Namespace, engines: dict[str, EngineProcess], prompts: Prompts, times: Path) -> dict:
    """The figures of every batch size."""
    config, figures = AutoConfig.from_pretrained(options.model), {}
    sampling = {"temperature": 1.0, "max_new_tokens": 512, "stop_token_ids": [options.eos]}
    torch.set_num_threads(options.threads)
    for batch in options.batches:
        given = [prompts.take(max(8, 2 * batch)) for _ in range(options.turns)]
        engines["tlt"].run(given[0][:batch], {**sampling, "max_new_tokens": 16}, at_once=batch, keep_full=False)
        times.write_text("")
        how = {"at_once": batch, "keep_full": True}
        turns = [{name: engine.run(some, sampling, **how) for name, engine in engines.items()} for some in given]
        steps = steps_of(read(times))
        parts = {name: statistics.median(step[name] for step in steps) for name in _PARTS if name != "products"}
        rows = batch * options.strategy.num_draft_tokens
        parts["products"] = products_ms(config, rows, getattr(torch, options.dtype))
        speed = {
            name: sum(t[name]["tokens"] for t in turns) / sum(t[name]["seconds"] for t in turns) for name in engines
        }
        windows = [turn["tlt"] for turn in turns]
        accept = sum(map(sum, (w["lengths"] for w in windows))) / sum(w["verifications"] for w in windows)
        stock_ms = 1e3 * batch / speed[BASELINE]
        figures[str(batch)] = {
            "parts_ms": parts,
            "steps": len(steps),
            "accept_len": accept,
            "stock_ms": stock_ms,
            "speed_up": speed["tlt"] / speed[BASELINE],
            "bound": accept / (1 + (parts["draft"] + parts["extend"]) / stock_ms),
        }
        print(f"batch {batch}: {len(steps)} steps", flush=True)
    return figures


def table(figures: dict[str, Any], strategy: Strategy) -> str:
    """Markdown: milliseconds of each part, and what they come to."""
    columns = list(figures.values())
    lines = [f"| {strategy}, ms | " + " | ".join(f"batch {batch}" for batch in figures) + " |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    lines += [
        f"| {_ABOUT[part]} | " + " | ".join(f"{c['parts_ms'][part]:.1f}" for c in columns) + " |" for part in _PARTS
    ]
    more = {
        "a stock decode step (from its tokens/s)": "stock_ms",
        "accept length": "accept_len",
        "speed-up, all included": "speed_up",
        "its bound": "bound",
    }
    lines += [f"| {about} | " + " | ".join(f"{c[name]:.2f}" for c in columns) + " |" for about, name in more.items()]
    reached = " | ".join(f"{c['speed_up'] / c['bound']:.2f}" for c in columns)
    return "\n".join([*lines, f"| of the bound | {reached} |"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add = parser.add_argument
    add("--strategy", type=Strategy.parse, default=Strategy.parse("eagle:7x1@8"))
    add("--batches", nargs="+", type=int, default=[1, 8, 32])
    add("--turns", type=int, default=3)
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    options.eos, options.contenders = tokenizer.eos_token_id, [BASELINE]
    prompts = Prompts(read_prompts(options.data, tokenizer), random.Random(options.seed))
    drafter = prepare_drafter(str(options.model), None if options.untrained else str(options.drafter))
    most = max(options.batches)
    contenders = [*make_contenders(options, drafter, most), fixed(options.strategy, options, drafter, most)]
    with tempfile.TemporaryDirectory() as scratch:
        times = record(Path(scratch))
        engines = {c.name: EngineProcess(c.engine, c.environment, Path(scratch, f"{c.name}.log")) for c in contenders}
        try:
            for engine in engines.values():
                engine.start()
            figures = profile(options, engines, prompts, times)
        finally:
            for engine in engines.values():
                engine.close()
    print("\n" + table(figures, options.strategy))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
