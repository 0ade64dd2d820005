"""`tlt-verl doctor`: one real run of the command, and each thing that can be wrong played in process."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from tlt_verl.patches import all_seams
from tlt_verl.patches.seam import Seam, Target

from tlt_verl import cli, doctor
from tlt_verl.doctor import MISSING, MOVED, NOTE, OK, OUTSIDE, Check
from tlt_verl.spot import nvml

COMMAND = (sys.executable, "-c", "import sys; from tlt_verl.cli import main; sys.exit(main())", "doctor")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_report_of_this_machine():
    """The machine that runs the tests is one where a run starts."""
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, "--json"], capture_output=True, text=True, timeout=300)
    elapsed_s = time.perf_counter() - start
    report = json.loads(done.stdout)
    assert (done.returncode, report["starts"]) == (0, True), report["verdict"]
    found = {check["name"]: check["status"] for check in report["checks"]}
    assert {seam.name for seam in all_seams()} < found.keys()
    expected = ("Python", "torch", "verl", "sglang", "transformers", "megatron-core", "mbridge", "TransferQueue", "ray")
    assert {*expected, "nvidia-ml-py", "sgl_kernel", "nvml", "/dev/shm", "verl.plugins"} < found.keys()
    print(f"doctor took {elapsed_s:.1f} s")
    assert elapsed_s < 120  # 30 s on a quiet machine


@pytest.mark.slow
def test_a_real_upstream_that_moved_ends_with_status_1_and_is_named(tmp_path):
    """An sglang of another version, and a package's plugins switched off, in one real run."""
    folder = tmp_path / "sglang-0.5.99.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.99\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert ["sglang", OUTSIDE, "0.5.99; tested >=0.5.17,<0.5.18"] in lines
    assert any(line[:2] == ["verl.plugins", MISSING] and "VERL_USE_EXTERNAL_PLUGINS=none" in line[2] for line in lines)
    assert done.stdout.splitlines()[-1].startswith("A run with rollout.name=tlt would not start here: sglang (OUTSIDE)")


@pytest.mark.parametrize(("arguments", "said"), [(["doktor"], "doctor"), ([], "command"), (["doctor", "-x"], "-x")])
def test_an_unknown_command_or_option_ends_with_status_2_and_says_what_there_is(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (NOTE, 0), (MOVED, 1), (OUTSIDE, 1), (MISSING, 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_exit_status_is_whether_a_run_would_start(status, code, as_json, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Check("seams", "a", OK, "x"), Check("seams", "b", status, "y")])
    assert cli.main(["doctor", *["--json"] * as_json]) == code
    printed = capsys.readouterr().out
    assert (json.loads(printed)["starts"] if as_json else "would start here" in printed) is (code == 0)


def test_the_table_is_aligned_and_ends_with_the_verdict():
    made = [("versions", "a", OK), ("versions", "longer", OUTSIDE), ("seams", "b", MOVED)]
    checks = [Check(*parts, str(number)) for number, parts in enumerate(made, start=1)]
    assert doctor.as_table(checks).splitlines() == [
        "versions",
        "  a       OK       1",
        "  longer  OUTSIDE  2",
        "",
        "seams",
        "  b       MOVED    3",
        "",
        "A run with rollout.name=tlt would not start here: longer (OUTSIDE), b (MOVED).",
    ]


def test_what_upstream_prints_stays_out_of_the_report(monkeypatch, capsys):
    """A line on stdout before the object would break whoever parses it."""

    def noisy():
        print("Platform override")
        print("warning", file=sys.stderr)
        return [Check("seams", "a", OK, "x")]

    monkeypatch.setattr(doctor, "examine", noisy)
    cli.main(["doctor", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["starts"] and captured.err == ""


# --- versions and seams -----------------------------------------------------------------------------------------------


def seam(name: str = "made.seam", package: str = "verl", versions: str = ">=1,<2", path: str = "json:loads", **kwargs):
    targets = (Target(path=path),)
    return Seam(name=name, package=package, versions=versions, targets=targets, why="So.", install=print, **kwargs)


@pytest.fixture
def installed(monkeypatch):
    """`installed(package=version, ...)`: only these are."""

    def install(**versions: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


@pytest.mark.parametrize(
    ("version", "cpu_only", "cuda", "status"),
    [
        ("1.5", False, True, OK),
        ("2.0", False, True, OUTSIDE),
        (None, False, True, MISSING),
        ("2.0", True, False, OUTSIDE),
        (None, True, False, MISSING),
        ("2.0", True, True, NOTE),
        (None, True, True, NOTE),
    ],
)
def test_a_version_is_refused_where_a_needed_seam_reaches_into_the_package(installed, version, cpu_only, cuda, status):
    installed(**({"verl": version} if version else {}))
    check = doctor._seamed_package("verl", [seam(cpu_only=cpu_only)], cuda)
    assert check.status == status and ">=1,<2" in check.detail and (version or "not installed") in check.detail


def test_another_version_of_a_package_without_seams_is_a_note(installed):
    installed(torch="2.12.0+cpu", transformers="5.10.4", ray="2.60.0", **{"nvidia-ml-py": "13.1"})
    checks = {check.name: check for check in doctor._versions(cuda=False)}
    assert (checks["torch"].status, checks["ray"].status) == (NOTE, OK)
    assert "2.12.0+cpu, not tested; tested ==2.13.*" in checks["torch"].detail
    assert checks["TransferQueue"].status == MISSING


def test_moved_and_unneeded_seams(installed, monkeypatch):
    installed(verl="1.5")
    made = [
        seam("a.fits"),
        seam("b.moved", path="json:no_such_name"),
        seam("c.cpu", path="json:no_such_name", cpu_only=True),
        seam("d.absent", package="not-here"),
    ]
    monkeypatch.setattr("tlt_verl.patches.all_seams", lambda: made)
    on_cuda = {check.name: check for check in doctor._seams(cuda=True)}
    assert [check.status for check in on_cuda.values()] == [OK, MOVED, NOTE, MISSING]
    assert "json:no_such_name is gone" in on_cuda["b.moved"].detail
    assert {check.name: check.status for check in doctor._seams(cuda=False)}["c.cpu"] == MOVED


@pytest.mark.parametrize(
    ("attributes", "cuda", "status", "said"),
    [
        ({"IS_STANDIN": True, "__version__": "0+standin"}, False, OK, "stand-in"),
        ({"IS_STANDIN": True, "__version__": "0+standin"}, True, MISSING, "pip uninstall tlt-cpu-standins"),
        ({"__version__": "0.4.5"}, True, OK, "native, 0.4.5"),
        ({"__version__": "0.4.5"}, False, OK, "native, 0.4.5"),
        (None, True, MISSING, "pip install sglang-kernel"),
        (None, False, MISSING, "patches/cpu_standins"),
    ],
)
def test_sgl_kernel_native_stand_in_or_missing(attributes, cuda, status, said, monkeypatch):
    module = None if attributes is None else SimpleNamespace(**attributes)
    monkeypatch.setitem(sys.modules, "sgl_kernel", module)
    check = doctor._sgl_kernel(cuda)
    assert check.status == status and said in check.detail


# --- plugins ----------------------------------------------------------------------------------------------------------

GROUP, VALUE = "verl.plugins", "tlt_verl.on_verl_import"


@pytest.mark.parametrize(
    ("found", "allowed", "status", "said"),
    [
        ([("tlt", VALUE), ("other", "x")], None, OK, VALUE),
        ([("other", "x")], None, MISSING, "tlt is not registered"),
        ([("tlt", VALUE), ("tlt", VALUE)], None, MISSING, "takes tlt_verl.on_verl_import once"),
        ([("tlt", "old.path")], None, MISSING, "registered as old.path"),
        ([("tlt", VALUE)], "auto", OK, VALUE),
        ([("tlt", VALUE)], "other, tlt", OK, VALUE),
        ([("tlt", VALUE)], "other", MISSING, "VERL_USE_EXTERNAL_PLUGINS=other"),
        ([("tlt", VALUE)], "none", MISSING, "VERL_USE_EXTERNAL_PLUGINS=none"),
    ],
)
def test_the_entry_point_is_there_once_and_not_switched_off(found, allowed, status, said, monkeypatch):
    entries = [SimpleNamespace(name=name, value=value) for name, value in found]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == GROUP else [])
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", allowed)
    check = doctor._entry_point(GROUP, *doctor._ENTRY_POINTS[GROUP])
    assert check.status == status and said in check.detail


def test_a_plugin_that_failed_says_what_a_run_would_meet():
    def fails():
        raise RuntimeError("seam a.b does not fit")

    check = doctor._works("verl plugin", "fine", fails)
    assert (check.status, check.detail) == (MISSING, "RuntimeError: seam a.b does not fit")


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "status"), [({"amx_bf16", "avx2"}, OK), ({"avx512_bf16"}, OK), ({"avx2"}, NOTE)])
def test_bfloat16_without_hardware_is_a_note(flags, status):
    assert doctor._bf16(frozenset(flags)).status == status


def test_shared_memory_that_is_small_is_a_note_and_one_that_cannot_be_written_a_failure(tmp_path, monkeypatch):
    (absent,) = doctor._shared_memory(tmp_path / "absent")
    assert absent.status == MISSING and str(tmp_path / "absent") in absent.name and "mount" in absent.detail
    for free_gb, status in ((0.06, NOTE), (8, OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free_gb: (2**36, 0, int(free * 2**30)))
        (check,) = doctor._shared_memory(tmp_path)
        assert check.status == status and ("--shm-size" in check.detail) is (status == NOTE)


def test_shared_memory_that_is_full_is_a_failure(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", full)
    (check,) = doctor._shared_memory(tmp_path)
    assert check.status == MISSING and "No space left" in check.detail


class NVMLError(Exception):
    """As in pynvml: every error of the library is a class of its own."""


def fake_pynvml(monkeypatch, failing: str | None, error: str) -> list[str]:
    """A pynvml with two devices, one of whose functions raises; returns the list of the calls."""
    calls: list[str] = []
    raised = type(error, (NVMLError,), {})("its words")

    def function(name, value=None):
        def call(*_):
            calls.append(name)
            if name == failing:
                raise raised
            return value

        return call

    module = ModuleType("pynvml")
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": b"580.1",
        "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": "NVIDIA H100",
    }
    for name, value in answers.items():
        setattr(module, name, function(name, value))
    module.NVMLError = NVMLError
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


def test_nvml_reports_driver_and_devices(monkeypatch):
    calls = fake_pynvml(monkeypatch, None, "NVMLError_Unknown")
    assert nvml.report() == nvml.NvmlReport(driver="580.1", names=("NVIDIA H100", "NVIDIA H100"))
    assert calls[-1] == "nvmlShutdown"
    (check,) = doctor._nvml(cuda=True)
    assert (check.status, check.detail) == (OK, "driver 580.1, 2 devices: NVIDIA H100, NVIDIA H100")


@pytest.mark.parametrize("error", ["NVMLError_LibraryNotFound", "NVMLError_NoPermission", "NVMLError_Unknown"])
@pytest.mark.parametrize("failing", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName"])
def test_every_nvml_error_is_named_and_stops_nothing(error, failing, monkeypatch):
    calls = fake_pynvml(monkeypatch, failing, error)
    report = nvml.report()
    assert report.error.startswith(f"{error} (its words)")
    assert (calls[-1] == "nvmlShutdown") is (failing != "nvmlInit")  # what was opened is closed
    assert [check.status for check in (*doctor._nvml(cuda=True), *doctor._nvml(cuda=False))] == [NOTE, NOTE]


def test_known_nvml_errors_say_what_they_mean():
    import pynvml

    for name in nvml._CURES:
        assert issubclass(getattr(pynvml, name), pynvml.NVMLError), name
        assert nvml._CURES[name] in nvml.named(getattr(pynvml, name)())


def test_without_pynvml_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in nvml.report().error
