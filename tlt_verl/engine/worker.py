"""The worker of the algorithm TLT: SGLang's EAGLE worker, whose drafter belongs to us.

A weight update carries the policy. It goes to the target alone; the drafter's own tensors are only ever written by a
drafter publication. Embedding and head are the target's, shared by reference, and follow it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions


class TLTWorker(EAGLEWorkerV2):
    """EAGLE's worker with a drafter that policy updates never touch."""

    def update_weights_from_tensor(self, recv_req: UpdateWeightsFromTensorReqInput) -> tuple[bool, str]:
        """Load the policy's tensors into the target, then let the drafter's shared tensors follow."""
        monkey_patch_torch_reductions()
        named_tensors = MultiprocessingSerializer.deserialize(recv_req.serialized_named_tensors[self.ps.tp_rank])
        success, message = self.target_worker.model_runner.weight_updater.update_weights_from_tensor(
            named_tensors=named_tensors, load_format=recv_req.load_format
        )
        if success:
            self._follow_target()
        return success, message

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        """The scheduler has loaded the target already; nothing of it is the drafter's but the shared tensors."""
        self._follow_target()
        return True, "Succeeded to update the target; the drafter keeps its own weights."

    update_weights_from_ipc = update_weights_from_disk

    def _follow_target(self) -> None:
        """Share embedding and head again where an update replaced the target's tensors instead of filling them."""
        draft_worker = self._draft_worker
        embed, head = self.target_worker.model_runner.model.get_embed_and_head()
        drafter = draft_worker.draft_runner.model
        if draft_worker.hot_token_id is not None:
            drafter.lm_head.weight.data.copy_(head.data[draft_worker.hot_token_id])
        elif drafter.lm_head.weight.data_ptr() != head.data_ptr():
            draft_worker.init_lm_head()
        if drafter.model.embed_tokens.weight.data_ptr() != embed.data_ptr():
            draft_worker.init_lm_head()
