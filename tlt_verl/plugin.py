"""The two entry points: verl's, run when verl is imported, and SGLang's, run in every process of an engine.

This is where the rooms are wired to the patches, which know nothing of them. Both upstream loaders swallow a plugin's
exceptions. Here a failure is logged at once with its cause, and raised again where the plugin would have been used: a
run that asks for tlt stops, a run that does not goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from tlt_verl.patches.seam import Seam

logger = logging.getLogger(__name__)

_failures: list[Exception] = []


def verl_plugin() -> None:
    """Register the rollout backend, and the CPU device when `VERL_PLATFORM=cpu`.

    verl is still being imported when this runs. What touches a module that is not there yet waits for its import.
    """
    from tlt_verl.patches import (
        verl_checkpoint,
        verl_early_validation,
        verl_policy_events,
        verl_rollout_adapter,
        verl_rollout_replica,
        verl_separate_log,
        verl_step_metrics,
    )
    from tlt_verl.patches.after_import import after_import
    from tlt_verl.rollout.checks import NAME

    if on_cpu_device():
        _guarded(_install_cpu_device)
    _guarded(_install, verl_early_validation.SEAM, begin_run)
    later = (
        (verl_rollout_replica, (NAME, _replica_class)),
        (verl_rollout_adapter, (NAME, "tlt_verl.rollout.adapter.TLTAdapter")),
        (verl_step_metrics, (NAME, _step_metrics, _engine_metrics())),
        (verl_checkpoint, (NAME, _save_drafter, _load_drafter)),
        (verl_policy_events, (NAME, _say_policy)),
        (verl_separate_log, ()),
    )
    for patch, parts in later:
        after_import(patch.MODULE, partial(_guarded, _install, patch.SEAM, *parts))


def on_cpu_device() -> bool:
    """Whether this process was told that the CPU is its device."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def _install_cpu_device() -> None:
    from tlt_verl.cpu.install import install_cpu_device
    from tlt_verl.patches import sglang_share_cpu_tensors
    from tlt_verl.patches.after_import import after_import

    install_cpu_device()
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # SGLang decides at import what it runs on
    after_import(sglang_share_cpu_tensors.MODULE, partial(_install, sglang_share_cpu_tensors.SEAM))


def _install(seam: Seam, *parts: Any) -> None:
    from tlt_verl.patches.seam import install

    install(seam, *parts)


def _guarded(step: Callable[..., None], *parts: Any) -> None:
    """Run a step of the installation; a failure is logged now and raised where tlt is asked for."""
    try:
        step(*parts)
    except Exception as error:
        _failures.append(error)
        logger.error("tlt_verl is not available in this process: %s", error, exc_info=True)


def raise_failures() -> None:
    """Raise the first failure of the installation, if there was one."""
    if _failures:
        raise RuntimeError(f"tlt_verl could not be installed: {_failures[0]}") from _failures[0]


def begin_run(config: Any) -> None:
    """Check a run that asks for tlt, and guard what it leaves behind. Other runs pass unread.

    Raises:
        ConfigError, DrafterError, SeamError: names the option, the value and the cure.
    """
    from tlt_verl.rollout import checks
    from tlt_verl.shared_memory.leftovers import guard_run

    if checks.asks_for_tlt(config):
        check_run(config)
        guard_run(own_folder=not checks.needs_temporary_folder(config))


def check_run(config: Any) -> None:
    """Refuse a run that asks for tlt and cannot have it, before Ray is started. Other runs pass unread.

    Raises:
        ConfigError, DrafterError, SeamError: names the option, the value and the cure.
    """
    from tlt_verl.drafter import HOT_TOKENS, check_drafter, check_target
    from tlt_verl.patches import check_versions
    from tlt_verl.rollout import checks

    if not checks.asks_for_tlt(config):
        return
    raise_failures()
    check_versions(on_cpu_device())
    options = checks.check_run(config, on_cpu_device())
    target = checks.target_config(config)
    if target is None or all(strategy.drafter == "off" for strategy in options.strategy.parsed()):
        return
    check_target(target)
    if options.drafter.path is not None:
        check_drafter(options.drafter.path, target, f"{checks.PREFIX}.drafter.path")
        checks.check_hot_vocabulary(config, Path(options.drafter.path, HOT_TOKENS))


def _replica_class() -> type:
    raise_failures()
    from tlt_verl.patches import verl_rollout_server

    _install(verl_rollout_server.SEAM)
    from tlt_verl.rollout.replica import TLTReplica

    return TLTReplica


def _step_metrics(responses: Sequence[tuple[dict, int]], generation_s: float) -> dict[str, float]:
    from tlt_verl.rollout import metrics

    return metrics.step_metrics([metrics.counters(fields, tokens) for fields, tokens in responses], generation_s)


def _engine_metrics() -> Callable[[Sequence[dict]], dict[str, float]]:
    from tlt_verl.rollout.metrics import EngineMetrics

    return EngineMetrics().step


def _save_drafter(checkpoint: str, servers: list[Any]) -> None:
    from tlt_verl.rollout import drafter_state

    drafter_state.save(checkpoint, servers)


def _load_drafter(checkpoint: str, servers: list[Any]) -> None:
    from tlt_verl.rollout import drafter_state

    drafter_state.load(checkpoint, servers)


def _say_policy(config: Any, state: str, step: int) -> None:
    from tlt_verl.rollout import policy_events

    policy_events.say_policy(config, state, step)


def sglang_plugin() -> None:
    """Register the algorithm TLT, the CPU attention backend and the hooks. The loader applies the hooks afterwards."""
    from sglang.srt.utils import is_cpu

    from tlt_verl.engine import algorithm, client, fingerprint, verify
    from tlt_verl.patches import (
        sglang_algorithm,
        sglang_batch_result,
        sglang_internal_state,
        sglang_spec_counters,
        sglang_verify,
        sglang_weight_fingerprint,
    )

    if is_cpu():
        _install_sglang_on_cpu()
    _install(sglang_verify.SEAM, verify.eagle_sample)
    _install(sglang_spec_counters.SEAM)
    _install(sglang_weight_fingerprint.SEAM, fingerprint.fingerprints_of)
    _install(sglang_batch_result.SEAM)
    _install(sglang_internal_state.SEAM, client.PREFIX, client.KEY)
    _install(sglang_algorithm.SEAM, algorithm.NAME, algorithm.TLTAlgorithm, validate_server_args, _worker_class)


def _install_sglang_on_cpu() -> None:
    from tlt_verl.cpu.draft_chain import draft_forward
    from tlt_verl.cpu.sglang_attention import (
        NAME,
        CpuAttentionBackend,
        CpuMultiStepDraftBackend,
        choose_cpu_attention,
    )
    from tlt_verl.patches import sglang_cpu_attention, sglang_cpu_draft, sglang_share_cpu_tensors

    _install(sglang_cpu_attention.SEAM, NAME, CpuAttentionBackend, CpuMultiStepDraftBackend, choose_cpu_attention)
    _install(sglang_cpu_draft.SEAM, draft_forward)
    _install(sglang_share_cpu_tensors.SEAM)


def _worker_class(server_args: ServerArgs) -> type:
    from tlt_verl.drafter import is_untrained
    from tlt_verl.engine.options import EngineOptions
    from tlt_verl.engine.worker import TLTWorker
    from tlt_verl.patches import hooks

    hooks.assert_applied()
    TLTWorker.options = EngineOptions.from_environment()
    TLTWorker.drafter_trained = not is_untrained(server_args.speculative_draft_model_path)
    return TLTWorker


def validate_server_args(server_args: ServerArgs) -> None:
    """Refuse what cannot be exact, and find the drafter. Loads no model.

    Raises:
        ValueError: names the option, the value and the cure.
    """
    from tlt_verl.drafter import HOT_TOKENS, prepare_drafter
    from tlt_verl.engine import algorithm
    from tlt_verl.engine.options import EngineOptions
    from tlt_verl.patches import hooks

    hooks.assert_applied()
    algorithm.refuse_inexact(server_args)
    algorithm.refuse_switching(server_args, EngineOptions.from_environment())
    path = prepare_drafter(
        server_args.model_path,
        server_args.speculative_draft_model_path,
        option="speculative_draft_model_path",
        target_option="model_path",
    )
    server_args.speculative_draft_model_path = str(path)
    if server_args.tp_size > 1 and (server_args.speculative_token_map or (path / HOT_TOKENS).is_file()):
        raise ValueError(
            f"speculative_draft_model_path: got {str(path)!r}, a drafter with a hot vocabulary, with tp_size="
            f"{server_args.tp_size}; SGLang serves one with tp_size=1 only. Train one with the whole vocabulary "
            "(tlt-verl warmup --hot-vocab 0)."
        )
    if server_args.speculative_token_map is None and (path / HOT_TOKENS).is_file():
        server_args.speculative_token_map = str(path / HOT_TOKENS)
    if server_args.load_format == "dummy" and server_args.speculative_draft_load_format is None:
        server_args.speculative_draft_load_format = "auto"  # the policy's weights are synced, the drafter's are not
