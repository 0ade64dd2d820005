"""Draws what spot training brought, from the logs of a run and of the same run with the drafter frozen.

    scripts/plot_spot.py runs/TRAINED/train.log runs/FROZEN/train.log --out spot.svg

Accept length of both runs over the steps; below it each replica's idle time, by what it was used for, and harvest, the
share of it that was trained in. Prints a row a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tlt_verl.report.spot import StepFigures, compare, read_run, replica_names, summary, table
from tlt_verl.report.timeline import REPLICA_STATES, harvest

NOTHING = float("nan")  # leaves a gap in a line
PARTS = {"training": "trained", "yielding": "yielding", "idle": "left idle"}
MARKERS = "osD^v<>"


def draw_accept_len(axes: Axes, figures: Sequence[StepFigures]) -> None:
    steps = [step.step for step in figures]
    for label, colour, style, values in (
        ("drafter trained", REPLICA_STATES["training"][1], "o-", [step.accept_trained for step in figures]),
        ("drafter frozen", "#000000", "s--", [step.accept_frozen for step in figures]),
    ):
        known = [NOTHING if value is None else value for value in values]
        axes.plot(steps, known, style, color=colour, label=label, markersize=4)
    axes.set(ylabel="accept length")


def draw_idle_time(axes: Axes, figures: Sequence[StepFigures]) -> None:
    """A stack a replica and step, the replicas of a step side by side."""
    names = replica_names(figures)
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        at = [step.step + (place - (len(names) - 1) / 2) * width for step in figures]
        bottom = [0.0] * len(figures)
        for state, label in PARTS.items():
            seconds = [step.replicas.get(name, {}).get(state, 0.0) for step in figures]
            colour, shown = REPLICA_STATES[state][1], label if place == 0 else None
            axes.bar(at, seconds, 0.9 * width, bottom=bottom, color=colour, label=shown)
            bottom = [low + high for low, high in zip(bottom, seconds, strict=True)]
    axes.set(ylabel=f"idle seconds\n({', '.join(names)})")


def draw_harvest(axes: Axes, figures: Sequence[StepFigures]) -> None:
    steps = [step.step for step in figures]
    for place, name in enumerate(replica_names(figures)):
        shares = [harvest(step.replicas.get(name, {})) for step in figures]
        percents = [NOTHING if share is None else 100 * share for share in shares]
        axes.plot(steps, percents, MARKERS[place % len(MARKERS)] + "-", label=name, markersize=4)
    axes.set(ylabel="harvest, %", ylim=(0, 105), xlabel="step")


def draw(figures: Sequence[StepFigures], out: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "tlt"
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00"])
    ratios = {"height_ratios": [3, 2, 2]}
    figure, panels = plt.subplots(3, 1, figsize=(8, 7), sharex=True, gridspec_kw=ratios, constrained_layout=True)
    for axes, content in zip(panels, (draw_accept_len, draw_idle_time, draw_harvest), strict=True):
        content(axes, figures)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a run whose drafter trains beside one whose drafter is frozen.")
    parser.add_argument("trained", type=Path, metavar="LOG_TRAINED")
    parser.add_argument("frozen", type=Path, metavar="LOG_FROZEN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    arguments = parser.parse_args()
    try:
        trained, frozen = read_run(arguments.trained), read_run(arguments.frozen)
        figures = compare(trained, frozen)
    except ValueError as error:
        sys.exit(str(error))
    for run in (trained, frozen):
        if complaint := run.complaint():
            print(f"{run.path}: {complaint}", file=sys.stderr)
    draw(figures, arguments.out)
    print(f"{table(figures)}\n{summary(figures)}")


if __name__ == "__main__":
    main()
