"""A module as a plugin of SGLang, for engines that are started with its folder on their import path."""

from __future__ import annotations

from pathlib import Path


def write_plugin(folder: Path, module: str, source: str | None = None, function: str = "install") -> Path:
    """Make `module:function` discoverable as a plugin that has the module's name; returns the folder.

    Args:
        source: the module's text, where it is to stand in this folder too; None: it is found elsewhere.
    """
    metadata = folder / f"{module}-0.0.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0.0.0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{module} = {module}:{function}\n")
    if source is not None:
        (folder / f"{module}.py").write_text(source)
    return folder
