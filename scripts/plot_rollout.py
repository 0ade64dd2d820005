"""Draws a result of bench_rollout.py: speed by batch size, the long-tail step, and what the tuner ran in such a step.

scripts/plot_rollout.py runs/bench_rollout/result.json docs/rollout.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from bench_table import BASELINE, median_interval, ratios

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch


def plot(result: dict[str, Any], out: Path) -> None:
    """Write the figure; what was not measured has no panel."""
    plt.rcParams["svg.hashsalt"] = "tlt"
    parts = result["parts"]
    batches = {part["at_once"]: part["turns"] for name, part in parts.items() if name != "step" and part["turns"]}
    step = parts.get("step", {"turns": []})
    panels = []
    if batches:
        panels.append(lambda axes: _speed(axes, batches))
    if step["turns"]:
        panels.append(lambda axes: _makespans(axes, step["turns"]))
    panels += [lambda axes, w=window: _strategies(axes, w["trace"]) for window in step.get("traced", {}).values()]
    if not panels:
        return
    figure = plt.figure(figsize=(4.6 * len(panels), 3.6), constrained_layout=True)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _speed(axes: Axes, batches: dict[int, Sequence[dict[str, Any]]]) -> None:
    """Ratio to the baseline over the batch size; the bars are the medians' intervals."""
    names = [name for name in next(iter(batches.values()))[0] if name != BASELINE]
    for name in names:
        medians = [median_interval(ratios(turns, name)) for turns in batches.values()]
        middle = [median for median, *_ in medians]
        bars = [[m - low for m, low, *_ in medians], [high - m for m, _, high, _ in medians]]
        axes.errorbar(list(batches), middle, yerr=bars, marker="o", capsize=3, label=name)
    axes.axhline(1.0, color="black", linewidth=1, label=BASELINE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(batches), [str(batch) for batch in batches])
    axes.set(xlabel="requests that run", ylabel="tokens/s over the baseline's", ylim=(0, None))
    axes.set_title("speed by batch size")
    axes.legend(fontsize=7)


def _makespans(axes: Axes, turns: Sequence[dict[str, Any]]) -> None:
    """Requests that still run over time, of each contender's turn of median length."""
    for name in sorted(turns[0], key=lambda name: name != BASELINE):
        windows = sorted((turn[name] for turn in turns), key=lambda window: window["seconds"])
        window = windows[(len(windows) - 1) // 2]
        ends = sorted(window["ended_s"])
        running = [len(ends) - place for place in range(len(ends) + 1)]
        color = "black" if name == BASELINE else None
        axes.step([0.0, *ends], running, where="post", label=f"{name}, {window['seconds']:.1f} s", color=color)
    axes.set(xlabel="seconds since the step began", ylabel="requests that run", ylim=(0, None))
    axes.set_title("the long-tail step")
    axes.legend(fontsize=7)


def _strategies(axes: Axes, trace: Sequence[tuple[float, int, dict[str, int]]]) -> None:
    """Running requests over time; the colour behind is the strategy of most steps of the moment."""
    spans = _spans(trace)
    names = sorted({name for _, _, name in spans}, key=lambda name: -sum(e - b for b, e, n in spans if n == name))
    colors = {name: plt.get_cmap("tab10")(place % 10) for place, name in enumerate(names)}
    for begin, end, name in spans:
        axes.axvspan(begin, end, color=colors[name], alpha=0.45, linewidth=0)
    axes.step([at for at, *_ in trace], [running for _, running, _ in trace], where="post", color="black", linewidth=1)
    axes.set(xlabel="seconds since the step began", ylabel="requests that run", ylim=(0, None))
    axes.set_title("what the tuner ran in such a step")
    axes.legend(handles=[Patch(color=colors[name], alpha=0.45, label=name) for name in names], fontsize=7)


def _spans(trace: Sequence[tuple[float, int, dict[str, int]]]) -> list[tuple[float, float, str]]:
    """(begin, end, strategy of most steps in between); where no step ended, it goes on with the next."""
    spans: list[tuple[float, float, str]] = []
    begin, counted = (trace[0][0], trace[0][2]) if trace else (0.0, {})
    for at, _, steps in trace[1:]:
        ran = {name: count - counted.get(name, 0) for name, count in steps.items() if count > counted.get(name, 0)}
        if ran:
            name = max(ran, key=ran.__getitem__)
            if spans and spans[-1][2] == name:
                spans[-1] = (spans[-1][0], at, name)
            else:
                spans.append((begin, at, name))
            begin, counted = at, steps
    return spans


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
