"""Runs of `python -m verl.trainer.main_ppo` on a model made on the spot, for the tests that look at what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tlt_verl.report.console import is_training_step, parse_step

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "integration"


def run(task: Path, *overrides: str, timeout_s: int = 440) -> tuple[list[dict[str, float]], str]:
    """Run the trainer; returns the steps' metrics and the whole output. A run that fails shows its end."""
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
        "+actor_rollout_ref.rollout.custom.tlt.debug.fingerprint=true",
        f"reward.custom_reward_function.path={HERE}/tiny_task.py",
        f"trainer.default_local_dir={task}/checkpoints",
        f"hydra.run.dir={task}/hydra",
    ]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(ROOT / "configs")]
    command += ["--config-name", "smollm2_cpu", *base, *overrides]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s
    )
    output = result.stdout + result.stderr
    (task / "output.log").write_text(output)
    assert result.returncode == 0, output[-6000:]
    steps = [step[1] for line in output.splitlines() if (step := parse_step(line))]
    return [metrics for metrics in steps if is_training_step(metrics)], output


def fingerprints(output: str) -> list[str]:
    return re.findall(r"tlt fingerprint: step (\S+): \d+ target tensors equal the policy's, \d+ drafter", output)


def assert_logprobs_agree(steps: list[dict[str, float]]) -> None:
    """fp32 on both sides: every token's probability equal to 1e-4 (issue 3, item 5)."""
    assert all(step["training/rollout_probs_diff_max"] <= 1e-4 for step in steps)
