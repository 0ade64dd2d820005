"""The first thing that verl's entry points do with a configuration, before Ray is started.

verl has no hook for a plugin to look at the configuration; every entry point calls `auto_set_device(config)` first.
Installed in every version of verl that still has the function: it is what refuses the versions that are not tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import Seam, Target


def _install(check: Callable[[Any], None]) -> None:
    """Call `check(config)` before the device is set."""
    from verl.utils import device

    original = device.auto_set_device

    @functools.wraps(original)
    def auto_set_device(config: Any) -> None:
        check(config)
        original(config)

    device.auto_set_device = auto_set_device


SEAM = Seam(
    name="verl.early_validation",
    package="verl",
    versions=">=0.1",
    targets=(Target(path="verl.utils.device:auto_set_device", parameters=("config",)),),
    why="Mistakes in the configuration are reported before anything is started.",
    install=_install,
)
