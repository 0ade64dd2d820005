"""Real runs of `python -m verl.trainer.main_ppo` with a Megatron policy, on a model made on the spot.

They would catch what no part's own test can: a seam that no longer meets the other, weights that reach the wrong model,
a checkpoint that does not come back, metrics that are not in verl's log.
"""

import json
import re

import pytest
from shared_models import task_model
from tiny_task import make_prompts
from verl_runner import TLT, assert_logprobs_agree, fingerprints, run

pytestmark = pytest.mark.slow


@pytest.fixture
def task(tmp_path, tmp_path_factory):
    folder = tmp_path
    for name in ("model", "drafter"):
        (folder / name).symlink_to(task_model(tmp_path_factory) / name)
    make_prompts(folder / "prompts.parquet")
    loops = "- name: two_turns\n  _target_: tiny_task.TwoTurns\n"
    loops += "- name: publishes_once\n  _target_: tiny_task.PublishesOnce\n"
    (folder / "loops.yaml").write_text(loops)
    return folder


def test_a_tuned_run_validates_trains_saves_and_resumes_into_two_turns(task):
    """Validation, n > 1, a weight sync a step, a tree and the model-free drafter among which a tuner chooses, a
    checkpoint, its resumption with what the tuner learnt, and turns that hit the prefix cache.
    """
    tuned = (
        "actor_rollout_ref.rollout.custom.tlt.strategy.arms=['eagle:2x2@5','ngram:3x1@4']",
        f"{TLT}strategy.tune=true",
        f"{TLT}drafter.path={task}/drafter",
    )
    steps, output = run(
        task, *tuned, "trainer.total_training_steps=2", "trainer.val_before_train=true", "trainer.save_freq=2"
    )
    assert [step["training/global_step"] for step in steps] == [1, 2]
    assert_logprobs_agree(steps)
    drafted = [step for step in steps if "tlt/accept_len" in step]
    assert drafted and all(step["tlt/accept_len"] >= 1 and 0 <= step["tlt/accept_rate"] <= 1 for step in drafted)
    assert all(step["tlt/tokens_per_s"] > 0 and step["actor/grad_norm"] > 0 for step in steps)
    assert re.search(r"step:0 - val-(core|aux)/tiny/", output), "validation before training did not run"
    assert len(fingerprints(output)) == 3, "one comparison before the first step and one after each update"
    for step in steps:
        shares = [step[f"tlt/draft_share/{drafter}"] for drafter in ("eagle", "ngram", "off")]
        assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0
        chosen = {name: value for name, value in step.items() if name.startswith("tlt/tuner/") and name[10].isdigit()}
        assert chosen and all(0 <= share <= 1 for share in chosen.values())
    assert any(step["tlt/draft_share/off"] < 1 for step in steps), "nothing was ever tried"
    saved = json.loads((task / "checkpoints" / "global_step_2" / "tlt_tuners.json").read_text())
    assert len(saved) == 1 and saved[0]["best"] and "what the tuners learnt is saved" in output

    resumed, output = run(
        task,
        *tuned,
        "trainer.total_training_steps=3",
        "trainer.resume_mode=auto",
        "actor_rollout_ref.rollout.agent.default_agent_loop=two_turns",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={task}/loops.yaml",
    )
    assert [step["training/global_step"] for step in resumed] == [3]
    assert "tlt: the tuners go on from" in output and "the tuner begins anew" not in output
    assert_logprobs_agree(resumed)
    assert resumed[0]["num_turns/mean"] == 4
    assert resumed[0]["tlt/tokens_per_s"] > 0
    assert len(fingerprints(output)) == 2


def test_two_replicas_serve_a_data_parallel_policy(task):
    """DP=2 and two engines: every rank drains the weights, each replica gets all of them."""
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
