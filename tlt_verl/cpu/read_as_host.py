"""Import chosen modules with their word for the device read as "the host".

megatron-core says `torch.cuda`, `"cuda"` and `.cuda()` where it means "the device". Wrapping torch itself would change
every other library of the process (a wrapped `torch.zeros` makes transformers load wrong weights without an error), so
the word is changed where it is said: a chosen module is compiled from its source with

- `torch.cuda` and `from torch.cuda import ...` → `tlt_verl.cpu.host_device`
- the strings `"cuda"` and `"torch.cuda.FloatTensor"` → `"cpu"` and `"torch.FloatTensor"`
- `x.cuda(...)` → `x`, and `pin_memory=` is dropped

Line numbers stay those of the file. No file is written: neither the source nor a byte-code cache is touched.
Knows Python's import system; which modules are chosen is the caller's business.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from tlt_verl.cpu import host_device

_HOST_NAME = "_tlt_host_device"  # what `torch.cuda` becomes: a global of the module
_TENSOR_TYPE = re.compile(r"torch\.cuda\.(\w+Tensor)")


class HostReader(ast.NodeTransformer):
    """Rewrites one module; `replaced` counts the words found."""

    def __init__(self) -> None:
        self.replaced = 0

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`torch.cuda`."""
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return self._new(ast.Name(id=_HOST_NAME, ctx=ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`x.cuda(...)`, and host memory pinned for a device."""
        method = isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        self.generic_visit(node)
        if method and isinstance(node.func, ast.Attribute):
            return self._new(node.func.value, node)
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "pin_memory"]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """The device's name, and a tensor type's."""
        if node.value == "cuda":
            return self._new(ast.Constant("cpu"), node)
        if isinstance(node.value, str) and (match := _TENSOR_TYPE.fullmatch(node.value)):
            return self._new(ast.Constant(f"torch.{match[1]}"), node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        """`from torch.cuda import ...`."""
        if node.module == "torch.cuda":
            self.replaced += 1
            node.module = host_device.__name__
        return node

    def _new(self, new: ast.AST, old: ast.AST) -> ast.AST:
        self.replaced += 1
        return ast.copy_location(new, old)


class _HostLoader(importlib.abc.Loader):
    """A source loader whose module is compiled by `HostReader`."""

    def __init__(self, loader: importlib.machinery.SourceFileLoader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        path = self._loader.path
        tree = ast.parse(self._loader.get_data(path), filename=path)
        code = compile(ast.fix_missing_locations(HostReader().visit(tree)), path, "exec", dont_inherit=True)
        module.__dict__[_HOST_NAME] = host_device
        exec(code, module.__dict__)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _HostFinder(importlib.abc.MetaPathFinder):
    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _HostLoader(spec.loader)
        return spec


def read_as_host(names: Iterable[str]) -> None:
    """Arrange that these modules, when they are imported, are read with the host as their device.

    Raises:
        ImportError: one of them is already imported; it would keep its own idea of the device.
    """
    finder = _HostFinder(names)
    if loaded := sorted(finder.names & sys.modules.keys()):
        raise ImportError(f"imported before the CPU device was installed: {', '.join(loaded)}")
    sys.meta_path.insert(0, finder)
