"""What a seam into an upstream package is, how it is checked, and how it is installed.

Knows nothing of any particular upstream package. A seam that does not fit raises `SeamError`: it names the seam, what
was looked for, what was found, and the versions that the patch was written for. Nothing is ever half-installed: all
targets are checked before `install` runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet


class SeamError(RuntimeError):
    """An upstream package does not have what a patch was written for."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One upstream name that a seam relies on.

    Args:
        path: `module:attribute.path`, for instance `sglang.srt.speculative.eagle_utils:eagle_sample`. An attribute of a
            class is looked for in the class itself: what it inherits is not what was meant.
        parameters: names that the callable must have, in any order; `**kwargs` does not stand for one. Empty means that
            only existence is checked.
        source_contains: text that must stand in the source of the target; for a patch that depends on a line inside.
    """

    path: str
    parameters: tuple[str, ...] = ()
    source_contains: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Why the target does not fit, or None when it does."""
        module_name, _, attributes = self.path.partition(":")
        try:
            found = importlib.import_module(module_name)
        except Exception as error:  # whatever an upstream module raises, the answer is the same
            return f"module {module_name} cannot be imported ({type(error).__name__}: {error})"
        for name in attributes.split(".") if attributes else ():
            if not hasattr(found, name):
                return f"{self.path} is gone: {name!r} not found"
            if (base := _inherited_from(found, name)) is not None:
                return f"{self.path} is gone: {name!r} is only inherited from {base.__name__}"
            found = getattr(found, name)
        return self._parameter_problem(found) or self._source_problem(found)

    def _parameter_problem(self, found: object) -> str | None:
        if not self.parameters:
            return None
        try:
            accepted = inspect.signature(inspect.unwrap(found)).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return f"{self.path} is no longer a function"
        missing = [name for name in self.parameters if name not in accepted]
        return f"{self.path} no longer takes {', '.join(missing)}" if missing else None

    def _source_problem(self, found: object) -> str | None:
        if not self.source_contains:
            return None
        try:
            source = inspect.getsource(inspect.unwrap(found))  # type: ignore[arg-type]
        except (OSError, TypeError) as error:
            return f"{self.path}: its source cannot be read ({error})"
        missing = [text for text in self.source_contains if text not in source]
        return f"{self.path} no longer contains {missing[0]!r}" if missing else None


def _inherited_from(found: object, name: str) -> type | None:
    """The base class that an attribute of a class comes from, or None when it is the class's own."""
    if not isinstance(found, type) or name in vars(found):
        return None
    return next((base for base in found.__mro__ if name in vars(base)), None)


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One place where this project reaches into an upstream package.

    Args:
        name: short and unique, `package.what`, for instance `sglang.eagle_sample`.
        package: the distribution whose version decides, for instance `sglang`.
        versions: a PEP 440 specifier of the versions that the patch was written for and tested with.
        targets: every upstream name that the patch relies on.
        why: one sentence; `tlt-verl doctor` prints it.
        install: applies the patch; takes the parts of ours that it puts in place. Called once a process, after `check`.
            What it replaces it wraps (`functools.wraps`, `in_place_of`), so that the check sees what upstream wrote and
            gives the same answer before and after.
        cpu_only: it is installed on the CPU device and nowhere else; another machine does not need its package.
    """

    name: str
    package: str
    versions: str
    targets: tuple[Target, ...]
    why: str
    install: Callable[..., None] = field(repr=False)
    cpu_only: bool = False

    def version_problem(self) -> str | None:
        """Why the installed version does not fit, or None when it does."""
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed (tested: {self.versions})"
        if SpecifierSet(self.versions).contains(version, prereleases=True):
            return None
        return f"{self.package} {version} is outside the tested range {self.versions}"

    def problems(self) -> list[str]:
        """Everything that does not fit: the package's version, then each target."""
        version = self.version_problem()
        return [version] * (version is not None) + [p for target in self.targets if (p := target.problem())]  # type: ignore[list-item]

    def check(self) -> None:
        """Raise `SeamError` unless the package's version and every target fit."""
        if problems := self.problems():
            raise SeamError(
                f"seam {self.name} does not fit: {'; '.join(problems)}. It was written for {self.package} "
                f"{self.versions} ({self.why}) Install that version, or run `tlt-verl doctor` to see every seam."
            )


def in_place_of(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what `ours` does and is marked as standing in place of `original`."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return replaced


_installed: set[str] = set()


def install(seam: Seam, *parts: Any) -> None:
    """Check a seam and install it with the parts of ours that it puts in place, once a process.

    Raises:
        SeamError: a target or a version does not fit; nothing was changed.
    """
    if seam.name in _installed:
        return
    seam.check()
    seam.install(*parts)
    _installed.add(seam.name)


def is_installed(name: str) -> bool:
    """Whether the seam of this name was installed in this process."""
    return name in _installed
