"""Tokens per second of a run beside its baseline's: over the steps that both have, tokens over time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from report_logs import console, fast, write_log

from tlt_verl.report.compare import sentence
from tlt_verl.report.runs import Run

PROMPTS, RESPONSES = 50.0, 100.0  # mean lengths


def run(name: str, steps: dict[int, tuple[float, float]]) -> Run:
    """A run from (tokens of the responses, seconds of generation) by step."""
    share = (PROMPTS + RESPONSES) / RESPONSES
    metrics = {
        step: {
            "prompt_length/mean": PROMPTS,
            "response_length/mean": RESPONSES,
            "perf/total_num_tokens": tokens * share,
            "timing_s/gen": seconds,
        }
        for step, (tokens, seconds) in steps.items()
    }
    return Run(name, Path(name), metrics)


def test_throughput_is_tokens_over_time_of_the_common_steps():
    ours = run("tlt", {1: (1000, 10), 2: (3000, 10), 3: (90000, 1)})
    theirs = run("sglang", {1: (1200, 20), 2: (1200, 40)})
    assert sentence(ours, theirs) == ("steps 1 to 2, generation: 200.0 tokens/s with tlt, 40.0 without: 5.00 times")


def test_one_step_and_none_in_common():
    ours = run("tlt", {2: (1000, 10)})
    assert sentence(ours, run("sglang", {2: (500, 10), 3: (1, 1)})).startswith("step 2, generation: 100.0 tokens/s")
    assert sentence(ours, run("sglang", {1: (500, 10)})) == "no step to compare: tlt has [2], sglang [1]"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_run_that_is_not_there_is_one_sentence(tmp_path, missing):
    folders = [tmp_path / "a", tmp_path / "b"]
    write_log(folders[1 - missing], console(fast()))
    command = [sys.executable, "-m", "tlt_verl.report.compare", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{folders[missing]}: there is no such file or folder" in done.stderr
