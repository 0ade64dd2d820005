"""Tensors that are sent by shared memory arrive, also where torch's manager of that memory is late."""

import subprocess
import sys

import pytest

LATE_S = 2.5
PATIENT = """
import logging, sys
logging.basicConfig()
if sys.argv[1] == "patient":
    from tlt_verl.patches import sglang_share_cpu_tensors
    from tlt_verl.patches.seam import install
    install(sglang_share_cpu_tensors.SEAM)
"""
RECEIVE = (
    PATIENT
    + """
import pickle, time
import torch
print("ready", flush=True)
sys.stdin.buffer.peek(1)
begun = time.monotonic()
received = pickle.load(sys.stdin.buffer)
print(received[0].tolist(), received[1].tolist(), "late" if time.monotonic() - begun > 1 else "at once")
"""
)
SEND = (
    PATIENT
    + """
import subprocess, time
from multiprocessing.reduction import ForkingPickler
import psutil, torch

torch.multiprocessing.set_sharing_strategy("file_system")
ForkingPickler.dumps(torch.ones(3))  # starts the manager
(manager,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "torch_shm_manager"]

def stop_for(seconds):
    manager.suspend()
    resume = f"import psutil, time; time.sleep({seconds}); psutil.Process({manager.pid}).resume()"
    return subprocess.Popen([sys.executable, "-c", resume])

begun, resumed = time.monotonic(), stop_for(float(sys.argv[2]))
try:
    sent = ForkingPickler.dumps([torch.arange(5.0), torch.full((2, 2), 7.0)])
    print("late" if time.monotonic() - begun > 1 else "at once", flush=True)
finally:
    resumed.wait()
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
receiver = subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1]], **pipes)
assert receiver.stdout.readline() == b"ready\\n"
resumed = stop_for(float(sys.argv[2]))
print(receiver.communicate(bytes(sent))[0].decode(), end="")
resumed.wait()
"""
)


def send(how: str, late_s: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SEND, how, str(late_s), RECEIVE]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("late_s", [0.0, LATE_S])
def test_what_is_sent_arrives_however_late_the_manager_answers(late_s):
    done = send("patient", late_s)
    assert done.returncode == 0, done.stderr[-2000:]
    when = "late" if late_s else "at once"
    assert done.stdout.splitlines() == [when, f"[0.0, 1.0, 2.0, 3.0, 4.0] [[7.0, 7.0], [7.0, 7.0]] {when}"]
    assert ("asked again" in done.stderr) == bool(late_s)


def test_torch_itself_gives_up_after_a_second():
    """The negative control: what the seam is for."""
    done = send("torch", LATE_S)
    assert done.returncode != 0
    assert "Shared memory manager connection has timed out" in done.stderr
