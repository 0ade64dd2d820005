"""Registers the speculative algorithm `TLT` through SGLang's own interface.

The interface is official (`SpeculativeAlgorithm.register`); the seam is what the algorithm leans on behind it: EAGLE's
worker, its weight updates and its shared head, and the enum whose questions the algorithm answers.
"""

from __future__ import annotations

from collections.abc import Callable

from tlt_verl.patches.seam import Seam, Target

_WORKER = "sglang.srt.speculative.eagle_worker_v2"
_BASE_WORKER = "sglang.srt.speculative.base_spec_worker:BaseSpecWorker"


def _install(
    name: str, spec_class: type, validate_server_args: Callable[..., None], worker: Callable[..., type]
) -> None:
    """Register `spec_class` under `name`; `worker(server_args)` returns the worker class."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    SpeculativeAlgorithm.register(
        name, supports_overlap=True, validate_server_args=validate_server_args, spec_class=spec_class
    )(worker)


SEAM = Seam(
    name="sglang.algorithm",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(
            path="sglang.srt.speculative.spec_info:SpeculativeAlgorithm.register",
            parameters=("name", "supports_overlap", "validate_server_args", "spec_class"),
        ),
        Target(path="sglang.srt.speculative.spec_info:SpeculativeAlgorithm.EAGLE"),
        Target(path="sglang.srt.speculative.spec_info:SpeculativeAlgorithm.handle_server_args"),
        Target(path="sglang.srt.speculative.spec_registry:CustomSpecAlgo", parameters=("name", "factory")),
        Target(path=f"{_WORKER}:EAGLEWorkerV2.update_weights_from_tensor", parameters=("recv_req",)),
        Target(path=f"{_BASE_WORKER}.update_weights_from_disk", parameters=("recv_req",)),
        Target(path=f"{_BASE_WORKER}.update_weights_from_ipc", parameters=("recv_req",)),
        Target(path=f"{_WORKER}:EagleDraftWorker.init_lm_head", source_contains=("set_embed_and_head(embed, head)",)),
        Target(
            path="sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager."
            "update_weights_from_tensor",
            source_contains=("self.draft_worker or self.tp_worker",),
        ),
    ),
    why="The speculative algorithm TLT: EAGLE's worker, whose drafter the policy's weights never overwrite.",
    install=_install,
)
