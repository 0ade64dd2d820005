"""The worker of the algorithm TLT: SGLang's EAGLE worker, whose drafter belongs to us.

A weight update carries the policy. It goes to the target alone; the drafter's own tensors are only ever written by a
publication. Embedding and head are the target's, shared by reference, and follow it. What a forward pass computed goes
to the tap when the scheduler has processed its result, for only then it is known which tokens the response keeps.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

from tlt_verl.board import Board
from tlt_verl.engine import tap_batch
from tlt_verl.engine.after_death import remove_after_death
from tlt_verl.engine.arms import own_captures
from tlt_verl.engine.graph_plan import DRAFT, EXTEND, VERIFY
from tlt_verl.engine.options import TUNER_FILE, EngineOptions
from tlt_verl.engine.publication import Publications, PublishGap
from tlt_verl.engine.speculation import NGRAM, Speculation, plan_of
from tlt_verl.engine.tap import Tap
from tlt_verl.policy_files import PolicyShare
from tlt_verl.segments import SegmentWriter, ring_bytes

logger = logging.getLogger(__name__)

SLOT_TOKENS = 64
"""Tokens of one slot of the ring: what is the most that a reader waits for in a response that goes on."""

_TAPPED = "tlt_tapped"  # attribute of a GenerationBatchResult


class TLTWorker(EAGLEWorkerV2):
    """EAGLE's worker with a drafter that policy updates never touch, a tap, publications, and drafting on and off.

    `options` and `drafter_trained` are set by the plugin before the class is made an instance of.
    """

    speculative_num_steps: int
    options: ClassVar[EngineOptions] = EngineOptions()
    drafter_trained: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy_version = 0
        self._policy_changed = False
        self._tapping = True
        self._publish_gap = PublishGap()
        self._board = self._open_board() if self.options.board is not None and self.ps.tp_rank == 0 else None
        self._tap = self._open_tap() if self.options.tap is not None and self.ps.tp_rank == 0 else None
        self._tap_failures = int(self.options.tap is not None and self.ps.tp_rank == 0 and self._tap is None)

    def init_attention_backends(self) -> None:
        """SGLang's. Next it captures the target's graphs, for the planned batch sizes."""
        super().init_attention_backends()
        self._target_captures = contextlib.ExitStack()
        self._target_captures.enter_context(own_captures(self, plan_of(self, self.options), VERIFY))

    def init_cuda_graphs(self) -> None:
        """SGLang's graphs, and those of the other strategies: the last part of the engine's start."""
        self._target_captures.close()
        with own_captures(self, plan_of(self, self.options), DRAFT, EXTEND):
            super().init_cuda_graphs()
        self._speculation = Speculation(self, self.options, self._all_ranks_take)
        self._publications = Publications(
            Path(self.options.publications or os.devnull),
            self._draft_worker,
            lambda: self.target_worker.model_runner.model.get_embed_and_head()[1].data,
            self._all_ranks_agree,
            self.ps.tp_size,
            resizable=self.target_worker.model_runner.decode_cuda_graph_runner is None,
        )
        self._share = PolicyShare(
            Path(self.options.publications or os.devnull),
            self.ps.tp_rank,
            self._newest_policy_version,
            lambda: self.target_worker.model_runner.model.get_embed_and_head(),
        )
        if not (self.drafter_trained or self.options.draft_untrained):
            logger.info("tlt: the drafter was never trained; drafting begins with the first publication")
            self._speculation.may_draft(False)

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """EAGLE's step with the strategy of the moment; what the tap will need of it is noted on the result."""
        if self._policy_changed:
            self.policy_version, self._policy_changed = self.policy_version + 1, False
            self._speculation.policy_changed()
        is_prefill = batch.forward_mode.is_extend() or batch.is_extend_in_batch
        if self._publications.drafts_are_stale and not is_prefill and batch.spec_info is not None:
            batch.spec_info.topk_index = torch.zeros_like(batch.spec_info.topk_index)  # one wrong draft a request
            self._publications.drafts_are_stale = False
        tapping = self._tap is not None and self._tapping and not batch.forward_mode.is_idle()
        lens = (list(batch.prefix_lens), list(batch.extend_lens)) if tapping and is_prefill else ()
        self._publish_gap.step_begins()
        if is_prefill:
            result = super().forward_batch_generation(batch, *args, **kwargs)
            self._speculation.after_prefill(batch, result)
        else:
            arm = self._speculation.before_decode(batch)
            result = super().forward_batch_generation(batch, *args, **kwargs)
            self._speculation.after_decode(batch, result, arm)
        self._publish_gap.step_ends()
        if tapping:
            with self._tap_guard():
                hidden = result.logits_output.hidden_states
                if result.can_run_cuda_graph:  # a captured graph writes its next answer to the same memory
                    hidden = hidden.clone()
                tapped = tap_batch.Tapped(hidden, self.policy_version, self._event_here(), *lens)
                setattr(result, _TAPPED, tapped)
        return result

    def _build_trivial_verify_input(self, batch: Any) -> Any:
        """Where the trained drafter does not run: the model-free drafter's tree, or the root alone."""
        if self._speculation.arms.active.strategy.drafter == NGRAM and not batch.forward_mode.is_idle():
            return self._speculation.drafts(batch)
        return super()._build_trivial_verify_input(batch)

    def verify(self, *args: Any, **kwargs: Any) -> Any:
        """EAGLE's, as deep as the tree is, whoever drafted it."""
        steps = self.speculative_num_steps
        self.speculative_num_steps = self._speculation.arms.active.strategy.num_steps
        try:
            return super().verify(*args, **kwargs)
        finally:
            self.speculative_num_steps = steps

    # --- the scheduler's side: called through the seams sglang.batch_result and sglang.internal_state

    def process_batch_result(self, process: Any, batch: Any, result: Any) -> Any:
        """Run the scheduler's own `process`, with the tap and the counters of what was not drafted around it."""
        if self._board is not None:
            self._board.engine_busy = 1
        tapped = getattr(result, _TAPPED, None)
        live = tap_batch.active(batch)
        starts: list[int] = []
        if tapped is not None and tapped.extend_lens is None:
            with self._tap_guard():
                starts = tap_batch.verify_starts(batch)
        if result.accept_lens is not None and result.speculative_num_draft_tokens == 1:
            for req, is_live in zip(batch.reqs, live, strict=True):
                req.spec_verify_ct -= is_live  # the scheduler counts it; decoding without drafts verifies nothing
        answer = process(batch, result)
        self._speculation.processed(batch, result, live)
        if tapped is not None and self._tap is not None:
            with self._tap_guard():
                self._record(self._tap, tapped, batch, result, starts, live)
        return answer

    def on_idle(self) -> None:
        """Nothing is running: write what the tap has staged, and say so on the board."""
        self._publish_gap.idle()
        self._speculation.idle()
        if self._tap is not None:
            with self._tap_guard():
                self._tap.write_all()
        if self._board is not None:
            self._board.engine_busy = 0

    def control(self, commands: dict[str, float], *, asleep: bool = False) -> bool:
        """Carry out commands between two steps: `stage` or `publish` a version, `drafting` or `tapping` 1 or 0, `share`
        the policy's embedding and head, `save_tuner` or `load_tuner`.

        Args:
            asleep: the engine has released memory, perhaps the drafter's: nothing is published into it.
        """
        done = True
        for name, value in commands.items():
            if name == "stage":
                done &= self._publications.stage(int(value))
            elif name == "publish":
                published = not asleep and self._publications.publish(int(value))
                if published:
                    self._publish_gap.published()
                    self._speculation.drafter_changed()
                if published or self._publications.is_broken:
                    self._speculation.may_draft(published)
                done &= published
            elif name == "drafting":
                self._speculation.may_draft(bool(value))
            elif name in ("save_tuner", "load_tuner"):
                path = Path(self.options.publications or os.devnull, TUNER_FILE)
                keep = self._speculation.save_tuner if name == "save_tuner" else self._speculation.load_tuner
                done &= self.ps.tp_rank != 0 or keep(path)  # the others take the first rank's choices
            elif name == "share":
                done &= not asleep and self._share.begin()
            elif name == "tapping":
                self._tapping = bool(value)
            else:
                done = False
        return done

    def state(self) -> dict[str, Any]:
        """Versions and counters, for the engine's front."""
        if self._tap is not None:
            with self._tap_guard():
                self._tap.drain()
        publications = self._publications
        return {
            "policy_version": self.policy_version,
            "newest_policy_version": self._newest_policy_version(),
            "drafting": self._speculation.trained,
            "speculation": self._speculation.state(),
            "drafter": {
                "version": publications.version,
                "staged": publications.staged,
                "staging": publications.staging,
                "rejected": dict(publications.rejected),
                "reason": publications.reason,
                "published": publications.published,
                "pause_ms": 1e3 * self._publish_gap.seconds,
            },
            "tap": {**(self._tap.metrics() if self._tap is not None else {}), "failures": self._tap_failures},
        }

    # --- weight updates

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
        self._policy_changed = True
        if self._board is not None:
            self._board.policy_version = self._newest_policy_version()
        draft_worker = self._draft_worker
        embed, head = self.target_worker.model_runner.model.get_embed_and_head()
        drafter = draft_worker.draft_runner.model
        if draft_worker.hot_token_id is not None:
            drafter.lm_head.weight.data.copy_(head.data[draft_worker.hot_token_id])
        elif drafter.lm_head.weight.data_ptr() != head.data_ptr():
            draft_worker.init_lm_head()
        if drafter.model.embed_tokens.weight.data_ptr() != embed.data_ptr():
            draft_worker.init_lm_head()

    # --- parts

    def _newest_policy_version(self) -> int:
        """Of the weights that the next step will compute with."""
        return self.policy_version + self._policy_changed

    def _open_board(self) -> Board | None:
        """The replica's board; None, said in the log, where it is not there."""
        try:
            return Board(Path(self.options.board or ""))
        except (OSError, ValueError) as error:
            logger.error("tlt: no board, the drafter is not trained while this engine is idle: %s", error)
            return None

    def _open_tap(self) -> Tap | None:
        """The tap into this scheduler's ring; None, said in the log, where the ring cannot be made."""
        width = self.target_worker.model_config.hidden_size
        slot_bytes = ring_bytes(width, 2, SLOT_TOKENS) - ring_bytes(width, 1, SLOT_TOKENS)
        try:
            writer = SegmentWriter(
                f"{self.options.tap}-{os.getpid()}",
                hidden_width=width,
                slots=max(2, self.options.tap_bytes // slot_bytes),
                slot_tokens=SLOT_TOKENS,
            )
            self._janitor = remove_after_death(writer.path)
        except OSError as error:
            logger.error("tlt: no tap, rollouts go on without it: %s", error)
            return None
        stream = None if self.device == "cpu" else torch.get_device_module(self.device).Stream()
        return Tap(writer, slot_tokens=SLOT_TOKENS, max_tokens_per_step=self.options.tap_tokens_per_step, stream=stream)

    @staticmethod
    def _record(tap: Tap, tapped: tap_batch.Tapped, batch: Any, result: Any, starts: Any, live: Any) -> None:
        if tapped.extend_lens is not None:
            stretches = tap_batch.prefill_stretches(batch, tapped)
        else:
            stretches = tap_batch.verify_stretches(batch, result, starts, live)
        finished = [req for req, was_live in zip(batch.reqs, live, strict=True) if was_live and req.finished()]
        ended = [tap_batch.view_of(req) for req in finished]
        tap.record(stretches, tapped.hidden, tapped.version, ended, tapped.ready)

    @contextlib.contextmanager
    def _tap_guard(self) -> Iterator[None]:
        """The rollout comes first: where the tap fails it ends, and says so in the log and in the counters."""
        try:
            yield
        except Exception:
            logger.exception("tlt: the tap failed and is closed; rollouts go on")
            self._tap_failures += 1
            tap, self._tap = self._tap, None
            if tap is not None:
                tap.close()

    def _event_here(self) -> Any:
        """An event of the device behind what has been launched so far; None on the host."""
        if self.device == "cpu":
            return None
        event = torch.get_device_module(self.device).Event()
        event.record()
        return event

    def _all_ranks_take(self, number: int) -> int:
        """The first tensor-parallel rank's number."""
        if self.ps.tp_size == 1:
            return number
        taken = torch.tensor([number])
        group = get_tp_group()
        torch.distributed.broadcast(taken, src=group.ranks[0], group=group.cpu_group)
        return int(taken.item())

    def _all_ranks_agree(self, yes: bool) -> bool:
        if self.ps.tp_size == 1:
            return yes
        vote = torch.tensor([int(yes)])
        torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
        return bool(vote.item())
