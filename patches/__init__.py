"""Every seam into verl, sglang, megatron-core and mbridge: one file a seam.

A patch file defines `SEAM`, a :class:`tlt_verl.patches.seam.Seam`. It says which versions it was written for, which
upstream names it relies on, and how it is installed. A patch knows nothing of the rest of this project: what it puts in
place is handed to it by `tlt_verl.plugin`. `all_seams` is what `tlt-verl doctor` and the contract tests walk.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlt_verl.patches.seam import Seam

_PREFIXES = ("verl_", "sglang_", "megatron_", "mbridge_")


def all_seams() -> list[Seam]:
    """Every seam of this package, ordered by file name. Imports the patch files, not their targets."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(_PREFIXES))
    return [importlib.import_module(f"{__name__}.{name}").SEAM for name in names]


def required_seams(on_cpu: bool) -> list[Seam]:
    """The seams that a run needs: all of them on the CPU device, elsewhere those that are not for it alone."""
    return [seam for seam in all_seams() if on_cpu or not seam.cpu_only]


def check_versions(on_cpu: bool) -> None:
    """Raise `SeamError` unless every package that a required seam reaches into is installed in its tested version.

    Compares versions only: no upstream module is imported.
    """
    from tlt_verl.patches.seam import SeamError

    problems = sorted({problem for seam in required_seams(on_cpu) if (problem := seam.version_problem())})
    if problems:
        raise SeamError(
            f"{'; '.join(problems)}. Install a tested version (requirements/); `tlt-verl doctor` compares all of them."
        )
