"""Checks of a run's configuration, before Ray is started or a model loaded.

Knows verl's configuration tree, as omegaconf; imports neither verl nor sglang nor torch.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tlt_verl.config import PREFIX, ConfigError, TLTConfig, load_config

logger = logging.getLogger(__name__)

NAME = "tlt"
_ROLLOUT = "actor_rollout_ref.rollout"


def asks_for_tlt(config: DictConfig) -> bool:
    """Whether the run's rollout backend is this plugin."""
    return OmegaConf.select(config, f"{_ROLLOUT}.name") == NAME


def check_run(config: DictConfig, on_cpu: bool = False) -> TLTConfig:
    """Validate the plugin's options and what they need of the rest of the configuration.

    Args:
        on_cpu: the CPU is this process's device (VERL_PLATFORM=cpu).

    Raises:
        ConfigError: names the option, the value and the cure.
    """
    options = load_config(OmegaConf.select(config, PREFIX))
    _check_device(config, on_cpu)
    _check_engine_kwargs(config)
    _check_parallel(config, options)
    _check_lora(config)
    if drift := precision_drift(config):
        logger.warning("%s", drift)
    return options


def needs_temporary_folder(config: DictConfig) -> bool:
    """Whether something that is to outlive the run may lie in the machine's temporary folder.

    An option may name that folder, and verl keeps its copies of remote models there.
    """
    text = OmegaConf.to_yaml(config)
    return "TMPDIR" in text or "hdfs://" in text


def target_config(config: DictConfig) -> dict[str, Any] | None:
    """The target's `config.json`, or None where the model is not a local folder (it is checked once it is there)."""
    path = Path(str(OmegaConf.select(config, "actor_rollout_ref.model.path"))).expanduser() / "config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _check_device(config: DictConfig, on_cpu: bool) -> None:
    """verl takes the platform from the environment; with `trainer.device` alone a run would fail late and elsewhere."""
    device = OmegaConf.select(config, "trainer.device")
    if device == "cpu" and not on_cpu:
        raise ConfigError(
            "trainer.device: got 'cpu', but without VERL_PLATFORM=cpu in the environment verl has no CPU device. "
            "Start the run with VERL_PLATFORM=cpu, or with trainer.device=cuda."
        )


def _check_engine_kwargs(config: DictConfig) -> None:
    """The engine's speculation is ours to set."""
    kwargs = OmegaConf.select(config, f"{_ROLLOUT}.engine_kwargs.sglang") or {}
    for key in kwargs:
        if str(key).startswith("speculative_"):
            raise ConfigError(
                f"{_ROLLOUT}.engine_kwargs.sglang.{key}: got {kwargs[key]!r}, but {_ROLLOUT}.name={NAME} sets SGLang's "
                f"speculation itself. Remove it and use {PREFIX}.strategy.arms and {PREFIX}.drafter.path, "
                f"or use {_ROLLOUT}.name=sglang."
            )


def _check_parallel(config: DictConfig, options: TLTConfig) -> None:
    tp_key, pp_key = f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.pipeline_model_parallel_size"
    tp, pp = int(OmegaConf.select(config, tp_key) or 1), int(OmegaConf.select(config, pp_key) or 1)
    if pp > 1:
        raise ConfigError(f"{pp_key}: got {pp}, takes 1: SGLang does not speculate across pipeline stages")
    if options.debug.fingerprint and tp > 1:
        raise ConfigError(f"{PREFIX}.debug.fingerprint: got true with {tp_key}={tp}, takes true only with 1")
    target = target_config(config)
    heads = int(target.get("num_attention_heads", 0)) if target else 0
    if heads and heads % tp:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(f"{tp_key}: got {tp}, takes a divisor of the target's {heads} attention heads: {divisors}")


def check_hot_vocabulary(config: DictConfig, token_map: Path) -> None:
    """Refuse a drafter with a hot vocabulary where the draft head is shared by several ranks.

    Args:
        token_map: the file that such a drafter has.

    Raises:
        ConfigError: names the option, the value and the cure.
    """
    tp_key = f"{_ROLLOUT}.tensor_model_parallel_size"
    tp = int(OmegaConf.select(config, tp_key) or 1)
    if tp > 1 and token_map.is_file():
        raise ConfigError(
            f"{PREFIX}.drafter.path: got {str(token_map.parent)!r}, a drafter with a hot vocabulary, with "
            f"{tp_key}={tp}; "
            "takes one with the whole vocabulary (tlt-verl warmup --hot-vocab 0), or tensor_model_parallel_size=1"
        )


def _check_lora(config: DictConfig) -> None:
    model = "actor_rollout_ref.model"
    rank = max(int(OmegaConf.select(config, f"{model}.{key}") or 0) for key in ("lora_rank", "lora.rank"))
    if rank > 0 and not OmegaConf.select(config, f"{model}.lora.merge"):
        raise ConfigError(
            f"{model}.lora: got rank {rank}, an adapter that would be served beside the target, which "
            f"{_ROLLOUT}.name={NAME} does not support. Set {model}.lora.merge=true to serve merged weights."
        )


def precision_drift(config: DictConfig) -> str | None:
    """Why the rollout's log-probs would drift from the policy's, or None.

    A policy held in float32 and served in bfloat16 is rounded at every sync: the engine then samples from a policy that
    is not the one being trained.
    """
    rollout = str(OmegaConf.select(config, f"{_ROLLOUT}.dtype") or "bfloat16")
    for key in ("actor_rollout_ref.actor.megatron.dtype", "actor_rollout_ref.actor.fsdp_config.dtype"):
        policy = OmegaConf.select(config, key)
        if policy is not None and str(policy) in ("float32", "fp32") and rollout not in ("float32", "fp32"):
            return (
                f"precision mix that drifts: {key}={policy} with {_ROLLOUT}.dtype={rollout}. The policy's weights are "
                f"rounded at every sync, so rollout log-probs move away from the policy's. Use one dtype on both sides."
            )
    return None
