"""The framework: what a seam notices, what its error says, and that nothing is half-installed.

The upstream package is a made one, so that each way of moving can be played; the real ones are in test_contracts.py.
"""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType

import pytest
from tlt_verl.patches import seam as framework
from tlt_verl.patches.seam import Seam, SeamError, Target, in_place_of, install, is_installed


class Base:
    def inherited(self, weights):
        return weights

    def overridden(self):
        """The base's."""


class Thing(Base):
    def overridden(self):
        return "the upstream line"

    @classmethod
    def made(cls, name, *, loader=None):
        return name

    @property
    def size(self):
        return 1


def function(a, b=2, **kwargs):
    return a + b  # the upstream line


@pytest.fixture(autouse=True)
def upstream(monkeypatch):
    """A package `upstream` 1.2.3, with a module of the same name; and no seam installed yet."""
    module = ModuleType("upstream")
    module.Thing, module.function, module.number = Thing, function, 3
    monkeypatch.setitem(sys.modules, "upstream", module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3" if name == "upstream" else real(name))
    monkeypatch.setattr(framework, "_installed", set())
    return module


def seam(*targets: Target, install=lambda *parts: None, versions: str = ">=1.2,<1.3") -> Seam:
    return Seam(
        name="upstream.what", package="upstream", versions=versions, targets=targets, why="It is so.", install=install
    )


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        Target(path="upstream"),
        Target(path="upstream:number"),
        Target(path="upstream:function", parameters=("b", "a"), source_contains=("upstream line",)),
        Target(path="upstream:Thing.made", parameters=("name", "loader")),
        Target(path="upstream:Thing.size"),
        Target(path="upstream:Thing.overridden", source_contains=('"the upstream line"',)),
    ],
    ids=lambda target: target.path,
)
def test_a_target_that_is_there_has_no_problem(target):
    assert target.problem() is None


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (Target(path="nowhere.at.all:x"), "module nowhere.at.all cannot be imported (ModuleNotFoundError"),
        (Target(path="upstream:gone"), "upstream:gone is gone: 'gone' not found"),
        (Target(path="upstream:Thing.gone.further"), "upstream:Thing.gone.further is gone: 'gone' not found"),
        (Target(path="upstream:Thing.inherited"), "'inherited' is only inherited from Base"),
        (Target(path="upstream:Thing.__init__"), "'__init__' is only inherited from object"),
        (Target(path="upstream:function", parameters=("a", "c")), "upstream:function no longer takes c"),
        (Target(path="upstream:number", parameters=("a",)), "upstream:number is no longer a function"),
        (Target(path="upstream:function", source_contains=("a + b", "a - b")), "no longer contains 'a - b'"),
        (Target(path="upstream:number", source_contains=("3",)), "upstream:number: its source cannot be read"),
    ],
    ids=lambda value: value.path if isinstance(value, Target) else "",
)
def test_a_target_that_moved_says_which_and_how(target, problem):
    assert problem in target.problem()


def test_a_module_that_breaks_while_it_is_imported_is_a_problem_and_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "breaks_at_import.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "OSError: libcuda.so.1" in Target(path="breaks_at_import:x").problem()


def test_a_replacement_is_looked_through(upstream, monkeypatch):
    """Once it is installed, a seam must not read its own source, nor its own parameters."""
    target = Target(path="upstream:function", parameters=("a",), source_contains=("upstream line",))
    monkeypatch.setattr(upstream, "function", lambda *args: None)
    assert target.problem() is not None
    monkeypatch.setattr(upstream, "function", in_place_of(function, lambda a: a * 10))
    assert target.problem() is None
    assert upstream.function(4) == 40


# --- seams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        (">=1.2,<1.3", None),
        ("<1.2.3", "upstream 1.2.3 is outside the tested range <1.2.3"),
        (">=2", "upstream 1.2.3 is outside the tested range >=2"),
    ],
)
def test_the_version_is_compared_with_the_range(versions, problem):
    assert seam(versions=versions).version_problem() == problem


def test_a_release_candidate_inside_the_range_is_inside(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.5rc1")
    assert seam().version_problem() is None


def test_a_package_that_is_not_installed_is_a_problem():
    elsewhere = Seam(name="x.y", package="no-such-package", versions=">=1", targets=(), why="", install=print)
    assert elsewhere.version_problem() == "no-such-package is not installed (tested: >=1)"


def test_the_error_names_every_problem_and_the_tested_versions():
    with pytest.raises(SeamError) as error:
        seam(*(Target(path=path) for path in ("upstream:gone", "upstream:number", "lost:x")), versions=">=2").check()
    text = str(error.value)
    parts = (
        "seam upstream.what",
        "upstream 1.2.3 is outside",
        "upstream:gone",
        "module lost",
        "written for upstream >=2",
    )
    assert all(part in text for part in (*parts, "It is so.", "tlt-verl doctor")), text
    assert "upstream:number" not in text


# --- installing -------------------------------------------------------------------------------------------------------


def test_a_seam_is_installed_once_with_the_parts_it_is_given():
    calls = []
    one = seam(install=lambda *parts: calls.append(parts))
    assert not is_installed(one.name)
    install(one, 1, "b")
    install(one, 2, "c")
    assert calls == [(1, "b")] and is_installed(one.name)


def test_nothing_is_changed_when_a_later_target_does_not_fit(upstream):
    broken = seam(
        Target(path="upstream:function"), Target(path="upstream:gone"), install=lambda: setattr(upstream, "number", 4)
    )
    with pytest.raises(SeamError, match="upstream:gone"):
        install(broken)
    assert upstream.number == 3 and not is_installed(broken.name)


def test_an_installation_that_raises_does_not_count():
    def fails():
        raise OSError("once")

    with pytest.raises(OSError, match="once"):
        install(seam(install=fails))
    assert not is_installed("upstream.what")
