"""Hooks through SGLang's own `HookRegistry`, with what it lacks: proof that each hook took.

SGLang logs a hook that could not be applied and goes on. `assert_applied` is called where the algorithm TLT is about to
be used, and raises instead. Knows SGLang's plugin interface; knows no particular hook.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import SeamError

_registered: dict[str, str] = {}  # target -> seam


def around(seam: str, target: str, hook: Callable[..., Any]) -> None:
    """Register `hook(original, *args, **kwargs)` around `module:attribute.path`, once a process."""
    if target in _registered:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target.replace(":", "."), hook, HookType.AROUND)
    _registered[target] = seam


def assert_applied() -> None:
    """Raise `SeamError` unless every registered hook stands in its target."""
    for target, seam in _registered.items():
        module, _, attributes = target.partition(":")
        found = functools.reduce(getattr, attributes.split("."), importlib.import_module(module))
        if not hasattr(found, "__wrapped__"):
            raise SeamError(
                f"seam {seam} was registered but {target} is not hooked: SGLang's plugin loader did not apply it. "
                "Run `tlt-verl doctor`; its log line 'Failed to apply hooks' says why."
            )
