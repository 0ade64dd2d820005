"""What of a run's learning can be told from another's: means, standard errors and differences. Knows metric names.

Steps are taken for independent samples, which they are not quite: the policy of one step is that of the last, changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlt_verl.report.figures import LENGTH, REWARD
from tlt_verl.report.runs import Run

_FIRST = (*REWARD, *LENGTH)
_PREFIXES = ("training/rollout_", "rollout_corr/", "actor/entropy")


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` steps and its standard error; None where one step cannot tell."""

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A run's mean minus the baseline's, and how many standard errors of the difference that is.

    `in_errors` takes the runs' steps for independent samples. `in_paired_errors` is of the differences step by step,
    over the steps that both have: it does not count as noise what both runs share, such as the step's prompts and the
    trend, so it is the sharper one where both were given the same prompts. None where the error is 0 or not known.
    """

    mean: float
    in_errors: float | None
    paired_mean: float | None
    in_paired_errors: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error: the sample's deviation (n - 1) over the root of n. ValueError without a value."""
    count = len(values)
    if not count:
        raise ValueError("no values: nothing to estimate")
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def difference(baseline: Mapping[int, float], run: Mapping[int, float]) -> Difference | None:
    """How a figure of a run differs from the baseline's, by step both; None where one of them does not have it."""
    if not baseline or not run:
        return None
    first, second = estimate(list(baseline.values())), estimate(list(run.values()))
    error = None if first.error is None or second.error is None else math.hypot(first.error, second.error)
    mean = second.mean - first.mean
    shared = [run[step] - baseline[step] for step in sorted(run) if step in baseline]
    paired = estimate(shared) if shared else None
    return Difference(
        mean=mean,
        in_errors=_over(mean, error),
        paired_mean=paired.mean if paired else None,
        in_paired_errors=_over(paired.mean, paired.error) if paired else None,
    )


def _over(mean: float, error: float | None) -> float | None:
    return mean / error if error else None


def statistic_keys(runs: Sequence[Run]) -> list[str]:
    """The metrics that say how a run learns: reward, length, KL, rollout against policy; those that any run has."""
    known = {key for run in runs for metrics in run.steps.values() for key in metrics}
    rest = sorted(key for key in known if key not in _FIRST and _tells_of_learning(key))
    return [key for key in _FIRST if key in known] + rest


def _tells_of_learning(key: str) -> bool:
    is_kl = key.startswith(("actor/", "critic/")) and "kl" in re.split(r"[/_]", key)
    return is_kl or key.startswith(_PREFIXES)
