"""The two entry points: verl's, run when verl is imported, and SGLang's, run in every process of an engine.

This is where the rooms are wired to the patches, which know nothing of them. Both upstream loaders swallow a plugin's
exceptions. Here a failure is logged at once with its cause, and raised again where the plugin would have been used: a run
that asks for tlt stops, a run that does not goes on.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


def sglang_plugin() -> None:
    """Register the algorithm TLT, the CPU attention backend and the hooks. The loader applies the hooks afterwards."""
    from sglang.srt.utils import is_cpu

    from tlt_verl.engine import algorithm, fingerprint, verify
    from tlt_verl.patches import sglang_algorithm, sglang_spec_counters, sglang_verify, sglang_weight_fingerprint
    from tlt_verl.patches.seam import install

    if is_cpu():
        _install_sglang_on_cpu()
    install(sglang_verify.SEAM, verify.eagle_sample)
    install(sglang_spec_counters.SEAM)
    install(sglang_weight_fingerprint.SEAM, fingerprint.fingerprints_of)
    install(sglang_algorithm.SEAM, algorithm.NAME, algorithm.TLTAlgorithm, validate_server_args, _worker_class)


def _install_sglang_on_cpu() -> None:
    from tlt_verl.cpu.sglang_attention import (
        NAME,
        CpuAttentionBackend,
        CpuMultiStepDraftBackend,
        choose_cpu_attention,
    )
    from tlt_verl.patches import sglang_cpu_attention, sglang_share_cpu_tensors
    from tlt_verl.patches.seam import install

    install(sglang_cpu_attention.SEAM, NAME, CpuAttentionBackend, CpuMultiStepDraftBackend, choose_cpu_attention)
    install(sglang_share_cpu_tensors.SEAM)


def _worker_class(server_args: ServerArgs) -> type:
    from tlt_verl.engine.worker import TLTWorker
    from tlt_verl.patches import hooks

    hooks.assert_applied()
    return TLTWorker


def validate_server_args(server_args: ServerArgs) -> None:
    """Refuse what cannot be exact, and find the drafter. Loads no model.

    Raises:
        ValueError: names the option, the value and the cure.
    """
    from tlt_verl.drafter import prepare_drafter
    from tlt_verl.engine import algorithm
    from tlt_verl.patches import hooks

    hooks.assert_applied()
    algorithm.refuse_inexact(server_args)
    path = prepare_drafter(server_args.model_path, server_args.speculative_draft_model_path)
    server_args.speculative_draft_model_path = str(path)
