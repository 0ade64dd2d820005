"""Draws one step of a run: what each replica and the policy did, over time; and prints the seconds of each state.

    scripts/plot_timeline.py runs/NAME/train.log --step 5 --out step5.svg

A state that lasts for less than a pixel (yielding, mostly) is drawn a pixel wide; the table has its real length.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from tlt_verl.report.lanes import draw_lanes
from tlt_verl.report.timeline import MARK, STATES, Timeline, read_events, seconds_table


def read_timeline(log: Path) -> Timeline:
    """The timeline of a log; says on stderr what of it could not be read."""
    if not log.is_file():
        sys.exit(f"{log}: there is no such log")
    with log.open(encoding="utf-8", errors="replace") as file:
        reading = read_events(file)
    if complaint := reading.complaint():
        print(f"{log}: {complaint}", file=sys.stderr)
    if not reading.events:
        sys.exit(f"{log}: no {MARK} lines to draw; the replicas of a run with rollout.name=tlt write them")
    return Timeline(reading.events)


def title(timeline: Timeline, step: int) -> str:
    start_s, end_s = timeline.step_window(step)
    return f"step {step}, {end_s - start_s:.1f} s" + (" (the log ends in it)" if timeline.is_last(step) else "")


def draw(timeline: Timeline, step: int, out: Path) -> None:
    """One row a lane, and a legend below."""
    plt.rcParams["svg.hashsalt"] = "tlt"
    spans = timeline.step_spans(step)
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.45 * len(spans)), constrained_layout=True)
    draw_lanes(axes, timeline, step)
    axes.set(title=title(timeline, step), xlabel="seconds since the step's start")
    shown = {span.state for of_lane in spans.values() for span in of_lane}
    colours = dict(STATES[state] for state in STATES if state in shown)
    handles = [Patch(facecolor=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one step of a run from its log.")
    parser.add_argument("log", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    arguments = parser.parse_args()
    timeline = read_timeline(arguments.log)
    try:
        timeline.step_window(arguments.step)
    except ValueError as error:
        sys.exit(f"{arguments.log}: {error}")
    draw(timeline, arguments.step, arguments.out)
    print(f"{title(timeline, arguments.step)}\n{seconds_table(timeline, arguments.step)}")


if __name__ == "__main__":
    main()
