"""Tokens/s without speculation: this project's CPU attention against SGLang's own `torch_native`, in turn, in one run.

    .venv/bin/python scripts/bench_attention.py [--model models/smollm2-135m-reasoner] [--rounds 5]

Two engines are kept, one with each backend; they take turns on the same prompts, so that a noisy machine disturbs both.
Prints, for each dtype and batch size, the medians and the median of the pairwise ratios (ours over stock; the goal is
that none is below 0.98), and writes everything to `runs/bench_attention.json`.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("torch_native", "tlt_cpu")
GOAL = 0.98


def make_engine(model: str, dtype: str, backend: str):
    """An engine without speculation; the two differ in nothing but the attention backend."""
    import sglang

    return sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        device="cpu",
        dtype=dtype,
        attention_backend=backend,
        disable_overlap_schedule=True,
        sleep_on_idle=True,  # the engine whose turn it is not must not spin on the other's core
        disable_radix_cache=True,
        max_total_tokens=32768,
        mem_fraction_static=0.2,
        max_running_requests=32,
        log_level="error",
    )


def tokens_per_s(engine, prompts: list[list[int]], new_tokens: int) -> float:
    """Decode `new_tokens` for every prompt of the batch at T=1; the prompts' own time is part of it for both."""
    start = time.perf_counter()
    engine.generate(
        input_ids=prompts, sampling_params={"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    )
    return len(prompts) * new_tokens / (time.perf_counter() - start)


def measure(model: str, dtype: str, batches: list[int], rounds: int, new_tokens: int) -> list[dict]:
    """Rows of one dtype: both backends at every batch size, in turn."""
    rng = random.Random(0)
    engines = {backend: make_engine(model, dtype, backend) for backend in BACKENDS}
    rows = []
    try:
        for batch in batches:
            prompts = [[rng.randrange(1000, 40000) for _ in range(rng.randrange(40, 80))] for _ in range(batch)]
            for engine in engines.values():
                tokens_per_s(engine, prompts, 8)  # warm up
            speeds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
            for turn in range(rounds):
                for backend in BACKENDS if turn % 2 == 0 else reversed(BACKENDS):
                    speeds[backend].append(tokens_per_s(engines[backend], prompts, new_tokens))
            ratios = [ours / stock for stock, ours in zip(*(speeds[b] for b in BACKENDS), strict=True)]
            row = {"dtype": dtype, "batch": batch, "ratio": statistics.median(ratios), "ratios": ratios, **speeds}
            rows.append(row)
            stock, ours = (statistics.median(speeds[b]) for b in BACKENDS)
            print(f"{dtype:>9} {batch:>5} {stock:>13.1f} {ours:>9.1f} {row['ratio']:>7.2f}", flush=True)
    finally:
        for engine in engines.values():
            engine.shutdown()
    return rows


def main() -> int:
    """Run all sizes; exit status 1 when a ratio misses the goal."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-reasoner"))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()
    print(f"{'dtype':>9} {'batch':>5} {'torch_native':>13} {'tlt_cpu':>9} {'ratio':>7}   tokens/s, medians", flush=True)
    rows = []
    for dtype in args.dtypes:
        rows += measure(args.model, dtype, args.batches, args.rounds, args.new_tokens)
    out = ROOT / "runs" / "bench_attention.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    missed = [row for row in rows if row["ratio"] < GOAL]
    print(f"{len(rows) - len(missed)} of {len(rows)} at or above {GOAL}; written to {out.relative_to(ROOT)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
