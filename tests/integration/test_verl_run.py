"""Real runs of `python -m verl.trainer.main_ppo` with a Megatron policy, on a model made on the spot.

They would catch what no part's own test can: a seam that no longer meets the other, weights that reach the wrong model,
a checkpoint that does not come back, metrics that are not in verl's log.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fitted_drafter import fit_drafter
from transformers import AutoModelForCausalLM

from tlt_verl.report.console import is_training_step, parse_step

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from tiny_task import make_model, make_prompts  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verl")
    make_model(folder / "model")
    fit_drafter(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), folder / "drafter")
    make_prompts(folder / "prompts.parquet")
    loops = "- name: two_turns\n  _target_: tiny_task.TwoTurns\n"
    loops += "- name: publishes_once\n  _target_: tiny_task.PublishesOnce\n"
    (folder / "loops.yaml").write_text(loops)
    return folder


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


def test_a_tree_run_validates_trains_saves_and_resumes_into_two_turns(task):
    """Validation, n > 1, a weight sync a step, a checkpoint, its resumption, and turns that hit the prefix cache."""
    steps, output = run(
        task,
        "actor_rollout_ref.rollout.custom.tlt.strategy.arms=['eagle:2x2@5']",
        f"+actor_rollout_ref.rollout.custom.tlt.drafter.path={task}/drafter",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=true",
        "trainer.save_freq=2",
    )
    assert [step["training/global_step"] for step in steps] == [1, 2]
    assert_logprobs_agree(steps)
    assert all(step["tlt/accept_len"] >= 1 and 0 <= step["tlt/accept_rate"] <= 1 for step in steps)
    assert all(step["tlt/tokens_per_s"] > 0 and step["actor/grad_norm"] > 0 for step in steps)
    assert re.search(r"step:0 - val-(core|aux)/tiny/", output), "validation before training did not run"
    assert len(fingerprints(output)) == 3, "one comparison before the first step and one after each update"

    resumed, output = run(
        task,
        "trainer.total_training_steps=3",
        "trainer.resume_mode=auto",
        f"+actor_rollout_ref.rollout.custom.tlt.drafter.path={task}/drafter",
        "actor_rollout_ref.rollout.agent.default_agent_loop=two_turns",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={task}/loops.yaml",
    )
    assert [step["training/global_step"] for step in resumed] == [3]
    assert_logprobs_agree(resumed)
    assert resumed[0]["num_turns/mean"] == 4
    assert resumed[0]["tlt/accept_len"] >= 1
    assert len(fingerprints(output)) == 2


def test_two_replicas_serve_a_data_parallel_policy(task):
    """DP=2 and two engines: every rank drains the weights, each replica gets all of them (issue 3, item 7)."""
    tap = "+actor_rollout_ref.rollout.custom.tlt.tap.enable=true"
    steps, output = run(task, "trainer.total_training_steps=3", "trainer.n_gpus_per_node=2", tap)
    assert len(steps) == 3
    assert_logprobs_agree(steps)
    assert len(fingerprints(output)) == 2 * 4
    assert all(step["tlt/tap/tokens"] > 0 and step["tlt/tap/failures"] == 0 for step in steps), "both replicas tap"


def test_a_drafter_is_published_in_a_run_and_the_tap_records(task):
    """Drafting is off with the untrained drafter, and on from the publication in the first step."""
    steps, output = run(
        task,
        "trainer.total_training_steps=2",
        "actor_rollout_ref.rollout.agent.default_agent_loop=publishes_once",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={task}/loops.yaml",
        "+actor_rollout_ref.rollout.custom.tlt.tap.enable=true",
        "+actor_rollout_ref.rollout.custom.tlt.tap.buffer_gb=0.01",
    )
    first, second = steps
    assert first["tlt/drafter/version"] == second["tlt/drafter/version"] == 1
    assert first["tlt/draft_share/off"] > 0, "an untrained drafter was drafted with"
    assert second["tlt/draft_share/eagle"] > 0.9 and second["tlt/accept_len"] > 1
    responses = first["response_length/mean"] * 8
    assert first["tlt/tap/tokens"] > 0.9 * responses and second["tlt/tap/tokens"] > 0
    assert first["tlt/tap/failures"] == first["tlt/tap/dropped"] == first["tlt/drafter/rejected"] == 0
    assert_logprobs_agree(steps)
    assert len(fingerprints(output)) == 3
    assert not list(Path("/dev/shm").glob("tlt-*.ring")), "the run left a ring behind"
