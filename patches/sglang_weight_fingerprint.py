"""SGLang's weight checker, for fingerprints of target and drafter that can be compared with a policy's export.

Stock checksums are of SGLang's own fused tensors and need CUDA. One more action is added, `tlt_fingerprint`; the others
go to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

ACTION = "tlt_fingerprint"
_CHECKER = "sglang.srt.utils.weight_checker:WeightChecker"


def _install(fingerprints_of: Callable[[Any], dict[str, str]]) -> None:
    """Answer the action with `fingerprints_of(model)`."""

    def handle(original: Callable[..., Any], checker: Any, action: str, allow_quant_error: bool = False) -> Any:
        if action != ACTION:
            return original(checker, action, allow_quant_error)
        return {
            "checksums": fingerprints_of(checker._get_model()),
            "per_gpu_checksum": "",
            "parallelism_info": checker._parallelism_info().model_dump(),
        }

    hooks.around(SEAM.name, f"{_CHECKER}.handle", handle)


SEAM = Seam(
    name="sglang.weight_fingerprint",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(path=f"{_CHECKER}.handle", parameters=("action", "allow_quant_error")),
        Target(path=f"{_CHECKER}.__init__", source_contains=("self._get_model = get_model",)),
        Target(path=f"{_CHECKER}._parallelism_info"),
        Target(
            path="sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.check_weights",
            source_contains=("_get_draft_model_runner", "_merge_checksum_payloads"),
        ),
        Target(path="sglang.srt.managers.io_struct:CheckWeightsReqInput"),
    ),
    why="The debug option that compares the engine's target weights with the policy's export, tensor by tensor.",
    install=_install,
)
