"""Tokens per second of a run beside its baseline's, in one sentence.

    python -m tlt_verl.report.compare RUN BASELINE

Knows the log's format and verl's metric names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tlt_verl.report.console import generated_tokens
from tlt_verl.report.runs import ReportError, Run, read_run


def sentence(run: Run, baseline: Run) -> str:
    """Throughput over the steps that both runs have: tokens of the responses over the time of their generation."""
    common = sorted(run.steps.keys() & baseline.steps.keys())
    if not common:
        return f"no step to compare: {run.name} has {sorted(run.steps)}, {baseline.name} {sorted(baseline.steps)}"
    ours, theirs = (_throughput(each, common) for each in (run, baseline))
    steps = f"step {common[0]}" if len(common) == 1 else f"steps {common[0]} to {common[-1]}"
    return f"{steps}, generation: {ours:.1f} tokens/s with tlt, {theirs:.1f} without: {ours / theirs:.2f} times"


def _throughput(run: Run, steps: list[int]) -> float:
    """Tokens per second over these steps together."""
    chosen = [run.steps[step] for step in steps]
    return sum(map(generated_tokens, chosen)) / sum(metrics["timing_s/gen"] for metrics in chosen)


def main(paths: list[str]) -> int:
    """Compare the run of the first path with that of the second."""
    try:
        runs = [read_run(name, Path(path)) for name, path in zip(("tlt", "baseline"), paths, strict=True)]
    except ReportError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(sentence(*runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
