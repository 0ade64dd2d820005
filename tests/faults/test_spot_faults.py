"""Real runs of verl in which things go wrong with the drafter's training: the tokens stay, the log and metrics say why.

The policy does not learn (lr 0) and decodes greedily, so a prompt has one answer, whoever drafts it: every response of
a run with faults is compared with that of a run without faults and without spot training, token for token. Every wait
has a bound, here and in the product: a run that hangs is a test that fails.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import guard
import pytest
import torch
from injector import COORDINATOR, WORKER, Machine, Watched
from random_weights import spread_weights
from shared_models import once
from tiny_task import make_model, make_prompts
from transformers import AutoModelForCausalLM
from verl_runner import HERE, SPOT, TLT, run

from tlt_verl.board import SpotState

pytestmark = pytest.mark.slow

SEED = 5
PROMPTS, BATCH, SIBLINGS = 16, 8, 2
KILLS = 3  # of the worker
LONG_KILLS = 20
MOST_S = 3.0  # after a process came up until it is killed
BEHIND_S = 3600
SLOW_S = 6
TRAINED = (*SPOT, f"{TLT}spot.idle_ms=20", f"{TLT}tap.buffer_gb=0.03")

PROGRAM = """
import json, os, sys, threading, time
from pathlib import Path

folder, faults = map(Path, sys.argv[1:])
found = {}

def timed(work):
    begun = time.monotonic()
    work()
    return time.monotonic() - begun

def write(path):
    with path.open("w") as file:
        file.write("written")
        file.flush()
        os.fsync(file.fileno())

def error(work, *args):
    try:
        work(*args)
    except OSError as problem:
        return problem.errno

def waits():
    semaphore, condition = threading.Semaphore(0), threading.Condition()
    with condition:
        return [timed(lambda: semaphore.acquire(timeout=0.5)), timed(lambda: condition.wait(0.5))]

begun, monotonic = time.time(), time.monotonic()
(faults / "back").write_text("3600")
time.sleep(0.1)
found["behind"], found["monotonic"] = begun - time.time(), time.monotonic() - monotonic
found["waits"] = waits()
(faults / "back").unlink()
meant, other = folder / "meant", folder / "other"
write(other / "there")
(faults / "readonly").write_text("1")
time.sleep(0.1)
found["readonly"] = [
    error(write, meant / "file"), error((meant / "folder").mkdir), error(meant.mkdir), error(write, other / "file"),
]
(faults / "readonly").unlink()
(faults / "slow").write_text("1")
time.sleep(0.1)
found["slow"], found["fast"] = timed(lambda: write(meant / "file")), timed(lambda: write(other / "file"))
print(json.dumps(found))
"""
"""What is tried on the bad machine."""

Answers = dict[tuple[int, ...], tuple[int, ...]]
Records = list[tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A target that says something else at every prompt."""

    def make(folder: Path) -> None:
        make_model(folder, tied=False)
        target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(SEED)
        spread_weights(target, 0.15)  # no two best tokens are closer than 4e-4, rounding is 1e-6
        target.save_pretrained(folder)

    return once(tmp_path_factory, "answering", make)


def greedy_run(folder: Path, model: Path, steps: int, *overrides: str, tool_s: float = 1.0, more=None, **options):
    """The metrics, the log and the tokens of a run; an agent's tool takes as long as `folder/tool` says."""
    (folder / "model").symlink_to(model)
    make_prompts(folder / "prompts.parquet", PROMPTS)
    (folder / "loops.yaml").write_text("- name: recording\n  _target_: recording_loop.Recording\n")
    (folder / "tool").write_text(str(tool_s))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(Path(__file__).parent)]),
        "TLT_TEST_TOKENS": str(folder / "tokens"),
        "TLT_TEST_TOOL": str(folder / "tool"),
    }
    metrics, log = run(
        folder,
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        f"data.train_batch_size={BATCH}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
        "data.max_response_length=96",
        f"actor_rollout_ref.rollout.n={SIBLINGS}",
        "actor_rollout_ref.actor.optim.lr=0",
        "actor_rollout_ref.rollout.top_k=1",
        "actor_rollout_ref.rollout.agent.default_agent_loop=recording",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={folder}/loops.yaml",
        *overrides,
        more=environment | (more or {}),
        **options,
    )
    assert [step["training/global_step"] for step in metrics] == list(range(1, steps + 1))
    lines = map(json.loads, (folder / "tokens").read_text().splitlines())
    return metrics, log, [(tuple(line["prompt"]), tuple(line["response"])) for line in lines]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, model) -> Answers:
    """What the policy answers where no drafter is trained, nor drafts."""
    steps = PROMPTS // BATCH
    metrics, _, records = greedy_run(tmp_path_factory.mktemp("reference"), model, steps, tool_s=0)
    assert all(step["tlt/draft_share/off"] == 1 for step in metrics)
    found = dict(records)
    assert len(found) == PROMPTS and len(set(found.values())) == PROMPTS, "the answers do not tell prompts apart"
    assert all(len(set(response)) > 8 for response in found.values()), "the answers are too simple to show a change"
    assert_same(records, found, steps)
    return found


def assert_same(records: Records, answers: Answers, steps: int) -> None:
    """Every response of a run, all of them there, is the prompt's answer."""
    assert len(records) == steps * BATCH * SIBLINGS
    other = [(prompt, response) for prompt, response in records if answers[prompt] != response]
    assert not other, f"{len(other)} of {len(records)} responses changed, for instance {other[0]}"


def test_a_changed_token_is_seen(answers):
    """What all others rest on: one token of one response more, less or different fails the comparison."""
    records = [pair for pair in answers.items() for _ in range(SIBLINGS)]
    steps = len(records) // (BATCH * SIBLINGS)
    assert_same(records, answers, steps)
    prompt, response = records[3]
    for changed in (response[:-1], (*response, 1), (*response[:5], response[5] ^ 1, *response[6:])):
        with pytest.raises(AssertionError, match="1 of 32 responses changed"):
            assert_same([*records[:3], (prompt, changed), *records[4:]], answers, steps)
    with pytest.raises(AssertionError):
        assert_same(records[1:], answers, steps)


@pytest.mark.parametrize("kills", [KILLS, pytest.param(LONG_KILLS, marks=pytest.mark.long)])
def test_killed_workers_and_coordinators_and_a_loss_that_is_no_number(tmp_path, model, answers, kills):
    """Hidden states that are NaN; then the worker is killed at random moments, the coordinator twice."""
    steps, rng = 8 + 2 * kills, random.Random(SEED)
    coordinator_kills = (kills // 3, 2 * kills // 3)  # before these kills of the worker
    states: Counter[str] = Counter()

    def meanwhile(process: subprocess.Popen) -> None:
        watched = Watched(process, tmp_path)
        watched.wait_for_training(seconds=400)
        with watched.poisoned_ring(hidden_width=96, vocabulary=200):
            watched.wait_for("the loss", lambda: "(diverged)" in watched.log(), 120)
        watched.wait_for("its metric", lambda: watched.total("tlt/spot/failures/diverged"), 120)
        watched.wait_for_training(1000)
        for kill in range(kills):
            if kill in coordinator_kills:
                watched.kill(COORDINATOR, rng, MOST_S)
            if kill == 0:  # one of the moments is no luck
                watched.wait_for("training", lambda: watched.board.state == SpotState.TRAINING, 120)
            watched.kill(WORKER, rng, MOST_S if kill else 0)
            states[SpotState(watched.board.state).name] += 1  # as the dead left it
        merged = watched.latest("tlt/spot/merged")
        watched.wait_for_training(1000)
        watched.wait_for("a merge", lambda: watched.latest("tlt/spot/merged") > merged, 120)
        (tmp_path / "tool").write_text("0.2")

    metrics, log, records = greedy_run(tmp_path, model, steps, *TRAINED, tool_s=5, meanwhile=meanwhile, timeout_s=900)
    assert_same(records, answers, steps)
    print(f"killed while the worker was {dict(states)}")
    assert states["TRAINING"] > 0, "none of the moments was one of training"

    def total(name: str) -> float:
        return sum(step.get(name, 0) for step in metrics)

    assert total("tlt/spot/failures/diverged") >= 1
    assert re.search(r"tlt: the drafter's training pauses for \d+ s \(diverged\): .*nan", log)
    assert total("tlt/spot/worker_starts") >= kills + 1
    assert total("tlt/spot/host/worker") >= kills and total("tlt/spot/host_failures") >= kills
    assert len(re.findall("its worker has ended; another one is started", log)) >= kills
    assert len(re.findall("the spot coordinator is back, at version", log)) == len(coordinator_kills)
    assert total("tlt/spot/host/coordinator") >= len(coordinator_kills)
    assert metrics[-1]["tlt/drafter/version"] >= 1 and metrics[-1]["tlt/draft_share/eagle"] > 0
    assert total("tlt/tap/failures") == 0
    coordinators = set(re.findall(r"\(SpotCoordinator pid=(\d+)\)", log))
    assert len(coordinators) == 1 + len(coordinator_kills), "a coordinator ended that nobody had killed"


def test_a_full_shm_a_disk_that_is_read_only_and_slow_and_a_clock_that_is_set_back(tmp_path, model, answers):
    """One after the other, with training in between; where the system lets us, /dev/shm is really full meanwhile.

    Where it does not (no mount namespaces), the test of a ring that does not fit stands for a full /dev/shm alone.
    """
    steps, rng = 16, random.Random(SEED)
    machine = Machine(tmp_path / "machine", "/coordinator", "/tlt_drafter")
    private = bool(guard.private_shm("300m"))

    def meanwhile(process: subprocess.Popen) -> None:
        watched = Watched(process, tmp_path)
        watched.wait_for_training(seconds=400)
        if private:
            with watched.full_shm(spared=8 << 20):  # verl's own sync of the weights goes through it too
                recorded = watched.total("tlt/tap/tokens")
                watched.kill(WORKER, rng, MOST_S)
                watched.wait_for_training(1000)
                watched.wait_for("the tap", lambda: watched.total("tlt/tap/tokens") > recorded, 120)
        errors = watched.latest("tlt/spot/checkpoint_errors")
        with machine.wrong("readonly"):
            watched.wait_for("its cause", lambda: "OSError: [Errno 30] Read-only file system" in watched.log(), 120)
            watched.wait_for("verl's checkpoint", lambda: "not so that the drafter saved in" in watched.log(), 120)
            watched.wait_for("the count", lambda: watched.latest("tlt/spot/checkpoint_errors") > errors, 120)
            watched.wait_for_training(1000)
        errors = watched.latest("tlt/spot/checkpoint_errors")
        with machine.wrong("slow", SLOW_S):
            watched.wait_for("the count", lambda: watched.latest("tlt/spot/checkpoint_errors") > errors, 300)
            watched.wait_for("its cause", lambda: "has not taken the numbers" in watched.log(), 120)
            watched.wait_for_training(1000, 300)  # verl waits for the drafter's checkpoint beside its own, with a bound
        with machine.wrong("back", BEHIND_S):
            for name in (WORKER, COORDINATOR, "sglang::scheduler", "ray::TLTHttpServer"):
                (one, *_) = watched.find(name)
                assert str(machine.library) in Path(f"/proc/{one.pid}/maps").read_text(), f"{name} has another clock"
            watched.wait_for_training(2000)
            watched.kill(WORKER, rng, MOST_S)
            watched.wait_for_training(1000)
            (tmp_path / "tool").write_text("0.2")
            process.wait(400)

    metrics, log, records = greedy_run(
        tmp_path,
        model,
        steps,
        *TRAINED,
        "trainer.save_freq=3",
        "trainer.max_actor_ckpt_to_keep=1",
        "ray_kwargs.ray_init.object_store_memory=100000000",
        f"+ray_kwargs.ray_init._plasma_directory={tmp_path}",
        tool_s=3,
        meanwhile=meanwhile,
        shm_size="300m",
        more=machine.environment,
        timeout_s=900,
    )
    assert_same(records, answers, steps)
    assert re.search(r"no checkpoint of the drafter, training goes on: .*(Timeout|has not taken)", log)
    saved, missed = (
        {int(step) for step in re.findall(rf"{said} .*global_step_(\d+)/tlt_drafter", log)}
        for said in ("tlt: the drafter saved in", "tlt: not so that the drafter saved in")
    )
    assert missed and max(saved) > max(missed), "no checkpoint of the drafter after those that could not be written"
    assert most_back_s(log) > BEHIND_S / 2, "the log does not say that the clock was set back"
    assert sum(step["tlt/spot/worker_starts"] for step in metrics) == 2 + private
    assert sum(step["tlt/tap/failures"] for step in metrics) == 0


def most_back_s(log: str) -> float:
    """By how much the times of the server's log step back at most."""
    found = re.findall(r"\(TLTHttpServer pid=\d+\)\S* \[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\]", log)
    times = [datetime.fromisoformat(time) for time in found]
    return max(((before - after).total_seconds() for before, after in itertools.pairwise(times)), default=0.0)


def test_a_ring_that_does_not_fit_into_shm(tmp_path, model, answers):
    """/dev/shm is too full when the engine starts: the rollouts go on without a tap, and nothing is trained."""
    steps = PROMPTS // BATCH
    size = os.statvfs("/dev/shm")
    too_much = size.f_blocks * size.f_frsize / 2**30 + 1
    metrics, log, records = greedy_run(
        tmp_path, model, steps, *TRAINED, f"{TLT}tap.buffer_gb={too_much:.0f}", tool_s=0.5, timeout_s=480
    )
    assert_same(records, answers, steps)
    assert re.search(r"tlt: no tap, rollouts go on without it: .*No space left on device: .*tap.buffer_gb", log)
    assert sum(step["tlt/tap/failures"] for step in metrics) == 1
    assert sum(step.get("tlt/tap/segments", 0) for step in metrics) == 0
    assert sum(step["tlt/drafter/tokens"] for step in metrics) == 0


def test_the_bad_machine_is_as_bad_as_it_says(tmp_path):
    """The library by itself: what it breaks, where, and that waits are as long as ever on a clock that is set back."""
    machine = Machine(tmp_path / "machine", "/meant")
    (tmp_path / "meant").mkdir()
    (tmp_path / "other").mkdir()
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(machine.environment["BAD_MACHINE"])],
        env=os.environ | machine.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["behind"] == pytest.approx(BEHIND_S, abs=2) and found["monotonic"] < 30
    assert all(0.4 < waited < 5 for waited in found["waits"])
    assert found["readonly"] == [30, 30, 17, None]
    assert found["fast"] < 1.9 < found["slow"] < 20
