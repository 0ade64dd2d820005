"""The figures of a result of bench_rollout.py: ratios with their confidence, accept lengths, what was run; and a table.

    scripts/bench_table.py runs/bench_rollout/result.json

Pure functions of the result; measures nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

BASELINE = "sglang"
_CONFIDENCE = 0.9
_SHOWN = 3  # strategies of a row


def tokens_per_s(window: dict[str, Any]) -> float:
    """Tokens of all responses over the window's time."""
    return window["tokens"] / window["seconds"]


def ratios(turns: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Tokens per second over the baseline's, turn by turn."""
    return [tokens_per_s(turn[name]) / tokens_per_s(turn[BASELINE]) for turn in turns]


def median_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Median, and the order statistics around it that cover the true one with at least 90%; the widest where none do.

    Free of assumptions on the distribution: the k-th smallest and the k-th largest of n independent values enclose the
    median with probability 1 - 2 P(Binomial(n, 1/2) < k).

    Returns:
        (median, low, high, that probability)
    """
    ordered, count = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(count, i) for i in range(k)) / 2**count

    k = max([k for k in range(1, count // 2 + 1) if coverage(k) >= _CONFIDENCE], default=1)
    return statistics.median(ordered), ordered[k - 1], ordered[-k], max(coverage(k), 0.0)


def accept_len(windows: Sequence[dict[str, Any]]) -> float:
    """Tokens that a request gains from a step, the prefills' not counted; 1 without speculation.

    With counters of strategies over all steps, those without drafts included; else over the verifications of the
    responses that ended.
    """
    strategies = [counts for window in windows for counts in window.get("strategies", {}).values()]
    if strategies:
        return sum(counts["tokens"] for counts in strategies) / sum(counts["verified"] for counts in strategies)
    verifications = sum(window["verifications"] for window in windows)
    tokens = sum(sum(window["lengths"]) - len(window["lengths"]) for window in windows)
    return tokens / verifications if verifications else 1.0


def chosen(windows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Strategies with their shares of the steps, the most used first."""
    steps: Counter[str] = Counter()
    for window in windows:
        steps.update({strategy: counts["steps"] for strategy, counts in window.get("strategies", {}).items()})
    return [(strategy, count / steps.total()) for strategy, count in steps.most_common()]


def table(result: dict[str, Any], parts: Sequence[str]) -> str:
    """Markdown: a row for each part and contender, each figure the median over the turns."""
    head = ["part", "contender", "tokens/s", "ratio", "interval", "accept len", "seconds", "tokens", "longest", "ran"]
    rows = [head, ["---"] * len(head)]
    for part in parts:
        turns = result["parts"][part]["turns"]
        rows += [_row(part, name, turns) for name in turns[0]] if turns else []
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _row(part: str, name: str, turns: Sequence[dict[str, Any]]) -> list[str]:
    windows = [turn[name] for turn in turns]
    median, low, high, confidence = median_interval(ratios(turns, name))
    ran = ", ".join(f"{strategy} {share:.0%}" for strategy, share in chosen(windows)[:_SHOWN])
    return [
        part,
        name,
        f"{statistics.median(map(tokens_per_s, windows)):.1f}",
        f"{median:.2f}",
        "" if name == BASELINE or len(turns) == 1 else f"{low:.2f} to {high:.2f} ({confidence:.0%})",
        f"{accept_len(windows):.2f}",
        f"{statistics.median(window['seconds'] for window in windows):.1f}",
        f"{statistics.median(window['tokens'] for window in windows):.0f}",
        f"{statistics.median(max(window['lengths'], default=0) for window in windows):.0f}",
        ran,
    ]


def legend(result: dict[str, Any]) -> str:
    """What has to be known of the contenders, a line each."""
    lines = []
    for name, about in result["contenders"].items():
        remark = f"; {about['remark']}" if about["remark"] else ""
        left_out = f"; left out, it does not start here: {about['left_out']}" if "left_out" in about else ""
        lines.append(f"- {name}: {about['about']}{remark}{left_out}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    read = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(table(read, list(read["parts"])) + "\n\n" + legend(read))
