"""Hooks through SGLang's registry: that they take, once, and that one that did not take is an error.

SGLang logs a hook that it cannot apply and goes on; the engine would then run stock verification.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from tlt_verl.patches import hooks
from tlt_verl.patches.seam import SeamError


class Holder:
    def method(self, x):
        return x + 1


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """A module `hooked` with a function and a class, and a registry that holds nothing but what a test registers."""
    module = ModuleType("hooked")
    module.function, module.Holder = (lambda x: x * 2), type("Holder", (Holder,), dict(vars(Holder)))
    monkeypatch.setitem(sys.modules, "hooked", module)
    monkeypatch.setattr(hooks, "_registered", {})
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    return module


def test_a_hook_stands_around_functions_and_methods(module):
    hooks.around("a.seam", "hooked:function", lambda original, x: original(x) + 100)
    hooks.around("a.seam", "hooked:Holder.method", lambda original, holder, x: original(holder, x) * 10)
    HookRegistry.apply_hooks()
    hooks.assert_applied()
    assert module.function(1) == 102 and module.Holder().method(1) == 20


def test_a_hook_is_registered_once_however_often_the_plugin_runs(module):
    for _ in range(2):
        hooks.around("a.seam", "hooked:function", lambda original, x: original(x) + 100)
    HookRegistry.apply_hooks()
    assert module.function(1) == 102


def test_a_hook_that_was_not_applied_is_an_error_that_names_seam_and_target():
    hooks.around("a.seam", "hooked:function", lambda original, x: x)
    with pytest.raises(SeamError, match=r"seam a\.seam .*hooked:function is not hooked"):
        hooks.assert_applied()


def test_a_target_that_sglang_could_not_hook_is_an_error_and_not_a_line_in_the_log(module):
    hooks.around("a.seam", "hooked:Holder.gone", lambda original, x: x)
    HookRegistry.apply_hooks()
    with pytest.raises(SeamError, match=r"seam a\.seam .*hooked:Holder\.gone is not hooked"):
        hooks.assert_applied()


def test_a_hook_that_something_else_has_taken_out_again_is_an_error(module):
    hooks.around("a.seam", "hooked:function", lambda original, x: x)
    HookRegistry.apply_hooks()
    module.function = lambda x: x
    with pytest.raises(SeamError, match="hooked:function is not hooked"):
        hooks.assert_applied()


def test_a_decorator_of_upstreams_own_does_not_pass_for_the_hook(module):
    """Such as functools.lru_cache, which leaves the same mark on a function."""
    module.function = functools.lru_cache(module.function)
    hooks.around("a.seam", "hooked:function", lambda original, x: x)
    with pytest.raises(SeamError, match="hooked:function is not hooked"):
        hooks.assert_applied()


def test_another_plugins_hook_on_the_same_target_may_stand_around_ours(module):
    hooks.around("a.seam", "hooked:function", lambda original, x: original(x) + 100)
    HookRegistry.register("hooked.function", lambda original, x: original(x) * 10, HookType.AROUND)
    HookRegistry.apply_hooks()
    hooks.assert_applied()
    assert module.function(1) == 1020


def test_nothing_registered_is_nothing_to_complain_about():
    hooks.assert_applied()
