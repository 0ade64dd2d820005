"""Draws the curves of warm-ups: accept length, and the share of drafts that is accepted, over wall time.

    scripts/plot_warmup.py docs/warmup.svg arithmetic=drafters/arithmetic chat=drafters/chat

Each argument after the first is a name and the --out folder of a warm-up. The mark at the end is the engine's own
accept length on held-out prompts.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def read_curve(folder: Path) -> dict[str, list[float]]:
    """Columns of `curve.csv`."""
    with (folder / "curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def main(out: Path, runs: dict[str, Path]) -> None:
    plt.rcParams["svg.hashsalt"] = "tlt"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for name, folder in runs.items():
        curve = read_curve(folder)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        minutes = [seconds / 60 for seconds in curve["elapsed_s"]]
        (line,) = left.plot(minutes, curve["accept_len"], label=f"{name}, replayed on held-out rollouts")
        left.plot(report["minutes"], report["after"]["accept_len"], "o", color=line.get_color(), label="in the engine")
        right.plot(minutes, curve["accept"], label=name)
    left.set(xlabel="minutes since the start", ylabel="accept length, 7 draft steps", ylim=(1, 8))
    right.set(xlabel="minutes since the start", ylabel="accept probability in training", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(out, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in argument for argument in sys.argv[2:]):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), {name: Path(folder) for name, _, folder in (a.partition("=") for a in sys.argv[2:])})
