"""Which device an entry of CUDA_VISIBLE_DEVICES is, and machines without NVML: real binding, simulated library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nvml_sim.build import Played, build, play

from tlt_verl.spot.nvml import Device

TWO = "moment\ndevice GPU-6f1d-aa\ndevice GPU-6f2e-bb util=80\n"
MIG = "moment\ndevice GPU-0001\ndevice GPU-6f1d mig=1\ninstance MIG-77aa gi=3 ci=0\ninstance MIG-77bb gi=3 ci=1\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def detect(library: Path, folder: Path, trace: str, device: str, count: int = 1, **environment: str) -> Played:
    return play(library, folder, trace, {"do": "detect", "device": device, "steps": [{}] * count}, **environment)


@pytest.mark.parametrize(
    ("trace", "entry", "uuid"),
    [
        (TWO, "0", "GPU-6f1d-aa"),
        (TWO, "1", "GPU-6f2e-bb"),
        (TWO, "GPU-6f2e-bb", "GPU-6f2e-bb"),
        (TWO, "GPU-6f1", "GPU-6f1d-aa"),
        (TWO, "GPU-6F2E", "GPU-6f2e-bb"),
        (MIG, "MIG-77bb", "MIG-77bb"),
        (MIG, "MIG-GPU-6f1d/3/1", "MIG-77bb"),
        (MIG, "1", "MIG-77aa"),
    ],
)
def test_a_device_is_found(library: Path, tmp_path: Path, trace: str, entry: str, uuid: str) -> None:
    said = detect(library, tmp_path, trace, entry).said[0]
    assert said["uuid"] == uuid
    assert said["cause"] == ("utilisation" if uuid == "GPU-6f2e-bb" else "")


@pytest.mark.parametrize(
    ("trace", "entry", "name"),
    [
        (TWO, "2", "InvalidArgument"),
        (TWO, "GPU-7", "NotFound"),
        (MIG, "MIG-77cc", "NotFound"),
        (MIG, "MIG-GPU-6f1d/4/0", "NotFound"),
        (MIG, "MIG-GPU-0001/3/0", "NotFound"),
    ],
)
def test_a_device_that_is_not_there_is_not_idle(
    library: Path, tmp_path: Path, trace: str, entry: str, name: str
) -> None:
    said = detect(library, tmp_path, trace, entry).said[0]
    assert (said["cause"], said["uuid"]) == ("nvml_error", None)
    assert said["reason"].startswith(f"NVMLError_{name} (")


def test_a_prefix_of_two_devices_is_refused(library: Path, tmp_path: Path) -> None:
    played = detect(library, tmp_path, TWO, "GPU-6f")
    assert played.said == [
        {"error": "CUDA_VISIBLE_DEVICES: 'GPU-6f' begins the UUIDs of GPU-6f1d-aa, GPU-6f2e-bb; takes one device"}
    ]
    assert played.calls.count("nvmlInitWithFlags") == played.calls.count("nvmlShutdown") == 1


@pytest.mark.parametrize("entry", ["", "0,1", "-1", "cuda:0", "GPU-", "GPU-xyz", "MIG-GPU-6f1d", "MIG-GPU-6f1d/3"])
def test_what_is_no_entry_is_refused_by_name(entry: str) -> None:
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES: got '{entry}' for one device, takes an index"):
        Device(entry)


def test_a_prefix_is_found_beside_a_lost_device(library: Path, tmp_path: Path) -> None:
    played = detect(library, tmp_path, "moment\ndevice GPU-6f1d lost=1\ndevice GPU-6f2e\n", "GPU-6f2")
    assert (played.said[0]["uuid"], played.said[0]["cause"]) == ("GPU-6f2e", "")


@pytest.mark.parametrize("entry", ["0", "GPU-6f1d", "GPU-6f1"])
def test_indices_that_change_do_not_matter(library: Path, tmp_path: Path, entry: str) -> None:
    """The idle device stays the one that is read, wherever it stands, and in a new session of NVML too."""
    mine, theirs, more = "device GPU-6f1d\n", "device GPU-6f2e util=80\n", "device GPU-0001 util=80\n"
    trace = f"moment\n{mine}{theirs}moment\n{theirs}{mine}moment\n{more}{theirs}{mine}moment\n{theirs}"
    trace += f"moment\n{more}{mine}moment\n{mine}{more}"
    played = detect(library, tmp_path, trace, entry, 6)
    assert [said["uuid"] for said in played.said] == ["GPU-6f1d"] * 6
    assert [said["cause"] for said in played.said] == ["", "", "", "nvml_error", "", ""]


MIXED = "moment\ndevice GPU-aa name=A100\ndevice GPU-bb name=H100\n"


@pytest.mark.parametrize(
    ("trace", "entry", "order", "warned"),
    [
        (MIXED, "0", {}, True),
        (MIXED, "0", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, True),
        (MIXED, "0", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False),
        (MIXED, "GPU-aa", {}, False),
        (TWO, "0", {}, False),
    ],
)
def test_an_index_among_different_devices_is_warned_of(
    library: Path, tmp_path: Path, trace: str, entry: str, order: dict[str, str], warned: bool
) -> None:
    played = detect(library, tmp_path, trace, entry, **order)
    assert ("Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the device by its UUID" in played.log) is warned


# --- machines without NVML, and the report ----------------------------------------------------------------------------


def choose(library: Path | None, folder: Path, trace: str) -> tuple[list[Any], str]:
    played = play(library, folder, trace, {"do": "choose", "devices": [None, "0", "0"]})
    return [said["probe"] for said in played.said], played.log


@pytest.mark.parametrize(
    ("code", "name"), [(None, "LibraryNotFound"), (9, "DriverNotLoaded"), (18, "LibRmVersionMismatch")]
)
def test_a_machine_without_nvml_says_so_once_and_uses_the_host(
    library: Path, tmp_path: Path, code: int | None, name: str
) -> None:
    trace = f"moment\nerror nvmlInitWithFlags {code}\n"
    probes, log = choose(None if code is None else library, tmp_path, trace)
    assert probes == ["HostProbe"] * 3
    (line,) = log.splitlines()
    assert line.startswith(f"WARNING NVML is not here: NVMLError_{name} (")
    assert line.endswith("The machine's cores stand for device 0")


def test_a_machine_without_the_binding_uses_the_host(library: Path, tmp_path: Path) -> None:
    """As after `pip uninstall nvidia-ml-py`: a file in its place that cannot be imported."""
    (tmp_path / "pynvml.py").write_text("raise ImportError('no binding')")
    played = play(library, tmp_path, TWO, {"do": "choose", "devices": ["0"]}, PYTHONPATH=python_path(tmp_path))
    assert played.said[0]["probe"] == "HostProbe"
    assert "ImportError: no binding; pip install nvidia-ml-py" in played.log


def python_path(folder: Path) -> str:
    return f"{folder}:{Path(__file__).parents[2]}"


@pytest.mark.parametrize("trace", [TWO, f"{TWO}error nvmlInitWithFlags 10\n", f"{TWO}error nvmlDeviceGetUUID 15\n"])
def test_nvml_that_is_there_gets_its_probe(library: Path, tmp_path: Path, trace: str) -> None:
    probes, log = choose(library, tmp_path, trace)
    assert probes == ["HostProbe", "NvmlProbe", "NvmlProbe"]
    assert log == ""


def test_the_report_of_two_devices(library: Path, tmp_path: Path) -> None:
    for trace, error, names in (
        (MIXED, None, ["A100", "H100"]),
        (f"{MIXED}error nvmlDeviceGetName 15\n", "NVMLError_GpuIsLost", []),
        ("moment\ndevice GPU-aa name=A100\ndevice GPU-bb lost=1\n", "NVMLError_GpuIsLost", ["A100"]),
    ):
        played = play(library, tmp_path, trace, {"do": "report"})
        (said,) = played.said
        assert (said["driver"], said["names"]) == ("580.65.06", names)
        assert said["error"] is None if error is None else said["error"].startswith(error)
        assert played.calls.count("nvmlInitWithFlags") == played.calls.count("nvmlShutdown") == 1
