"""Runs of `python -m verl.trainer.main_ppo` on a model made on the spot, for the tests that look at what they print."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tlt_verl.report.console import is_training_step, parse_step

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "integration"
TLT = "++actor_rollout_ref.rollout.custom.tlt."
SPOT = (
    f"{TLT}spot.enable=true",
    f"{TLT}gate.every_s=0.2",
    f"{TLT}gate.held_out=0.25",
    f"{TLT}gate.least=1.0",
)
"""Spot training of a random model, whose responses cannot be drafted: the gate lets through what loses nothing."""


def run(
    task: Path,
    *overrides: str,
    timeout_s: float = 900,
    more: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    meanwhile: Callable[[subprocess.Popen], None] = lambda process: None,
) -> tuple[list[dict[str, float]], str]:
    """Run the trainer; returns the steps' metrics and the whole output. A run that fails shows its end.

    Args:
        more: variables of its environment.
        before: the command that starts it, which becomes it.
        meanwhile: is called once it has started; it grows `task/stdout.log` and `task/stderr.log`.
    """
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "RAY_TMPDIR": "/tmp",
        "XDG_CACHE_HOME": str(task / "cache"),
        "PYTHONPATH": str(HERE),
        "TLT_TEST_DRAFTER": str(task / "drafter"),
    }
    base = [
        f"data.train_files={task}/prompts.parquet",
        f"data.val_files={task}/prompts.parquet",
        "data.max_prompt_length=64",
        "data.max_response_length=48",
        f"actor_rollout_ref.model.path={task}/model",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.actor.megatron.dtype=float32",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "actor_rollout_ref.rollout.engine_kwargs.sglang.max_total_tokens=8192",
        f"{TLT}debug.fingerprint=true",
        f"{TLT}spot.enable=false",
        f"{TLT}strategy.tune=false",
        "actor_rollout_ref.rollout.custom.tlt.strategy.arms=['eagle:7x1@8']",
        f"reward.custom_reward_function.path={HERE}/tiny_task.py",
        f"trainer.default_local_dir={task}/checkpoints",
        f"hydra.run.dir={task}/hydra",
    ]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(ROOT / "configs")]
    command += ["--config-name", "smollm2_cpu", *base, *overrides]
    end = time.monotonic() + timeout_s
    logs = [task / "stdout.log", task / "stderr.log"]
    with logs[0].open("w") as out, logs[1].open("w") as err:
        process = subprocess.Popen(
            [*before, *command], cwd=ROOT, env=environment | dict(more or {}), stdout=out, stderr=err
        )
        try:
            meanwhile(process)
            process.wait(max(0.0, end - time.monotonic()))
        finally:
            _end(process)
    output = "".join(log.read_text(errors="replace") for log in logs)
    (task / "output.log").write_text(output)
    assert process.returncode == 0, output[-6000:]
    steps = [step[1] for line in output.splitlines() if (step := parse_step(line))]
    return [metrics for metrics in steps if is_training_step(metrics)], output


def _end(process: subprocess.Popen) -> None:
    """Kill the run with all that descends from it, where it has not ended."""
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(30)


def fingerprints(output: str) -> list[str]:
    return re.findall(r"tlt fingerprint: step (\S+): \d+ target tensors equal the policy's, \d+ drafter", output)


def assert_logprobs_agree(steps: list[dict[str, float]]) -> None:
    """fp32 on both sides: every token's probability equal to 1e-4 (issue 3, item 5)."""
    assert all(step["training/rollout_probs_diff_max"] <= 1e-4 for step in steps)
