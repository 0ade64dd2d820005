"""What spot training costs a run: the time of its steps with spot training on over the same steps with it off.

    scripts/bench_spot.py [--pairs 5] [--steps 4] [--replicas 2] [-- hydra overrides...]

Both runs of a pair are `scripts/quickstart.sh` with the same drafter, which does not change: it learns at a rate of
1e-12, so it is trained, judged and published like any other and stays what it was. The policy does not change either
and every token is the likeliest, so that both runs of a pair generate, score and learn the same. verl looks ten times
a second whether a batch is complete (`replay_often.py`), else time comes in pieces of two seconds. The first step of a
run includes its start and is left out. Runs take turns, the order changes from pair to pair; the figure is the median
of the ratios of all pairs of equal steps. Writes JSON beside the runs' logs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tlt_verl.report.console import is_training_step, parse_step

ROOT = Path(__file__).resolve().parent.parent
TLT = "+actor_rollout_ref.rollout.custom.tlt."
SAMPLER = "trainer.v1.sampler.custom_sampler"
SAME = [
    *("actor_rollout_ref.actor.optim.lr=0", "actor_rollout_ref.rollout.top_k=1", "data.seed=1"),
    *(f"{SAMPLER}.path=scripts/replay_often.py", f"{SAMPLER}.name=OftenReplayBuffer"),
]
ON = [f"{TLT}spot.enable=true", f"{TLT}spot.lr=1e-12"]
OFF = [f"{TLT}spot.enable=false"]
MEMORY_STAYS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
"""For glibc: freed memory stays with its process. New pages took a quarter of the policy's time, more or less."""
PHASES = ("timing_s/step", "timing_s/gen", "timing_s/old_log_prob", "timing_s/update_actor", "timing_s/update_weights")


def run(name: str, steps: int, replicas: int, overrides: list[str]) -> list[dict[str, float]]:
    """The metrics of the steps after the first. A run that fails ends the benchmark with its last lines."""
    command = ["scripts/quickstart.sh", "--replicas", str(replicas), "--steps", str(steps)]
    command += [f"trainer.experiment_name={name}", *SAME, *overrides]
    environment = {**MEMORY_STAYS, **os.environ}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"the run {name} failed:\n{done.stdout[-3000:]}")
    lines = (ROOT / "runs" / name / "train.log").read_text(errors="replace").splitlines()
    parsed = [step for line in lines if (step := parse_step(line)) and is_training_step(step[1])]
    if [number for number, _ in parsed] != list(range(1, steps + 1)):
        sys.exit(f"the run {name} logged the steps {[number for number, _ in parsed]}, not 1 to {steps}")
    return [figures for _, figures in parsed[1:]]


def ratios(on: list[dict[str, float]], off: list[dict[str, float]], key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(on, off, strict=True)]


def table(pairs: list[dict[str, list[dict[str, float]]]]) -> str:
    """A row a pair; the last has the medians of all pairs of steps."""
    heads = ["pair", *(key.split("/")[1] for key in PHASES), "tokens", "step s on", "step s off", "trained s"]
    lines = ["".join(head.rjust(16) for head in heads)]
    every: dict[str, list[float]] = {key: [] for key in PHASES}
    for number, pair in enumerate(pairs, 1):
        cells = [str(number)]
        for key in PHASES:
            found = ratios(pair["on"], pair["off"], key)
            every[key] += found
            cells.append(f"{statistics.median(found):.3f}")
        cells.append(f"{statistics.median(ratios(pair['on'], pair['off'], 'response_length/mean')):.3f}")
        cells += [f"{statistics.fmean(step['timing_s/step'] for step in pair[side]):.2f}" for side in ("on", "off")]
        cells.append(f"{sum(step.get('tlt/spot/trained_s', 0.0) for step in pair['on']):.1f}")
        lines.append("".join(cell.rjust(16) for cell in cells))
    lines.append(
        "median".rjust(16) + "".join(f"{statistics.median(values):.3f}".rjust(16) for values in every.values())
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of spot training: step time on over off, in pairs of runs.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is not counted")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="hydra overrides of both runs, after --")
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.steps < 2:
        parser.error("takes one pair or more, of two steps or more")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    pairs: list[dict[str, list[dict[str, float]]]] = []
    for number in range(1, arguments.pairs + 1):
        pair = {}
        for side in ("on", "off") if number % 2 else ("off", "on"):
            overrides = [*(ON if side == "on" else OFF), *arguments.overrides]
            name = f"bench-spot-{stamp}-{number}-{side}"
            pair[side] = run(name, arguments.steps, arguments.replicas, overrides)
        pairs.append(pair)
        print(table(pairs), flush=True)
        (ROOT / "runs" / f"bench-spot-{stamp}.json").write_text(json.dumps(pairs, indent=1))


if __name__ == "__main__":
    main()
