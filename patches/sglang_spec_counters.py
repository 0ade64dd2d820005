"""The names under which verl reads SGLang's counters of speculation.

verl 0.9.1 reads `spec_draft_token_num` and `spec_accept_token_num`, and falls back to wrong numbers where they are
missing; SGLang 0.5.17 writes `spec_num_proposed_drafts` and `spec_num_correct_drafts`. Both names are written, zeros
included, for every request of an engine that speculates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

_CALCULATE = "sglang.srt.managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics"


def _calculate(original: Callable[..., None], manager: Any, meta_info: dict[str, Any], recv_obj: Any, i: int) -> None:
    original(manager, meta_info, recv_obj, i)
    meta_info["spec_draft_token_num"] = meta_info.get("spec_num_proposed_drafts", 0)
    meta_info["spec_accept_token_num"] = meta_info.get("spec_num_correct_drafts", 0)
    meta_info.setdefault("spec_verify_ct", 0)


def _install() -> None:
    hooks.around(SEAM.name, _CALCULATE, _calculate)


SEAM = Seam(
    name="sglang.spec_counters",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(
            path=_CALCULATE,
            parameters=("meta_info", "recv_obj", "i"),
            source_contains=('meta_info["spec_num_correct_drafts"]', 'meta_info["spec_num_proposed_drafts"]'),
        ),
    ),
    why="Counters of drafted, accepted and verified tokens, under the names that verl reads.",
    install=_install,
)
