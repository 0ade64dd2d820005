"""The environment that upstream packages read when they are imported, set before any test imports one.

Its place matters too: pytest puts this folder on the import path, so that every test finds the helpers beside it. A
variable that is already set wins. What scripts share with tests is found, too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
sys.path.append(str(Path(__file__).resolve().parent / "integration"))  # tiny_task, which verl imports by name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

pytest_plugins = ["suite"]

_SHOWN = ("torch", "verl", "sglang", "transformers", "megatron-core", "mbridge", "ray")


def pytest_report_header() -> str:
    return "tlt_verl with " + ", ".join([f"Python {platform.python_version()}", *map(_shown, _SHOWN)])


def _shown(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"
