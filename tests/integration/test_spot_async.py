"""Real runs of verl's asynchronous trainer modes, and of an FSDP2 policy, in which a drafter is trained.

In `separate_async` the policy has a device of its own: while it updates, the rollout's device is idle, and trains.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from shared_models import task_model
from tiny_task import make_prompts
from verl_runner import ROOT, SPOT, TLT, assert_logprobs_agree, fingerprints, run

from tlt_verl.report.timeline import Timeline, overlap_s, read_events

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # a drafter is trained on idle cores: within so many steps

TRAINED = (*SPOT, f"{TLT}spot.idle_ms=50", "actor_rollout_ref.rollout.n=8")
SEPARATE = (
    "trainer.v1.trainer_mode=separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.hybrid_engine=false",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
    "ray_kwargs.ray_init.num_gpus=2",
)
FSDP2 = (
    "model_engine=dp",
    "~actor_rollout_ref.actor.megatron",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.dtype=float32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=false",
)


@pytest.fixture
def task(tmp_path, tmp_path_factory):
    (tmp_path / "model").symlink_to(task_model(tmp_path_factory) / "model")
    make_prompts(tmp_path / "prompts.parquet")
    return tmp_path


def timeline_of(output: str) -> Timeline:
    reading = read_events(output.splitlines())
    assert not reading.complaint()
    return Timeline(reading.events)


def assert_trained(steps: list[dict[str, float]]) -> None:
    assert sum(step["tlt/spot/trained_s"] for step in steps) > 0
    assert all(0 <= step["tlt/spot/trained_s"] <= step["tlt/spot/idle_s"] for step in steps)
    assert steps[-1]["tlt/drafter/tokens"] > 0
    assert sum(step["tlt/spot/failures"] for step in steps) == 0


def test_the_drafter_trains_on_the_rollouts_device_while_the_policy_updates(task):
    """An update of eight epochs takes longer than the responses to the next prompts. In a step the policy is updated
    twice, and the log-probs before the second time are those of the policy before the first (verl's decoupled PPO).
    """
    count = 8
    epochs = "actor_rollout_ref.actor.ppo_epochs=8"
    steps, output = run(task, *TRAINED, *SEPARATE, epochs, f"trainer.total_training_steps={count}")
    assert len(steps) == count
    assert_trained(steps)
    assert len(fingerprints(output)) == count + 1, "weights did not arrive, or changed the drafter"

    timeline = timeline_of(output)
    assert timeline.lanes == ["replica 0", "policy"]
    overlaps = {}
    for step in timeline.steps:
        spans = timeline.step_spans(step)
        updates = [span for span in spans["policy"] if span.state == "update"]
        overlaps[step] = overlap_s(updates, [span for span in spans["replica 0"] if span.state == "training"])
    assert sum(overlaps.values()) > 0.5, overlaps
    assert "sync" in {span.state for span in timeline.spans("replica 0")}
    assert "policy" not in {span.state for span in timeline.spans("replica 0")}, "the policy has its own device"

    best = str(max(overlaps, key=lambda step: overlaps[step]))
    picture = task / "timeline.svg"
    command = [sys.executable, str(ROOT / "scripts" / "plot_timeline.py"), str(task / "output.log")]
    table = subprocess.run(
        [*command, "--step", best, "--out", str(picture)], capture_output=True, text=True, check=True
    )
    assert {"training", "update"} <= set(table.stdout.split())
    drawing = picture.read_text()
    assert all(f"<!-- {label} -->" in drawing for label in ("policy", "policy update", "training the drafter"))


def test_a_response_that_waits_for_the_policy_does_not_look_like_generation(task):
    """`colocate_async`: unfinished responses are aborted, sent again while the policy updates, and wait for its end.

    Two run at a time and 24 are sent: verl, which looks every two seconds whether eight have ended, finds some that
    have not.
    """
    count = 3
    queue = ("trainer.v1.colocate_async.num_warmup_batches=2", "actor_rollout_ref.rollout.max_num_seqs=2")
    long = ("data.max_response_length=900", "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_epochs=6")
    mode = "trainer.v1.trainer_mode=colocate_async"
    steps, output = run(task, *TRAINED, *long, *queue, mode, f"trainer.total_training_steps={count}")
    assert len(steps) == count
    assert sum(step["tlt/spot/failures"] for step in steps) == 0
    assert len(fingerprints(output)) == count + 1

    timeline = timeline_of(output)
    states = [span.state for span in timeline.spans("replica 0")]
    assert ("generating", "sync") in set(pairwise(states)), "nothing was aborted"
    busy = [span for span in timeline.spans("policy") if span.state != "waiting"]
    own = [span for span in timeline.spans("replica 0") if span.state in ("generating", "idle", "training")]
    assert busy and overlap_s(busy, own) < 0.1, "the policy computed, and the replica's lane says otherwise"


def test_an_fsdp2_policy(task):
    """`sync` with PyTorch's own sharding in Megatron's place."""
    count = 6
    steps, output = run(task, *TRAINED, *FSDP2, f"trainer.total_training_steps={count}")
    assert len(steps) == count
    assert_trained(steps)
    assert_logprobs_agree(steps)
    assert len(fingerprints(output)) == count + 1
