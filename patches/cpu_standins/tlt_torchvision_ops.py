"""Defines two operators just before torchvision is imported, so that its CUDA build imports beside a CPU build of
torch.

torchvision registers fake implementations for `nms` and `qnms` at import time and fails when its compiled library,
which would have defined them, cannot be loaded. Only the schemas are defined here: calling either operator still
raises. Loaded by a .pth file in every interpreter; costs one entry in `sys.meta_path` until torchvision is first
imported.
"""

import importlib.abc
import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # keeps the definitions alive


class _DefineBeforeImport(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define()
        return None


def _define():
    import torch

    global _library
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(name + _SCHEMA)


sys.meta_path.insert(0, _DefineBeforeImport())
