"""`tlt-verl doctor`: whether a run with rollout.name=tlt would start on this machine, and if not, why.

It looks: versions, seams, devices, NVML, shared memory, entry points. It starts nothing, loads no model and changes
nothing outside its own process. It knows of a package only the version that it was tested in; what a seam needs, the
seam knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from tlt_verl.patches.seam import Seam

OK = "OK"
NOTE = "NOTE"  # worth knowing; a run starts
MOVED = "MOVED"  # an upstream name that a seam needs is gone or has changed
OUTSIDE = "OUTSIDE"  # a version that a seam was not written for
MISSING = "MISSING"

# The tested versions of packages that no seam reaches into; (CPU device, CUDA device) where they differ. Another one is
# a note. Packages with a seam have their range there, and outside it a run is refused.
_TESTED: dict[str, tuple[str, str]] = {
    "torch": ("==2.13.*", "==2.11.*"),
    "transformers": ("==5.10.*", "==5.10.*"),
    "ray": ("==2.60.*", "==2.60.*"),
    "TransferQueue": ("==0.1.11", "==0.1.11"),
    "nvidia-ml-py": (">=12", ">=12"),
}
_TESTED_PYTHON = "==3.11.*"
_ENTRY_POINTS = {
    "verl.plugins": ("tlt_verl.on_verl_import", "VERL_USE_EXTERNAL_PLUGINS", "auto"),
    "sglang.srt.plugins": ("tlt_verl.plugin:sglang_plugin", "SGLANG_PLUGINS", ""),
}
_NAME = "tlt"
_SHM = Path("/dev/shm")
_SHM_WANTED_GB = 1.0  # a weight sync of a small model; Docker gives 0.06 unless told otherwise


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    section: str
    name: str
    status: str
    detail: str

    @property
    def blocks(self) -> bool:
        """Whether a run would not start because of it."""
        return self.status not in (OK, NOTE)


def main(as_json: bool) -> int:
    """Print the report; 0 when a run with rollout.name=tlt would start, else 1."""
    with _quiet():
        checks = examine()
    print(as_object(checks) if as_json else as_table(checks))
    return int(any(check.blocks for check in checks))


def examine() -> list[Check]:
    """Every check, in the order of the report. Imports verl, sglang, megatron-core and mbridge into this process."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:  # both decide at import what they run on
        os.environ["VERL_PLATFORM"] = "cpu"
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    return [
        *_versions(cuda),
        *_seams(cuda),
        *_plugins(),
        *_devices(cuda),
        *_nvml(cuda),
        *_shared_memory(),
    ]


# --- versions ---------------------------------------------------------------------------------------------------------


def _versions(cuda: bool) -> Iterator[Check]:
    from tlt_verl.patches import all_seams

    yield _tested("Python", platform.python_version(), _TESTED_PYTHON)
    by_package: dict[str, list[Seam]] = {}
    for seam in all_seams():
        by_package.setdefault(seam.package, []).append(seam)
    for package, seams in by_package.items():
        yield _seamed_package(package, seams, cuda)
    for package, tested in _TESTED.items():
        version = _version(package)
        if version is None:
            yield Check("versions", package, MISSING, f"not installed; tested {tested[cuda]}")
        else:
            yield _tested(package, version, tested[cuda])
    yield _sgl_kernel(cuda)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested(name: str, version: str, tested: str) -> Check:
    if SpecifierSet(tested).contains(version, prereleases=True):
        return Check("versions", name, OK, f"{version}; tested {tested}")
    return Check("versions", name, NOTE, f"{version}, not tested; tested {tested}")


def _seamed_package(package: str, seams: list[Seam], cuda: bool) -> Check:
    """A package that seams reach into: outside the range of a seam that is needed here, a run is refused."""
    (ranges, _), *_ = Counter(seam.versions for seam in seams).most_common()
    version = _version(package)
    needed = any(not seam.cpu_only for seam in seams) or not cuda
    if version is None:
        return Check("versions", package, MISSING if needed else NOTE, f"not installed; tested {ranges}")
    if any(seam.version_problem() for seam in seams):
        return Check("versions", package, OUTSIDE if needed else NOTE, f"{version}; tested {ranges}")
    return Check("versions", package, OK, f"{version}; tested {ranges}")


def _sgl_kernel(cuda: bool) -> Check:
    """SGLang's operators: native, or on a CPU the stand-in of patches/cpu_standins."""
    try:
        import sgl_kernel
    except Exception as error:  # a native library that does not load raises what it likes
        cure = "pip install sglang-kernel" if cuda else "pip install ./patches/cpu_standins"
        return Check("versions", "sgl_kernel", MISSING, f"{type(error).__name__}: {error}; {cure}")
    version = getattr(sgl_kernel, "__version__", "of unknown version")
    if not getattr(sgl_kernel, "IS_STANDIN", False):
        return Check("versions", "sgl_kernel", OK, f"native, {version}")
    if cuda:
        cure = "pip uninstall tlt-cpu-standins, then pip install --force-reinstall sglang-kernel"
        return Check("versions", "sgl_kernel", MISSING, f"a CPU stand-in shadows the native one; {cure}")
    return Check("versions", "sgl_kernel", OK, f"stand-in, {version}")


# --- seams ------------------------------------------------------------------------------------------------------------


def _seams(cuda: bool) -> Iterator[Check]:
    """Each seam's targets. A version outside the range is said once, with the versions."""
    from tlt_verl.patches import all_seams

    with contextlib.suppress(Exception):  # the entry points load with it; a seam's targets say what is wrong with it
        import verl  # noqa: F401
    for seam in all_seams():
        unneeded = cuda and seam.cpu_only
        if unneeded:
            yield Check("seams", seam.name, NOTE, "only for the CPU device, not needed here")
        elif _version(seam.package) is None:
            yield Check("seams", seam.name, MISSING, f"{seam.package} is not installed")
        elif problems := [problem for target in seam.targets if (problem := target.problem())]:
            yield Check("seams", seam.name, MOVED, "; ".join(problems))
        else:
            yield Check("seams", seam.name, OK, seam.why)


# --- plugins ----------------------------------------------------------------------------------------------------------


def _plugins() -> Iterator[Check]:
    """Registered exactly once, not switched off, and installed in this process without an error."""
    for group, (value, variable, all_of_them) in _ENTRY_POINTS.items():
        yield _entry_point(group, value, variable, all_of_them)
    yield _works("verl plugin", "the rollout backend tlt is registered", _verl_took_it)
    yield _works("sglang plugin", "the algorithm TLT is registered and every hook is applied", _sglang_took_it)


def _entry_point(group: str, value: str, variable: str, all_of_them: str) -> Check:
    found = [entry.value for entry in importlib.metadata.entry_points(group=group) if entry.name == _NAME]
    allowed = os.environ.get(variable, all_of_them).strip()
    if not found:
        return Check("plugins", group, MISSING, "tlt is not registered; pip install tlt-verl")
    if found != [value]:
        cure = f"takes {value} once; pip uninstall tlt-verl until it is gone, then install it again"
        return Check("plugins", group, MISSING, f"tlt is registered as {', '.join(found)}; {cure}")
    if allowed.lower() != all_of_them and _NAME not in [name.strip() for name in allowed.split(",")]:
        return Check("plugins", group, MISSING, f"{variable}={allowed} keeps tlt from being loaded; add tlt to it")
    return Check("plugins", group, OK, f"tlt = {value}")


def _works(name: str, success: str, attempt: Callable[[], None]) -> Check:
    try:
        attempt()
    except Exception as error:  # whatever it is, it is what a run would meet
        return Check("plugins", name, MISSING, f"{type(error).__name__}: {error}")
    return Check("plugins", name, OK, success)


def _verl_took_it() -> None:
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from tlt_verl.plugin import raise_failures

    raise_failures()
    RolloutReplicaRegistry.get(_NAME)
    get_rollout_class(_NAME, "async")
    raise_failures()


def _sglang_took_it() -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from tlt_verl.patches import hooks

    load_plugins()
    SpeculativeAlgorithm.from_string("TLT")
    hooks.assert_applied()


# --- the machine ------------------------------------------------------------------------------------------------------


def _devices(cuda: bool) -> Iterator[Check]:
    import torch

    if cuda:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, capability {device.major}.{device.minor}"
            yield Check("devices", f"cuda:{index}", OK, detail)
        return
    cores = len(os.sched_getaffinity(0))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Check("devices", "cpu", OK, f"{cores} cores, {memory_gb:.0f} GiB; start runs with VERL_PLATFORM=cpu")
    yield _bf16(_cpu_flags())


def _cpu_flags() -> frozenset[str]:
    """What the first processor of /proc/cpuinfo can do, in Linux's words; empty where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def _bf16(flags: frozenset[str]) -> Check:
    kinds = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    if kinds:
        return Check("devices", "bfloat16", OK, f"in hardware ({', '.join(kinds)})")
    return Check("devices", "bfloat16", NOTE, "emulated on this processor: float32 is faster on both sides")


def _nvml(cuda: bool) -> Iterator[Check]:
    from tlt_verl.spot import nvml

    found = nvml.report()
    devices = f"driver {found.driver}, {len(found.names)} devices: {', '.join(found.names) or 'none'}"
    if found.error is None:
        yield Check("nvml", "nvml", OK, devices)
    elif cuda:
        yield Check("nvml", "nvml", NOTE, f"{found.error}; {devices}. Idle devices cannot be told from busy ones")
    else:
        yield Check("nvml", "nvml", NOTE, f"{found.error}; not needed on the CPU device")


def _shared_memory(folder: Path = _SHM) -> Iterator[Check]:
    """Ray's object store and the weight sync go through it."""
    try:
        size, _, free = shutil.disk_usage(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        yield Check("shared memory", str(folder), MISSING, f"cannot be written: {error}; mount a tmpfs there")
        return
    detail = f"{size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free, writable"
    if free / 2**30 < _SHM_WANTED_GB:
        cure = f"less than {_SHM_WANTED_GB:.0f} GiB is little for weights and Ray; docker run --shm-size=8g"
        yield Check("shared memory", str(folder), NOTE, f"{detail}; {cure}")
    else:
        yield Check("shared memory", str(folder), OK, detail)


# --- the report -------------------------------------------------------------------------------------------------------


def verdict(checks: list[Check]) -> str:
    """One sentence."""
    blocking = [f"{check.name} ({check.status})" for check in checks if check.blocks]
    if not blocking:
        return "A run with rollout.name=tlt would start here."
    return f"A run with rollout.name=tlt would not start here: {', '.join(blocking)}."


def as_table(checks: list[Check]) -> str:
    """Aligned columns, a section a block, the verdict as the last line."""
    name_width = max(len(check.name) for check in checks)
    status_width = max(len(check.status) for check in checks)
    lines, section = [], None
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section]
        lines.append(f"  {check.name:<{name_width}}  {check.status:<{status_width}}  {check.detail}")
    return "\n".join([*lines[1:], "", verdict(checks)])


def as_object(checks: list[Check]) -> str:
    """One JSON object: `starts`, `verdict`, and `checks`, each with section, name, status and detail."""
    starts = not any(check.blocks for check in checks)
    entries = [dataclasses.asdict(check) for check in checks]
    return json.dumps({"starts": starts, "verdict": verdict(checks), "checks": entries}, indent=2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what upstream packages print while they are imported out of the report."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
