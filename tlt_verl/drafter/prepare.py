"""The drafter that an engine is started with: the given one, checked, or one made from the target and kept in a cache.

Knows where things lie on this machine; the layout and the making are `eagle`'s and `from_target`'s.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tlt_verl.drafter.check import check_drafter
from tlt_verl.drafter.eagle import DrafterError, read_config
from tlt_verl.drafter.from_target import TARGET_OPTION, make_drafter


def prepare_drafter(
    target: str, path: str | None, *, option: str = "drafter.path", target_option: str = TARGET_OPTION
) -> Path:
    """The folder of a drafter that fits the target. Loads no model.

    Args:
        target: the target's folder, or the name of a model that is in the Hugging Face cache.
        path: a drafter in SGLang's EAGLE format; None makes one under `$XDG_CACHE_HOME/tlt_verl/drafters`.
        option: the key that chose the drafter, for the messages.
        target_option: the key that chose the target, for the messages.

    Raises:
        DrafterError: the drafter does not fit (`check_drafter`), or none can be made (`make_drafter`).
    """
    folder = _target_folder(target, target_option)
    if path is not None:
        check_drafter(path, read_config(folder, target_option), option)
        return Path(path)
    return make_drafter(folder, cached_drafter(folder), option=target_option)


def cached_drafter(target: Path) -> Path:
    """Where the drafter made from the target in this folder is kept: one for each path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = target.resolve()
    return cache / "tlt_verl" / "drafters" / f"{target.name}-{hashlib.sha256(str(target).encode()).hexdigest()[:12]}"


def _target_folder(target: str, option: str) -> Path:
    if Path(target).is_dir():
        return Path(target)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(target, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise DrafterError(
            f"{option}: got {target!r}, which is neither a folder nor a model in the Hugging Face cache. "
            f"Give a folder, or download it first: hf download {target}"
        ) from None
