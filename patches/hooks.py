"""Hooks through SGLang's own `HookRegistry`, with what it lacks: proof that each hook took.

SGLang logs a hook that could not be applied and goes on. `assert_applied` is called where the algorithm TLT is about to
be used, and raises instead. Knows SGLang's plugin interface; knows no particular hook.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import SeamError

_registered: dict[str, tuple[str, Callable[..., Any]]] = {}  # target -> seam, hook


def around(seam: str, target: str, hook: Callable[..., Any]) -> None:
    """Register `hook(original, *args, **kwargs)` around `module:attribute.path`, once a process."""
    if target in _registered:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target.replace(":", "."), hook, HookType.AROUND)
    _registered[target] = seam, hook


def assert_applied() -> None:
    """Raise `SeamError` unless every registered hook stands in its target."""
    for target, (seam, hook) in _registered.items():
        module, _, attributes = target.partition(":")
        names: list[Any] = [importlib.import_module(module), *attributes.split(".")]
        if not _stands(hook, functools.reduce(lambda owner, name: getattr(owner, name, None), names)):
            raise SeamError(
                f"seam {seam} was registered but {target} is not hooked: SGLang's plugin loader did not apply it. "
                "Run `tlt-verl doctor`; its log line 'Failed to apply hooks' says why."
            )


def _stands(hook: Callable[..., Any], found: object) -> bool:
    """Whether a wrapper of `found` calls the hook: other plugins' hooks, and upstream's decorators, wrap too."""
    while found is not None:
        found = getattr(found, "__func__", found)  # of a class method
        if inspect.isfunction(found) and any(v is hook for v in inspect.getclosurevars(found).nonlocals.values()):
            return True
        found = getattr(found, "__wrapped__", None)
    return False
