"""Rollout log-probs against the policy's, step by step, from the logs of several runs.

    python -m tlt_verl.report.logprobs RUN...

Knows the log's format and verl's metric names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tlt_verl.report.console import is_training_step, parse_step

_MOST, _MEAN = "training/rollout_probs_diff_max", "training/rollout_probs_diff_mean"
_CORRELATION = "training/rollout_actor_probs_pearson_corr"


def table(runs: list[Path]) -> str:
    """One row a run and step: the largest and the mean difference of token probabilities, and their correlation."""
    lines = [f"{'run':<28}{'step':>5}{'largest diff':>14}{'mean diff':>12}{'correlation':>13}"]
    for run in runs:
        steps = [
            step
            for line in (run / "train.log").open(errors="replace")
            if (step := parse_step(line)) and is_training_step(step[1])
        ]
        for number, m in steps:
            lines.append(f"{run.name:<28}{number:>5}{m[_MOST]:>14.2e}{m[_MEAN]:>12.2e}{m[_CORRELATION]:>13.6f}")
        most, least = max(m[_MOST] for _, m in steps), min(m[_CORRELATION] for _, m in steps)
        lines.append(f"{run.name:<28}{'worst':>5}{most:>14.2e}{'':>12}{least:>13.6f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(run) for run in sys.argv[1:]]))
