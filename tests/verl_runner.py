"""Runs of `python -m verl.trainer.main_ppo` on a model made on the spot, for the tests that look at what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import engine_logs
import guard

from tlt_verl.report.console import is_training_step, parse_step

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "integration"
TLT = "++actor_rollout_ref.rollout.custom.tlt."
LOOKS_OFTEN = (
    f"trainer.v1.sampler.custom_sampler.path={ROOT}/scripts/replay_often.py",
    "trainer.v1.sampler.custom_sampler.name=OftenReplayBuffer",
)
"""verl asks ten times a second whether a batch is complete, not every two seconds: for the trainer mode `sync`."""

SPOT = (
    f"{TLT}spot.enable=true",
    f"{TLT}gate.every_s=0.2",
    f"{TLT}gate.held_out=0.25",
    f"{TLT}gate.least=1.0",
)
"""Spot training of a random model, whose responses cannot be drafted: the gate lets through what loses nothing."""


def environment(task: Path) -> dict[str, str]:
    """That of a run whose model and data lie in this folder."""
    return {
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


def command(task: Path, *overrides: str) -> list[str]:
    """What starts the trainer on the model and data of this folder."""
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
        *([] if any("trainer_mode=" in override for override in overrides) else LOOKS_OFTEN),
    ]
    start = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(ROOT / "configs")]
    return [*start, "--config-name", "smollm2_cpu", *base, *overrides]


def run(
    task: Path,
    *overrides: str,
    timeout_s: float = 900,
    more: Mapping[str, str] | None = None,
    shm_size: str = guard.SIZE,
    meanwhile: Callable[[subprocess.Popen], None] = lambda process: None,
) -> tuple[list[dict[str, float]], str]:
    """Run the trainer; returns the steps' metrics and the whole output. A run that fails shows its end.

    Args:
        more: variables of its environment.
        shm_size: of the run's own /dev/shm, where the system lets it have one.
        meanwhile: is called once it has started; it grows `task/stdout.log` and `task/stderr.log`.
    """
    logs = [task / "stdout.log", task / "stderr.log"]
    temporary = Path(tempfile.mkdtemp(prefix="t"))  # a short name, as sockets in it need
    own = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(task / "cache")}
    with logs[0].open("w") as out, logs[1].open("w") as err:
        running = guard.start(
            command(task, *overrides),
            task / "left.json",
            cwd=ROOT,
            environment=environment(task) | own | dict(more or {}),
            stdout=out,
            stderr=err,
            shm_size=shm_size,
        )
        timer = threading.Timer(timeout_s, running.end)
        timer.start()
        try:
            meanwhile(running.process)
            status = running.wait()
        finally:
            timer.cancel()
            running.end()
            output = "".join(log.read_text(errors="replace") for log in logs)
            (task / "output.log").write_text(output)
            engine_logs.keep(f"the run in {task}", output)
    assert status == 0, f"the run ended with {status} (137: killed, after {timeout_s:g} s at most): {output[-6000:]}"
    assert running.left() == {"processes": [], "shm": []}, f"the run has ended and left this: {running.left()}"
    assert not list(temporary.iterdir()), f"the run has ended and left this: {list(temporary.iterdir())}"
    temporary.rmdir()
    steps = [step[1] for line in output.splitlines() if (step := parse_step(line))]
    return [metrics for metrics in steps if is_training_step(metrics)], output


def fingerprints(output: str) -> list[str]:
    return re.findall(r"tlt fingerprint: step (\S+): \d+ target tensors equal the policy's, \d+ drafter", output)


def assert_logprobs_agree(steps: list[dict[str, float]]) -> None:
    """fp32 on both sides: every token's probability equal to 1e-4."""
    assert all(step["training/rollout_probs_diff_max"] <= 1e-4 for step in steps)
