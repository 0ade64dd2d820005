"""The contract with upstream, seam by seam: every one fits what is installed, and notices when it no longer does.

One process, in which verl is imported with the plugin, as in a run; so the seams that are installed at import are, and
the others are not, and both must look the same. What these would catch: an upstream release that renames, moves or
rewrites what a patch leans on; a patch that does not declare a name well enough for its seam to notice.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from tlt_verl.patches import all_seams, check_versions, required_seams
from tlt_verl.patches.seam import Seam, SeamError, Target

SEAMS = [pytest.param(seam, id=seam.name) for seam in all_seams()]
pytestmark = pytest.mark.slow  # importing all of upstream takes its time, once
PACKAGES = ("mbridge", "megatron-core", "sglang", "verl")


@pytest.fixture(scope="module", autouse=True)
def upstream() -> None:
    """Import what the seams are about, verl first: its import installs the plugin."""
    import verl  # noqa: F401

    for seam in all_seams():
        seam.problems()


# --- it fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_fits_the_installed_upstream(seam: Seam):
    assert seam.problems() == []
    seam.check()


def test_seams_fit_as_well_after_they_are_installed():
    """A replacement must wrap what it replaces; otherwise the second process to check reads our own source."""
    import mbridge  # noqa: F401
    from sglang.srt.plugins import load_plugins
    from tlt_verl.patches.seam import is_installed

    load_plugins()
    installed = {seam.name: seam.problems() for seam in all_seams() if is_installed(seam.name)}
    assert {name: [] for name in installed} == installed
    assert {"sglang.verify", "sglang.algorithm", "verl.early_validation", "verl.rollout_replica"} <= installed.keys()


def test_a_seam_is_for_the_cpu_alone_exactly_when_the_cpu_device_installs_it():
    """A seam that every machine needs must not be waved through on a GPU, nor one for CPUs be asked of it."""
    from tlt_verl.patches import megatron_host_device, sglang_cpu_attention, sglang_cpu_draft, sglang_share_cpu_tensors

    from tlt_verl.cpu import install

    direct = (megatron_host_device, sglang_cpu_attention, sglang_cpu_draft, sglang_share_cpu_tensors)
    expected = {seam.name for _, seam, _ in install._AFTER} | {patch.SEAM.name for patch in direct}
    assert {seam.name for seam in all_seams() if seam.cpu_only} == expected
    assert {seam.name for seam in required_seams(on_cpu=False)} == {seam.name for seam in all_seams()} - expected
    assert required_seams(on_cpu=True) == all_seams()


def test_names_are_unique_and_every_seam_says_why():
    names = [seam.name for seam in all_seams()]
    assert len(set(names)) == len(names)
    assert all(seam.why.endswith(".") and seam.targets and seam.package in PACKAGES for seam in all_seams())


# --- upstream changes -------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """Something that upstream may do to a seam: what, how to do it, and the parts of the one problem that names it."""

    what: str
    make: Callable[[pytest.MonkeyPatch, Path], None]
    says: tuple[str, ...]


def changes(seam: Seam) -> Iterator[Change]:
    """Everything that a seam declares, taken away one at a time: targets, parameters, lines, version, package."""
    for target in seam.targets:
        yield Change(f"rename {target.path}", partial(rename, seam, target), (target.path, "is gone"))
        for parameter in target.parameters:
            says = (target.path, f"no longer takes {parameter}")
            yield Change(f"rename {parameter} of {target.path}", partial(rename_parameter, target, parameter), says)
        for text in target.source_contains:
            says = (target.path, f"no longer contains {text!r}")
            yield Change(f"rewrite {text!r} in {target.path}", partial(rewrite, seam, target, text), says)
    outside = (f"{seam.package} 0.0.1", f"outside the tested range {seam.versions}")
    yield Change("another version", partial(claim_version, seam.package, "0.0.1"), outside)
    absent = (f"{seam.package} is not installed", seam.versions)
    yield Change("no package", partial(claim_version, seam.package, None), absent)


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_notices_every_change_to_what_it_declares(seam: Seam, tmp_path: Path):
    missed = []
    for number, change in enumerate(changes(seam)):
        with pytest.MonkeyPatch.context() as patch:
            change.make(patch, tmp_path / str(number))
            complaint = unnoticed(seam, change.says)
        if complaint:
            missed.append(f"{change.what}: {complaint}")
    assert not missed, "\n".join(missed)
    assert seam.problems() == [], "a change was not taken back"


def test_every_declared_name_is_changed_once():
    """What the test above loops over: it must not be empty, nor leave out a kind."""
    found = [change.what for seam in all_seams() for change in changes(seam)]
    targets = [target for seam in all_seams() for target in seam.targets]
    declared = sum(1 + len(target.parameters) + len(target.source_contains) for target in targets)
    assert len(found) == declared + 2 * len(all_seams())
    print(f"\n{len(found)} changes to {len(all_seams())} seams")
    for kind in ("rename ", " of ", "rewrite ", "another version", "no package"):
        assert sum(kind in what for what in found) >= 9, kind


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_is_refused_for_a_version_only_where_the_package_is_needed(package: str, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", fake_version(package, None))
    with pytest.raises(SeamError, match=f"{package} is not installed"):
        check_versions(on_cpu=True)
    if package in ("mbridge", "megatron-core"):  # a GPU run with FSDP has neither
        check_versions(on_cpu=False)
    else:
        with pytest.raises(SeamError, match=f"{package} is not installed"):
            check_versions(on_cpu=False)


# --- helpers ----------------------------------------------------------------------------------------------------------


def unnoticed(seam: Seam, parts: tuple[str, ...]) -> str:
    """Why a change was not noticed as it should be: with one problem, which has these parts, and an error that names
    the seam, the target and the tested versions too. Empty where it was.
    """
    problems = seam.problems()
    if len(problems) != 1 or not all(part in problems[0] for part in parts):
        return f"the problems are {problems}"
    try:
        seam.check()
    except SeamError as error:
        wanted = (seam.name, *parts, f"{seam.package} {seam.versions}", "tlt-verl doctor")
        return "" if all(part in str(error) for part in wanted) else f"the error is {error}"
    return "check() passed"


def rename(seam: Seam, target: Target, patch: pytest.MonkeyPatch, folder: Path) -> None:
    if is_file(target):
        mirror(seam, folder, patch)
        file_of(target, folder).unlink()
    else:
        remove(target, patch)


def rename_parameter(target: Target, parameter: str, patch: pytest.MonkeyPatch, folder: Path) -> None:
    owner, name = owner_of(target)
    patch.setattr(owner, name, without_parameter(getattr(owner, name), parameter))


def rewrite(seam: Seam, target: Target, text: str, patch: pytest.MonkeyPatch, folder: Path) -> None:
    if is_file(target):
        mirror(seam, folder, patch)
        file = file_of(target, folder)
        source = file.read_text().replace(text, "rewritten")
        file.unlink()
        file.write_text(source)
        return
    owner, name = owner_of(target)
    rewritten, getsource = inspect.unwrap(getattr(owner, name)), inspect.getsource
    patch.setattr(
        inspect,
        "getsource",
        lambda asked: getsource(asked).replace(text, "rewritten") if asked == rewritten else getsource(asked),
    )


def claim_version(package: str, version: str | None, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(importlib.metadata, "version", fake_version(package, version))


def owner_of(target: Target) -> tuple[Any, str]:
    """The module or class that has the target, and the target's name in it."""
    module, _, attributes = target.path.partition(":")
    *owners, name = attributes.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def remove(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the target's name away from the module or class that has it."""
    owner, name = owner_of(target)
    if isinstance(owner, enum.EnumMeta) and name in owner.__members__:  # an enum does not let a member go
        others = SimpleNamespace(**{other: getattr(owner, other) for other in vars(owner) if other != name})
        monkeypatch.setattr(importlib.import_module(owner.__module__), owner.__name__, others)
    else:
        monkeypatch.delattr(owner, name)


def without_parameter(function: Callable[..., Any], parameter: str) -> Callable[..., Any]:
    """A function of the same signature, where the parameter has become one of `**kwargs`."""
    signature = inspect.signature(inspect.unwrap(function))
    kept = [p for p in signature.parameters.values() if p.name != parameter and p.kind is not p.VAR_KEYWORD]

    def changed(*args: Any, **kwargs: Any) -> None:
        """Never called."""

    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    changed.__signature__ = signature.replace(parameters=[*kept, rest])  # type: ignore[attr-defined]
    return changed


def is_file(target: Target) -> bool:
    """Whether the target is a source file that is checked without being imported."""
    return ":" not in target.path


def file_of(target: Target, folder: Path) -> Path:
    return folder.joinpath(*target.path.split(".")).with_suffix(".py")


def mirror(seam: Seam, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the seam find its packages in `folder`, where each of its files is a link to the installed one."""
    find_spec = importlib.util.find_spec
    for target in filter(is_file, seam.targets):
        link = file_of(target, folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        installed = [Path(root) for root in find_spec(target.path.split(".")[0]).submodule_search_locations]
        (original,) = [f for root in installed if (f := file_of(target, root.parent)).is_file()]
        link.symlink_to(original)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(folder / name)])
    )


def fake_version(package: str, version: str | None) -> Callable[[str], str]:
    """`importlib.metadata.version`, with another answer for one package; None: it is not installed."""
    original = importlib.metadata.version

    def answer(name: str) -> str:
        if name != package:
            return original(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return answer
