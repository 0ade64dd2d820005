"""The server of a replica: verl's SGLang server, with an engine that speculates with the algorithm TLT.

verl's server can already launch a speculating engine and report its counters, for models with multi-token prediction;
that gate (`mtp`) is opened on the server's own copy of the configuration, so nothing else in verl sees it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from sglang.srt.managers.io_struct import CheckWeightsReqInput
from sglang.srt.plugins import load_plugins
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import MtpConfig, RolloutConfig
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer

from tlt_verl.config import TLTConfig, load_config
from tlt_verl.engine import client
from tlt_verl.engine.after_death import remove_after_death
from tlt_verl.engine.options import EngineOptions

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


def engine_options(options: TLTConfig, drafters: Path) -> EngineOptions:
    """What the schedulers of a replica are told.

    Args:
        drafters: the replica's folder of publications; its name is the ring's too.
    """
    tap = options.tap
    return EngineOptions(
        tap=drafters.name.removeprefix("tlt-") if tap.enable else None,
        tap_bytes=round(tap.buffer_gb * 2**30),
        tap_tokens_per_step=tap.max_tokens_per_step,
        publications=str(drafters),
    )


def with_engine_options(rollout: RolloutConfig) -> RolloutConfig:
    """The rollout configuration that stock verl's server has to see to launch our engine."""
    options = tlt_config(rollout)
    (strategy,) = options.strategy.parsed()
    engine = dict((rollout.engine_kwargs or {}).get("sglang") or {})
    changes: dict[str, Any] = {}
    if get_platform().device_name == "cpu":
        engine = {**_CPU_ENGINE, **engine}
        changes["free_cache_engine"] = False  # there is no device memory to give back
    if strategy.drafter != "off":
        engine["speculative_draft_model_path"] = options.drafter.path
        changes["mtp"] = MtpConfig(
            enable=True,
            enable_rollout=True,
            speculative_algorithm=ALGORITHM,
            speculative_num_steps=strategy.num_steps,
            speculative_eagle_topk=strategy.topk,
            speculative_num_draft_tokens=strategy.num_draft_tokens,
        )
    changes["engine_kwargs"] = {**(rollout.engine_kwargs or {}), "sglang": engine}
    return dataclasses.replace(rollout, **changes)


class TLTHttpServer(SGLangHttpServer):
    """verl's SGLang server over an engine that speculates."""

    def __init__(self, config: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(with_engine_options(omega_conf_to_dataclass(config)), model_config, *args, **kwargs)

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        """Launch the engine, with SGLang's plugins loaded before verl builds the arguments that name one of them."""
        load_plugins()
        self._drafters = Path(tempfile.mkdtemp(prefix="tlt-drafters-"))
        self._janitor = remove_after_death(self._drafters)
        engine_options(tlt_config(self.config), self._drafters).export()
        await super().launch_server(*args, **kwargs)

    async def drafter_state(self) -> dict[str, Any]:
        """What the schedulers' worker says of itself (`TLTWorker.state`); empty where the engine does not speculate."""
        return await client.state(self.tokenizer_manager) if self._speculates() else {}

    async def publish_drafter(self, version: int) -> str | None:
        """Let the drafter `v<version>` of the folder of publications serve, while requests are in flight.

        Returns:
            None when it serves, or why it was rejected.
        """
        return await client.publish(self.tokenizer_manager, version)

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
