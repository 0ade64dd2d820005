"""Reads the lines that verl's console logger writes: one a step, `step:N - key:value - key:value ...`.

Knows verl's metric names and the plugin's; knows nothing of how a run is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_DECORATION = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|^\((?:[\w.]+ )?pid=\d+[^)]*\) ")
_NUMPY = re.compile(r"^np\.\w+\((.*)\)$")
_STEP = re.compile(r"step:(\d+) - ")


def plain(line: str) -> str:
    """The line without colours, and without the prefix by which Ray names the process."""
    uncoloured = _DECORATION.sub("", line.rstrip("\n"))
    return _DECORATION.sub("", uncoloured)


def parse_step(line: str) -> tuple[int, dict[str, float]] | None:
    """The step's number and its metrics, or None when the line is not a step's. Only numbers are kept."""
    text = plain(line)
    match = _STEP.match(text)
    if match is None:
        return None
    metrics = {}
    for item in text[match.end() :].split(" - "):
        key, _, value = item.rpartition(":")
        number = _NUMPY.match(value)
        try:
            metrics[key] = float(number[1] if number else value)
        except ValueError:
            continue
    return int(match[1]), metrics


def is_training_step(metrics: dict[str, float]) -> bool:
    """Whether the metrics are a training step's; verl logs a validation before training as a step of its own."""
    return "training/global_step" in metrics


def validation_reward(metrics: dict[str, float]) -> float | None:
    """The mean reward of a validation, where the metrics hold one."""
    return next((v for k, v in metrics.items() if k.startswith("val-core/") and "/mean@" in k), None)


def generated_tokens(metrics: dict[str, float]) -> float:
    """Tokens that the rollouts of a step produced, prompts excluded."""
    response, prompt = metrics["response_length/mean"], metrics["prompt_length/mean"]
    return metrics["perf/total_num_tokens"] * response / (response + prompt)


def tokens_per_s(metrics: dict[str, float]) -> float | None:
    """Tokens of the responses over the wall time of their generation; None where the step does not say."""
    lengths = ("response_length/mean", "prompt_length/mean", "perf/total_num_tokens")
    seconds = metrics.get("timing_s/gen")
    if not seconds or not all(metrics.get(key) for key in lengths):
        return None
    return generated_tokens(metrics) / seconds


@dataclass(frozen=True)
class Column:
    """One figure of a step: how it is headed, computed and written; None where the step does not have it."""

    head: str
    width: int
    digits: int
    keys: tuple[str, ...] = field(default=())

    def value(self, metrics: dict[str, float]) -> float | None:
        """The figure of one step."""
        if self.head == "tokens/s":
            return tokens_per_s(metrics)
        return next((metrics[key] for key in self.keys if key in metrics), None)

    def cell(self, value: float | None) -> str:
        """The figure as it is printed; a dash where there is none."""
        return ("-" if value is None else f"{value:.{self.digits}f}").rjust(self.width)


COLUMNS = (
    Column("reward", 7, 3, ("critic/score/mean",)),
    Column("length", 7, 1, ("response_length/mean",)),
    Column("longest", 8, 0, ("response_length/max",)),
    Column("tokens/s", 9, 1),
    Column("accept len", 11, 2, ("tlt/accept_len",)),
    Column("gen s", 7, 1, ("timing_s/gen",)),
    Column("log-prob s", 11, 1, ("timing_s/old_log_prob",)),
    Column("update s", 9, 1, ("timing_s/update_actor",)),
    Column("sync s", 7, 1, ("timing_s/update_weights",)),
    Column("step s", 7, 1, ("timing_s/step",)),
    Column("probs corr", 11, 4, ("training/rollout_actor_probs_pearson_corr",)),
)


def header() -> str:
    """The heads of the columns."""
    return "step".rjust(5) + "".join(column.head.rjust(column.width) for column in COLUMNS)


def step_row(step: int | str, metrics: dict[str, float]) -> str:
    """One step as a row under `header`."""
    return str(step).rjust(5) + "".join(column.cell(column.value(metrics)) for column in COLUMNS)


def closing_table(steps: Iterable[tuple[int, dict[str, float]]]) -> str:
    """All steps, and their mean in the last row."""
    rows = list(steps)
    lines = [header(), *(step_row(step, metrics) for step, metrics in rows)]
    means = []
    for column in COLUMNS:
        values = [value for _, metrics in rows if (value := column.value(metrics)) is not None]
        means.append(column.cell(sum(values) / len(values) if values else None))
    return "\n".join([*lines, "mean".rjust(5) + "".join(means)])
