"""Real runs of verl that fail or are killed: /dev/shm and the temporary folder are afterwards as they were before.

That a run which ends well leaves nothing is looked at in every other run of the tests (verl_runner.run).

Each run has a /dev/shm of its own, where the system allows that, and its own TMPDIR: what is new there came of it.
Caches and Ray's sessions, which stay on purpose, lie elsewhere.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import guard
import pytest
import verl_runner
from shared_models import task_model
from tiny_task import make_prompts

pytestmark = pytest.mark.slow

FAILS = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    raise ValueError("this reward function fails")
"""


@pytest.fixture
def task(tmp_path, tmp_path_factory):
    (tmp_path / "model").symlink_to(task_model(tmp_path_factory) / "model")
    make_prompts(tmp_path / "prompts.parquet")
    (tmp_path / "fails.py").write_text(FAILS)
    return tmp_path


@pytest.fixture
def temporary():
    """A TMPDIR with a short name, as sockets in it need, and a file of the user's."""
    folder = Path(tempfile.mkdtemp(prefix="t"))
    (folder / "user's own").touch()
    yield folder
    shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, int]:
    """Names and inodes."""
    return {path.name: path.lstat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("end", ["fails", "SIGTERM"])
def test_a_run_leaves_nothing(task, temporary, end):
    """With spot training: a ring, a board, publications and a second process that trains."""
    overrides = ["trainer.total_training_steps=2", "data.max_response_length=16", *verl_runner.SPOT]
    if end == "fails":
        overrides.append(f"reward.custom_reward_function.path={task}/fails.py")
    else:
        overrides.append("trainer.total_training_steps=1000")
    environment = verl_runner.environment(task) | {
        "TMPDIR": str(temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(task / "cache"),
    }
    before = contents(temporary)
    log, report = task / "output.log", task / "left.json"
    with log.open("w") as out:
        run = guard.start(
            verl_runner.command(task, *overrides),
            report,
            environment=environment,
            cwd=verl_runner.ROOT,
            stdout=out,
            stderr=out,
            shm_size="4g",
        )
        try:
            if end == "SIGTERM":
                wait_for_step(run, log)
                assert len(contents(temporary)) == len(before) + 1, "everything lies in the run's own folder"
                os.kill(run.pid, signal.SIGTERM)
            status = run.wait(800)
        finally:
            run.end()
    output = log.read_text(errors="replace")
    assert status != 0, f"the run ended with {status}: {output[-6000:]}"
    assert ("this reward function fails" in output) == (end == "fails")
    assert run.left() == {"processes": [], "shm": []}, output[-3000:]
    assert contents(temporary) == before
    assert "could not remove" not in output and "there is no guard" not in output


def wait_for_step(run: guard.Guarded, log: Path) -> None:
    """Waits until the first step has ended, and a moment of the second has passed."""
    deadline = time.monotonic() + 400
    while "training/global_step:1" not in log.read_text(errors="replace"):
        assert run.process.poll() is None, f"the run has ended: {log.read_text(errors='replace')[-6000:]}"
        assert time.monotonic() < deadline, "no step has ended"
        time.sleep(0.2)
    time.sleep(1.0)
