"""Traces of a simulated `libnvidia-ml.so.1`, read through the real binding: decisions are those of the truth tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvml_sim.build import Played, build, play

from tlt_verl.board import Phase

OWN, ENGINE, OTHER = 100, 200, 300
UUID = "GPU-6f1d"

Detect = Callable[..., Played]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def detect(library: Path, tmp_path: Path) -> Detect:
    def run(trace: str, steps: list[dict[str, Any]], device: str = UUID, **settings: Any) -> Played:
        task = {"do": "detect", "device": device, "own": [OWN], "engine": [ENGINE], "steps": steps} | settings
        return play(library, tmp_path, trace, task)

    return run


def moments(*each: str) -> str:
    """A trace from one text for each moment; lines of it are divided by semicolons."""
    return "".join(f"moment\n{text.replace(';', chr(10))}\n" for text in each)


def causes(played: Played) -> list[str]:
    assert all(said["train"] is (said["cause"] == "") for said in played.said)
    return [said["cause"] for said in played.said]


# --- the detector's table ---------------------------------------------------------------------------------------------


def test_the_truth_table(detect: Detect) -> None:
    """Every combination of the three probes, while not training and while training: the first objection decides."""
    ours = f"process {OWN}"
    devices = {"": f"device {UUID}; {ours}", "other_process": f"device {UUID} util=90; {ours}; process {OTHER} sm=90"}
    each = list(itertools.product(Phase, (0, 3), devices, (False, True)))
    steps = [{"phase": phase, "requests": requests, "training": training} for phase, requests, _, training in each]
    expected = [
        "phase" if phase is not Phase.GENERATE else "requests" if requests else device
        for phase, requests, device, _ in each
    ]
    assert causes(detect(moments(*(devices[device] for *_, device, _ in each)), steps)) == expected


# --- one device, moment by moment -------------------------------------------------------------------------------------

FULL = "free=1"
CASES = {
    "idle": ((f"device {UUID}", False, ""),),
    "at the threshold": ((f"device {UUID} util=10; process {OTHER} sm=10", False, ""),),
    "busy with what is no process": ((f"device {UUID} util=80", False, "utilisation"),),
    "the engine's last batch is vouched for": ((f"device {UUID} util=80; process {ENGINE} sm=80", False, ""),),
    "another computes": (
        (f"device {UUID} util=60; process {OTHER} sm=60", False, "other_process"),
        (f"device {UUID}; process {OTHER}", False, ""),
    ),
    "another is there and idle": (
        (f"device {UUID}; process {OTHER} mem=30", False, ""),
        (f"device {UUID} util=95; process {OTHER} mem=30; process {OWN} sm=95", True, ""),
    ),
    "we compute alone": (
        (f"device {UUID}; process {OWN} mem=0.5", False, ""),
        (f"device {UUID} util=98; process {OWN}", True, ""),  # the driver has not sampled us yet
        (f"device {UUID} util=98; process {OWN} sm=40", True, ""),  # its period is another than the device's
        (f"device {UUID} util=98; process {OWN} sm=97", False, ""),  # nor forgotten us
    ),
    "another computes beside us": (
        (f"device {UUID} util=99; process {OWN} sm=99", True, ""),
        (f"device {UUID} util=99; process {OWN} sm=50; process {OTHER} sm=49", True, "other_process"),
    ),
    "another comes before the driver has sampled us": (
        (f"device {UUID}; process {OWN}", False, ""),
        (f"device {UUID} util=99; process {OWN}; process {OTHER}", True, "other_process"),
    ),
    "several that are each below the threshold": (
        (f"device {UUID} util=27; process {OTHER} sm=9; process 301 sm=9; process 302 sm=9", False, "other_process"),
    ),
    "memory full": ((f"device {UUID} {FULL}; process {OTHER} mem=79", False, "memory"),),
    "memory that we hold ourselves": (
        (f"device {UUID} {FULL} util=90; process {OWN} mem=3 sm=90", True, ""),
        (f"device {UUID} {FULL} util=90; process {OWN} mem=2 sm=90; process {OTHER} mem=77", True, "memory"),
        (f"device {UUID} {FULL}; process {OWN} mem=3", False, "memory"),
    ),
    "memory that we hold and that is not told": (
        (f"device {UUID} {FULL} util=90; process {OWN} mem=-1 sm=90", True, ""),
        (f"device {UUID} {FULL}; process {OWN} mem=-1", False, "memory"),
    ),
    "a graphics client": ((f"device {UUID} util=50; process {OWN} sm=20", False, "utilisation"),),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_device(detect: Detect, case: tuple[tuple[str, bool, str], ...]) -> None:
    steps = [{"training": training} for _, training, _ in case]
    assert causes(detect(moments(*(text for text, _, _ in case)), steps)) == [cause for *_, cause in case]


NO_SHARES = "error nvmlDeviceGetProcessUtilization 3"


def test_without_shares_utilisation_decides_and_then_who_is_new(detect: Detect) -> None:
    trace = moments(
        f"device {UUID} util=40; process {OTHER}; {NO_SHARES}",
        f"device {UUID}; process {OTHER}; {NO_SHARES}",
        f"device {UUID} util=90; process {OTHER}; process {OWN}; {NO_SHARES}",
        f"device {UUID} util=90; process {OTHER}; process 301; process {OWN}; {NO_SHARES}",
        f"device {UUID} util=10; process {OTHER}; process 301; {NO_SHARES}",
        f"device {UUID} util=90; process {OTHER}; process 301; {NO_SHARES}",
        f"device {UUID} util=10; process {OTHER}; process 302; {NO_SHARES}",  # nobody computes yet
        f"device {UUID} util=90; process {OTHER}; process 302; {NO_SHARES}",
    )
    steps = [{"training": training} for training in (False, False, True, True, False, True, True, True)]
    played = detect(trace, steps)
    assert causes(played) == ["utilisation", "", "", "other_process", "", "", "", "other_process"]
    assert "process 301 came to" in played.said[3]["reason"]
    assert played.log.count("utilisation by process, which is left out") == 1


def test_without_utilisation_shares_decide(detect: Detect) -> None:
    untold = "error nvmlDeviceGetUtilizationRates 3"
    trace = moments(
        f"device {UUID}; process {OTHER}; {untold}",
        f"device {UUID}; process {OTHER} sm=40; {untold}",
        f"device {UUID}; process {OTHER}; process {OWN} sm=90; {untold}",
        f"device {UUID}; process {OTHER} sm=11; process {OWN} sm=80; {untold}",
    )
    steps = [{"training": training} for training in (False, False, True, True)]
    assert causes(detect(trace, steps)) == ["", "other_process", "", "other_process"]


def test_a_container_in_which_we_have_another_pid(detect: Detect) -> None:
    """Who computes there may be ourselves; a newcomer is not."""
    trace = moments(
        f"device {UUID}; process 7001",
        f"device {UUID} util=90; process 7001 sm=90",
        f"device {UUID} util=90; process 7001 sm=50; process 7002 sm=40",
        f"device {UUID} util=90; process 7001 sm=50; process 7002 sm=40",
    )
    steps = [{"training": training} for training in (False, True, True, False)]
    assert causes(detect(trace, steps)) == ["", "", "other_process", "other_process"]


def test_shares_that_were_told_once_are_held_for_a_second(detect: Detect) -> None:
    trace = moments(f"device {UUID} util=50; process {OTHER} sm=50 at=1000")
    steps = [{"moment": 0, "at": at, "training": False} for at in (1.0, 1.2, 1.9, 2.5)]
    assert causes(detect(trace, steps)) == ["other_process"] * 3 + ["utilisation"]


def test_the_machines_clock_is_set_back(detect: Detect) -> None:
    """The driver's samples carry the time of day: new ones are then older than the last that was seen."""
    trace = moments(
        f"device {UUID} util=50; process {OWN} sm=50 at=9000000",
        f"device {UUID} util=90; process {OWN}; process {OTHER} sm=60 at=2000000",
        f"device {UUID} util=90; process {OWN}; process {OTHER} sm=60 at=3000000",
    )
    assert causes(detect(trace, [{"training": True}] * 3)) == ["", "other_process", "other_process"]


def test_readings_within_the_window_are_one(detect: Detect) -> None:
    trace = moments(f"device {UUID}", f"device {UUID} util=80")
    steps = [{"moment": 0, "at": 1.0}, {"moment": 1, "at": 1.05}, {"moment": 1, "at": 1.11}]
    played = detect(trace, steps)
    assert [said["cause"] for said in played.said[:2]] == ["", ""]
    assert played.calls.count("nvmlDeviceGetMemoryInfo") == 2


# --- MIG --------------------------------------------------------------------------------------------------------------

MIG = "MIG-77aa"


def test_mig_tells_processes_and_memory_only(detect: Detect) -> None:
    head = f"device {UUID} mig=1 util=90; process {OTHER} sm=90; instance {MIG} gi=3 ci=0"
    cases = (
        (f"{head} free=9", False, ""),
        (f"{head} free=9; process {ENGINE}", False, ""),
        (f"{head} free=9; process {OTHER}", False, "other_process"),
        (f"{head} free=1; process {ENGINE}", False, "memory"),
        (f"{head} free=9; process {ENGINE}", False, ""),
        (f"{head} free=1; process {ENGINE}; process {OWN} mem=8", True, ""),
        (f"{head} free=0; process {ENGINE}; process {OWN} mem=8; process {OTHER}", True, "other_process"),
    )
    played = detect(moments(*(text for text, _, _ in cases)), [{"training": t} for _, t, _ in cases], device=MIG)
    assert causes(played) == [cause for *_, cause in cases]
    assert "which does not tell who computes" in played.said[2]["reason"]
    assert played.log.count("MIG-77aa does not tell its utilisation, which is left out: NVMLError_NotSupported") == 1


# --- errors -----------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetProcessUtilization",
)
ERRORS = {
    1: "Uninitialized",
    2: "InvalidArgument",
    4: "NoPermission",
    10: "Timeout",
    11: "IrqIssue",
    15: "GpuIsLost",
    16: "ResetRequired",
    17: "OperatingSystem",
    20: "Memory",
    999: "Unknown",
}


def test_every_error_of_every_question_by_its_name_and_back(detect: Detect) -> None:
    """While training: it ends at once, and comes back when NVML answers again."""
    each = list(itertools.product(QUESTIONS, ERRORS))
    busy = f"device {UUID} util=90; process {OWN} sm=90"
    texts = [text for question, code in each for text in (f"{busy}; error {question} {code}", busy)]
    played = detect(moments(*texts), [{"training": True}] * len(texts))
    assert causes(played) == ["nvml_error", ""] * len(each)
    for said, (_, code) in zip(played.said[::2], each, strict=True):
        assert said["reason"].startswith(f"NVMLError_{ERRORS[code]} ("), said["reason"]


def test_an_error_without_a_name(detect: Detect) -> None:
    played = detect(moments(f"device {UUID}; error nvmlDeviceGetMemoryInfo 77"), [{}])
    assert causes(played) == ["nvml_error"] and "an error without a name" in played.said[0]["reason"]


def test_questions_that_a_driver_does_not_know_are_left_out_and_named_once(detect: Detect) -> None:
    """Not supported, or a driver older than the question; nothing but engine and phase decides then."""
    for code, name in ((3, "NotSupported"), (13, "FunctionNotFound")):
        unknown = (*QUESTIONS[1:], "nvmlDeviceGetComputeRunningProcesses_v2")
        nothing = "; ".join(f"error {question} {code}" for question in unknown)
        played = detect(moments(*[f"device {UUID} util=90 {FULL}; process {OTHER}; {nothing}"] * 3), [{}] * 3)
        assert causes(played) == [""] * 3
        for question in ("free memory", "utilisation", "compute processes", "utilisation by process"):
            said = f"INFO {UUID} does not tell its {question}, which is left out: NVMLError_{name}"
            assert played.log.count(said) == 1


def test_an_older_driver_lists_processes_by_an_older_function(detect: Detect) -> None:
    trace = moments(f"device {UUID} free=0; process {OWN} mem=5; error nvmlDeviceGetComputeRunningProcesses_v3 13")
    assert causes(detect(trace, [{"training": True}, {"moment": 0, "training": False}])) == ["", "memory"]


def test_a_lost_device_is_looked_for_once_a_second(detect: Detect) -> None:
    lost, back = f"device GPU-0001; device {UUID} lost=1", f"device {UUID}"
    steps = [{"moment": 0, "at": 1.0}]
    steps += [{"moment": 1, "at": 1.2 + 0.1 * number} for number in range(30)]  # until 4.1
    steps += [{"moment": 2, "at": at} for at in (4.15, 5.3, 6.5)]
    played = detect(moments(f"device GPU-0001; device {UUID}", lost, back), steps)
    assert causes(played) == [""] + ["nvml_error"] * 31 + ["", ""]
    assert "NVMLError_GpuIsLost (GPU is lost); a device has fallen off the bus" in played.said[1]["reason"]
    assert played.calls.count("nvmlInitWithFlags") - 1 == 3  # at 2.2, 3.2 and 5.3
    assert played.calls.count("nvmlShutdown") == 3


def test_a_device_that_is_gone_after_a_reset_and_comes_back(detect: Detect) -> None:
    trace = moments(f"device {UUID}", "device GPU-0001", f"device GPU-0001; device {UUID}")
    played = detect(trace, [{}, {}, {}])
    assert causes(played) == ["", "nvml_error", ""]
    assert "NVMLError_NotFound (Not Found); there is no such device" in played.said[1]["reason"]


@pytest.mark.parametrize(("code", "name"), [(4, "NoPermission"), (10, "Timeout"), (999, "Unknown")])
def test_nvml_that_fails_at_the_start_is_tried_again(detect: Detect, code: int, name: str) -> None:
    """The index becomes a UUID at the first answer."""
    played = detect(
        moments(f"device {UUID}; error nvmlInitWithFlags {code}", f"device {UUID}"),
        [{"moment": 0, "at": 0.5}, {"moment": 1, "at": 0.9}, {"moment": 1, "at": 1.1}],
        device="0",
    )
    assert causes(played) == ["nvml_error", "nvml_error", ""]
    assert played.said[0]["reason"].startswith(f"NVMLError_{name} (")
    assert [said["uuid"] for said in played.said] == [None, None, UUID]
    assert [said["error"] for said in played.said] == [f"NVMLError_{name}"] * 2 + [None]
