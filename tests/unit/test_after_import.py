"""Callbacks behind an import: when they run, how often, and where their errors come out."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys

import pytest
from tlt_verl.patches.after_import import after_import

NAME = "made_for_after_import"


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A package with a module in it that is not imported yet; afterwards nothing of it is left."""
    package = tmp_path / NAME
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("value = 1\n\n\ndef function():\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield f"{NAME}.inner"
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]


def test_it_runs_after_the_module_is_whole_and_before_the_import_returns(module):
    seen = []
    after_import(module, lambda: seen.append(sys.modules[module].function()))
    assert seen == [] and module not in sys.modules
    importlib.import_module(module)
    assert seen == [1]


def test_it_runs_at_once_for_a_module_that_is_there(module):
    importlib.import_module(module)
    seen = []
    after_import(module, lambda: seen.append(module))
    assert seen == [module]


def test_it_runs_once(module):
    seen = []
    after_import(module, lambda: seen.append(module))
    importlib.reload(importlib.import_module(module))
    assert seen == [module]


def test_other_imports_do_not_start_it(module):
    seen = []
    after_import(module, lambda: seen.append(module))
    importlib.import_module(NAME)
    assert seen == []


def test_several_callbacks_for_one_module_all_run(module):
    """mbridge has two seams that wait for it."""
    seen = []
    for number in range(3):
        after_import(module, lambda number=number: seen.append(number))
    importlib.import_module(module)
    assert sorted(seen) == [0, 1, 2]


def test_a_callback_may_import_what_another_waits_for(module):
    other = []
    after_import(module, lambda: other.append("inner"))
    after_import(NAME, lambda: importlib.import_module(module))
    importlib.import_module(NAME)
    assert other == ["inner"]


def test_its_error_comes_out_of_the_import_statement(module):
    def fails():
        raise RuntimeError("does not fit")

    after_import(module, fails)
    with pytest.raises(RuntimeError, match="does not fit"):
        importlib.import_module(module)


def test_the_module_still_knows_its_file_and_source(module):
    """Tracebacks, inspect.getsource (which every seam uses) and pickling look them up through the loader."""
    after_import(module, lambda: None)
    imported = importlib.import_module(module)
    assert imported.__file__.endswith("inner.py")
    assert "return value" in inspect.getsource(imported.function)
    assert imported.__spec__.loader.get_source(module).startswith("value = 1")


def test_a_module_that_does_not_exist_is_still_not_found():
    after_import(f"{NAME}.nowhere", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{NAME}.nowhere")
