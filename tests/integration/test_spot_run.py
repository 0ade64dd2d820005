"""A real run of verl in which the drafter is trained while the replica is idle, saved with the policy, and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shared_models import task_model
from tiny_task import make_prompts
from verl_runner import SPOT, TLT, assert_logprobs_agree, fingerprints, run

from tlt_verl.report.timeline import read_events

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # a drafter is trained on idle cores: within so many steps

STEPS = 6


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spot")
    (folder / "model").symlink_to(task_model(tmp_path_factory) / "model")
    make_prompts(folder / "prompts.parquet")
    return folder


def spot_run(task: Path, *overrides: str) -> tuple[list[dict[str, float]], str]:
    return run(task, *SPOT, f"{TLT}spot.idle_ms=50", "actor_rollout_ref.rollout.n=8", *overrides)


def test_a_drafter_is_trained_while_the_replica_is_idle_and_comes_back_with_the_policy(task):
    steps, output = spot_run(task, f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={STEPS}")
    assert len(steps) == STEPS
    last = steps[-1]
    assert sum(step["tlt/spot/trained_s"] for step in steps) > 0
    assert all(0 <= step["tlt/spot/trained_s"] <= step["tlt/spot/idle_s"] for step in steps)
    assert sum(step["tlt/spot/failures"] + step["tlt/spot/host_failures"] for step in steps) == 0
    for who in ("worker of replica 0", "coordinator"):
        assert re.search(rf"tlt: the spot {who} is up with \d+ MB, imported of upstream: nothing", output), who
    assert last["tlt/drafter/tokens"] > 0 and last["tlt/spot/merged"] > 0
    assert last["tlt/drafter/version"] >= 1, "nothing was published"
    assert sum(step["tlt/gate/published"] for step in steps) >= 1
    assert_logprobs_agree(steps)
    assert len(fingerprints(output)) == STEPS + 1, "a sync changed the drafter, or a publication the target"
    reading = read_events(output.splitlines())
    states = {event.state for event in reading.events}
    assert {"idle", "generating", "policy", "training", "yielding"} <= states and not reading.unread
    assert re.search(r"tlt: the drafter saved in .*tlt_drafter", output)

    resumed, output = spot_run(task, f"trainer.total_training_steps={STEPS + 1}", "trainer.resume_mode=auto")
    assert [step["training/global_step"] for step in resumed] == [STEPS + 1]
    assert re.search(r"tlt: the drafter goes on from .*tlt_drafter", output)
    assert resumed[0]["tlt/drafter/version"] >= last["tlt/drafter/version"]
    assert resumed[0]["tlt/drafter/tokens"] >= last["tlt/drafter/tokens"]
    assert resumed[0]["tlt/draft_share/eagle"] > 0.9, "the drafter that came back does not draft"
    assert_logprobs_agree(resumed)
