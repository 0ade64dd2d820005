"""What the drafter costs in a real engine: the tap, a draft step with and without a hot vocabulary, a publication.

    scripts/bench_drafter.py --target models/smollm2-135m-reasoner --drafter DRAFTER --prompts TEST.parquet

DRAFTER is a checkpoint of `tlt-verl warmup` with a hot vocabulary. One engine; everything that is compared is run in
turn in it, on the same prompts, greedy, so that both sides do the same work. Prints tables; --json keeps the
figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from step_times import read, record
from transformers import AutoTokenizer

from tlt_verl.config import Strategy
from tlt_verl.drafter.checkpoint import Checkpoint, load_checkpoint, write_drafter
from tlt_verl.engine.offline import OfflineEngine
from tlt_verl.warmup.prompts import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--dtype", default="bfloat16", help="float32: greedy text cannot differ by rounding")
    parser.add_argument("--only", choices=("tap", "hot", "publication"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.drafter)
    if checkpoint.hot is None:
        sys.exit(f"--drafter: got {options.drafter}, which has no hot vocabulary to compare with")
    prompts = read_prompts(options.prompts, AutoTokenizer.from_pretrained(options.target))
    with tempfile.TemporaryDirectory() as scratch:
        figures = bench(options, checkpoint, prompts, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def bench(options: argparse.Namespace, checkpoint: Checkpoint, prompts: list[list[int]], scratch: Path) -> dict:
    times = record(scratch)
    write_variants(checkpoint, scratch / "versions")
    sampling = {"temperature": 0.0, "max_new_tokens": options.max_new_tokens}
    strategy = Strategy("eagle", options.steps, 1, options.steps + 1)
    engine = OfflineEngine(
        options.target,
        scratch / "versions" / "v1",
        strategy,
        publications=scratch / "versions",
        max_running=8,
        device="cpu",
        dtype=options.dtype,
        max_total_tokens=16384,
    )
    parts = {
        "tap": lambda: bench_tap(engine, prompts, sampling, options.pairs),
        "hot": lambda: bench_hot(engine, prompts, sampling, options.pairs, options.steps, times, hot=1, whole=3),
        "publication": lambda: bench_publication(engine, prompts, sampling, [1, 2]),
    }
    with engine:
        engine.run(prompts[:8], sampling)  # the first step compiles and faults in pages
        return {name: part() for name, part in parts.items() if options.only in (None, name)}


def bench_tap(engine: OfflineEngine, prompts: list[list[int]], sampling: dict, pairs: int) -> dict:
    """Tokens per second with the tap over without, pair by pair, in alternating order."""
    figures = {}
    for batch, count in ((1, 8), (8, 40)):
        speeds: dict[int, list[float]] = {1: [], 0: []}
        for pair in range(pairs):
            for tapping in (1, 0) if pair % 2 else (0, 1):
                engine.command(tapping=tapping)
                done = engine.run(prompts[:count], sampling, at_once=batch)
                speeds[tapping].append(done.tokens / done.seconds)
        ratios = [on / off for on, off in zip(speeds[1], speeds[0], strict=True)]
        ratio, on, off = (statistics.median(values) for values in (ratios, speeds[1], speeds[0]))
        print(
            f"tap, batch {batch}: {on:.1f} tokens/s with it, {off:.1f} without; median ratio of {pairs} pairs "
            f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
        figures[f"batch {batch}"] = {"ratio": ratio, "ratios": ratios, "on": on, "off": off}
    engine.command(tapping=1)
    return figures


def bench_hot(
    engine: OfflineEngine,
    prompts: list[list[int]],
    sampling: dict,
    pairs: int,
    steps: int,
    times: Path,
    hot: int,
    whole: int,
) -> dict:
    """Cost with the hot vocabulary and with all of it, and accept length.

    draft is all of a verification's draft steps and the making of the tree, and a step the part of it that one has;
    extend is the drafter's pass over what was accepted.
    """
    figures = {}
    for batch, count in ((1, 6), (8, 32)):
        found: dict[str, dict[str, list[float]]] = {name: {} for name in ("hot", "whole")}
        for _ in range(max(3, pairs // 2)):
            for name, version in (("hot", hot), ("whole", whole)):
                if (reason := engine.publish(version)) is not None:
                    sys.exit(reason)
                times.write_text("")
                done = engine.run(prompts[:count], sampling, at_once=batch)
                calls = read(times)
                for part in ("draft", "extend"):
                    cost = 1e3 * statistics.median(call.seconds for call in calls if call.part == part)
                    found[name].setdefault(f"{part}_ms", []).append(cost)
                found[name].setdefault("step_ms", []).append(found[name]["draft_ms"][-1] / (steps - 1))
                found[name].setdefault("accept_len", []).append(done.accept_len)
                found[name].setdefault("tokens_per_s", []).append(done.tokens / done.seconds)
        row: dict[str, dict | float] = {
            name: {key: statistics.median(values) for key, values in found[name].items()} for name in found
        }
        pairs_of = zip(found["whole"]["step_ms"], found["hot"]["step_ms"], strict=True)
        row["times_cheaper"] = statistics.median(w / h for w, h in pairs_of)
        figures[f"batch {batch}"] = row
        print(f"hot vocabulary, batch {batch}: a draft step is {row['times_cheaper']:.2f} times cheaper")
        for name in found:
            print("   ", name, {key: round(value, 3) for key, value in row[name].items()}, flush=True)  # type: ignore
    return figures


def bench_publication(
    engine: OfflineEngine, prompts: list[list[int]], sampling: dict, versions: list[int], times: int = 12
) -> dict:
    """How long the scheduler pauses for a publication, with 8 requests in flight; greedy text with and without."""
    sampling = {**sampling, "ignore_eos": True}
    alone = engine.run(prompts[:8], sampling).responses
    across = engine.run(prompts[:8], sampling, publish=[versions[i % len(versions)] for i in range(times)])
    pauses, unchanged = across.pauses_ms, across.responses == alone
    if across.rejections or len(pauses) < times // 2:
        sys.exit(f"only {len(pauses)} publications while requests were in flight; rejected: {across.rejections}")
    print(
        f"publication with 8 requests in flight, {len(pauses)} times: between two steps the scheduler stands still "
        f"{statistics.median(pauses):.1f} ms, {max(pauses):.1f} ms at most; greedy text unchanged: {unchanged}"
    )
    return {"pauses_ms": pauses, "unchanged": unchanged}


def write_variants(checkpoint: Checkpoint, folder: Path) -> None:
    """v1 and v2 with the hot vocabulary, v3 with the whole one; the same weights, but for v2, which is 1% off."""
    for version, scale, hot in ((1, 1.0, checkpoint.hot), (2, 1.01, checkpoint.hot), (3, 1.0, None)):
        (out := folder / f"v{version}").mkdir(parents=True)
        weights = {name: scale * tensor for name, tensor in checkpoint.weights.items()}
        write_drafter(out, checkpoint.config, weights, hot)


if __name__ == "__main__":
    main()
