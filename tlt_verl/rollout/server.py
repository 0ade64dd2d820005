"""The server of a replica: verl's SGLang server, with an engine that speculates with the algorithm TLT.

verl's server can already launch a speculating engine and report its counters, for models with multi-token prediction;
that gate (`mtp`) is opened on the server's own copy of the configuration, so nothing else in verl sees it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.io_struct import CheckWeightsReqInput
from sglang.srt.plugins import load_plugins
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import MtpConfig, RolloutConfig
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer

from tlt_verl.board import Board, Phase
from tlt_verl.config import TLTConfig, load_config
from tlt_verl.drafter.checkpoint import write_drafter
from tlt_verl.engine import client
from tlt_verl.engine.after_death import remove_after_death
from tlt_verl.engine.graph_plan import largest
from tlt_verl.engine.options import TUNER_FILE, EngineOptions
from tlt_verl.rollout.spot import SpotHost, job_prefix, spot_host
from tlt_verl.shared_memory.leftovers import guard_run
from tlt_verl.strategy import OFF

logger = logging.getLogger(__name__)

ALGORITHM = "TLT"
FINGERPRINT_ACTION = "tlt_fingerprint"
_DRAFTER_PREFIX = "draft."  # SGLang's own prefix for the drafter's tensors in a merged checksum

# What stock verl sets for an accelerator, as it has to be on a CPU. A user's own engine_kwargs win.
_CPU_ENGINE = {
    "device": "cpu",
    "attention_backend": "tlt_cpu",
    "enable_memory_saver": False,
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,  # an idle scheduler spins, on a core that the policy's update needs
}


def tlt_config(rollout: RolloutConfig) -> TLTConfig:
    """The plugin's options of a rollout configuration."""
    return load_config((rollout.custom or {}).get("tlt"))


def engine_options(options: TLTConfig, drafters: Path, board: Path | None = None) -> EngineOptions:
    """What the schedulers of a replica are told.

    Args:
        drafters: the replica's folder of publications; its name is the ring's too.
        board: the replica's, where the drafter is trained.
    """
    tap = options.tap
    return EngineOptions(
        tap=drafters.name.removeprefix("tlt-") if tap.enable or board is not None else None,
        board=None if board is None else str(board),
        tap_bytes=round(tap.buffer_gb * 2**30),
        tap_tokens_per_step=tap.max_tokens_per_step,
        publications=str(drafters),
        strategy=dataclasses.asdict(options.strategy),
    )


def with_engine_options(rollout: RolloutConfig) -> RolloutConfig:
    """The rollout configuration that stock verl's server has to see to launch our engine."""
    options = tlt_config(rollout)
    strategies = options.strategy.parsed()
    engine = dict((rollout.engine_kwargs or {}).get("sglang") or {})
    changes: dict[str, Any] = {}
    if get_platform().device_name == "cpu":
        engine = {**_CPU_ENGINE, **engine}
        changes["free_cache_engine"] = False  # there is no device memory to give back
    if any(strategy != OFF for strategy in strategies):
        engine["speculative_draft_model_path"] = options.drafter.path
        num_steps, topk, num_draft_tokens = largest(strategies, engine.get("page_size") or 1)
        changes["mtp"] = MtpConfig(
            enable=True,
            enable_rollout=True,
            speculative_algorithm=ALGORITHM,
            speculative_num_steps=num_steps,
            speculative_eagle_topk=topk,
            speculative_num_draft_tokens=num_draft_tokens,
        )
    changes["engine_kwargs"] = {**(rollout.engine_kwargs or {}), "sglang": engine}
    return dataclasses.replace(rollout, **changes)


def _write_new(
    folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], hot: torch.Tensor | None
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    folder.mkdir()
    write_drafter(folder, config, weights, hot)


class TLTHttpServer(SGLangHttpServer):
    """verl's SGLang server over an engine that speculates."""

    def __init__(self, config: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(with_engine_options(omega_conf_to_dataclass(config)), model_config, *args, **kwargs)

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        """Launch the engine, with SGLang's plugins loaded before verl builds the arguments that name one of them."""
        guard_run()  # where the run's own guard does not reach: another node, or a Ray that was there before the run
        load_plugins()
        self._spot: SpotHost | None = None
        options = tlt_config(self.config)
        self._drafters = Path(tempfile.mkdtemp(prefix=f"tlt-{job_prefix()}{self.replica_rank}-"))
        board = self._make_board(options)
        page = None if board is None else board.path
        self._janitors = [remove_after_death(path) for path in (self._drafters, page) if path is not None]
        engine_options(options, self._drafters, page).export()
        await super().launch_server(*args, **kwargs)
        if board is not None:
            start = Path(self.tokenizer_manager.server_args.speculative_draft_model_path)
            self._spot = spot_host(self, options, self._drafters, start, board)
            colocated = self.rollout_mode != RolloutMode.STANDALONE
            self._spot.phase(Phase.POLICY if colocated else Phase.GENERATE)

    def _make_board(self, options: TLTConfig) -> Board | None:
        """A page for spot training, where there is to be any."""
        trains = options.spot.enable and any(strategy.drafter == "eagle" for strategy in options.strategy.parsed())
        wanted = trains and self.node_rank == 0
        if not wanted or self.rollout_mode == RolloutMode.COLOCATED:  # a reward model's or a teacher's
            return None
        try:
            return Board.create(self._drafters.name.removeprefix("tlt-"))
        except OSError as error:
            logger.error("tlt: replica %d trains no drafter, there is no board: %s", self.replica_rank, error)
            return None

    # --- what verl does with this replica, for whoever trains on its device meanwhile

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """verl's, counted while it runs."""
        if self._spot is None:
            return await super().generate(*args, **kwargs)
        self._spot.request_begins()
        try:
            return await super().generate(*args, **kwargs)
        finally:
            self._spot.request_ends()

    async def sleep(self) -> None:
        """The policy takes the device."""
        self._phase(Phase.POLICY)
        await super().sleep()

    async def abort_all_requests(self) -> None:
        """The policy's weights are about to come."""
        self._phase(Phase.SYNC)
        await super().abort_all_requests()

    async def resume_generation(self) -> None:
        """The policy's weights are there."""
        await super().resume_generation()
        self._phase(Phase.GENERATE)

    async def set_global_steps(self, global_steps: int) -> None:
        """The policy's weights of this step are there."""
        await super().set_global_steps(global_steps)
        if self._spot is not None:
            self._spot.weights_came(global_steps)

    def _phase(self, phase: Phase) -> None:
        if self._spot is not None:
            self._spot.phase(phase)

    # --- the drafter

    async def receive_drafter(
        self, version: int, config: dict[str, Any], weights: dict[str, torch.Tensor], hot: torch.Tensor | None
    ) -> str | None:
        """Let a drafter serve that the coordinator offers; None, or why it does not."""
        if self._spot is not None and not self._spot.is_awake:
            return "the engine is asleep"
        folder = self._drafters / f"v{version}"
        try:
            await asyncio.to_thread(_write_new, folder, config, weights, hot)
            return await self.publish_drafter(version)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)  # the engine has read it

    async def share_policy(self) -> int:
        """Let the engine write the policy's embedding and head beside the publications; its version, or -1: not now."""
        state = await client.state(self.tokenizer_manager)
        begun = await client.command(self.tokenizer_manager, share=1)
        return state["newest_policy_version"] if begun else -1

    async def drafter_state(self) -> dict[str, Any]:
        """What the schedulers' worker says of itself (`TLTWorker.state`); empty where the engine does not speculate.

        Where a drafter is trained, also the board under `spot` and what the coordinator said under `coordinator`.
        """
        if not self._speculates():
            return {}
        state = await client.state(self.tokenizer_manager)
        if self._spot is None:
            return state
        return {**state, "spot": self._spot.state(), "coordinator": self._spot.coordinator_metrics()}

    async def publish_drafter(self, version: int) -> str | None:
        """Let the drafter `v<version>` of the folder of publications serve, while requests are in flight.

        Returns:
            None when it serves, or why it was rejected.
        """
        return await client.publish(self.tokenizer_manager, version)

    async def tuner_state(self) -> dict[str, Any] | None:
        """What this replica's tuner has learnt, JSON-able; None where there is no tuner."""
        if not self._speculates() or not await client.command(self.tokenizer_manager, save_tuner=1):
            return None
        return json.loads(await asyncio.to_thread(Path(self._drafters, TUNER_FILE).read_text))

    async def set_tuner_state(self, state: dict[str, Any]) -> bool:
        """Let this replica's tuner go on from there; whether it does."""
        if not self._speculates():
            return False
        await asyncio.to_thread(Path(self._drafters, TUNER_FILE).write_text, json.dumps(state))
        return await client.command(self.tokenizer_manager, load_tuner=1)

    def publications(self) -> str:
        """The folder on this node from which this replica's drafters are published; it goes with the replica."""
        return str(self._drafters)

    def _speculates(self) -> bool:
        return self.tokenizer_manager is not None and self.config.mtp is not None and self.config.mtp.enable_rollout

    async def weight_fingerprints(self) -> tuple[dict[str, str], dict[str, str], int]:
        """Fingerprints of the engine's tensors under their checkpoint names: the target's, and the drafter's own.

        Returns:
            Also the drafter's version, which a publication changes with its tensors.

        Raises:
            RuntimeError: the engine could not compute them.
        """
        request = CheckWeightsReqInput(action=FINGERPRINT_ACTION)
        success, message, ranks, _ = await self.tokenizer_manager.check_weights(request)
        if not success:
            raise RuntimeError(f"the engine could not fingerprint its weights: {message}")
        payload = ranks[0]["checksums"]
        target = {name: value for name, value in payload.items() if not name.startswith(_DRAFTER_PREFIX)}
        drafter = {
            name.removeprefix(_DRAFTER_PREFIX): value
            for name, value in payload.items()
            if name.startswith(_DRAFTER_PREFIX) and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
        }
        state = await self.drafter_state()
        return target, drafter, state["drafter"]["version"] if state else 0
