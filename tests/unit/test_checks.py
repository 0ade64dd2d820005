"""Checks of a run's configuration: what is refused, what is warned of, and what the words are."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tlt_verl.config import ConfigError, StrategyConfig
from tlt_verl.rollout import checks

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture
def run(tmp_path):
    """`run(key=value, ...)`: a run that is right, with changes under dotted keys."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 9}))

    def make(changes: dict[str, Any] | None = None) -> DictConfig:
        config = OmegaConf.create(
            {
                "actor_rollout_ref": {
                    "model": {"path": str(tmp_path)},
                    "actor": {"megatron": {"dtype": "bfloat16"}},
                    "rollout": {"name": "tlt", "dtype": "bfloat16", "tensor_model_parallel_size": 1},
                },
                "trainer": {"device": "cuda"},
            }
        )
        for key, value in (changes or {}).items():
            OmegaConf.update(config, key, value, force_add=True)
        return config

    return make


def refusal(config: DictConfig, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        checks.check_run(config, **kwargs)
    return str(error.value)


# --- whose run it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ours"), [("tlt", True), ("sglang", False), ("vllm", False), (None, False)])
def test_only_a_run_that_asks_for_tlt_is_ours(run, name, ours):
    assert checks.asks_for_tlt(run({f"{ROLLOUT}.name": name})) is ours


def test_a_configuration_without_a_rollout_is_not_ours():
    """verl's other entry points (SFT, evaluation) pass through the same place."""
    assert checks.asks_for_tlt(OmegaConf.create({"model": {"path": "x"}})) is False


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("trainer.default_local_dir", "${oc.env:TMPDIR}/checkpoints", True),
        ("actor_rollout_ref.model.path", "hdfs://models/one", True),
        ("trainer.default_local_dir", "checkpoints", False),
    ],
)
def test_a_run_keeps_the_machines_temporary_folder_where_something_in_it_is_to_stay(run, key, value, needs):
    assert checks.needs_temporary_folder(run({key: value})) is needs


def test_a_run_that_is_right_gives_the_options(run):
    assert checks.check_run(run({f"{ROLLOUT}.custom.tlt.strategy.arms": ["off"]})).strategy.arms == ["off"]
    assert checks.check_run(run({f"{ROLLOUT}.custom": None})).strategy.arms == StrategyConfig().arms


# --- refusals: the option, the value, the cure ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({f"{ROLLOUT}.custom.tlt.foo": 1}, [f"{ROLLOUT}.custom.tlt.foo: unknown key (got 1)", "takes drafter"]),
        (
            {f"{ROLLOUT}.engine_kwargs.sglang.speculative_num_steps": 5},
            [
                f"{ROLLOUT}.engine_kwargs.sglang.speculative_num_steps: got 5",
                f"{ROLLOUT}.custom.tlt.strategy.arms",
                f"{ROLLOUT}.name=sglang",
            ],
        ),
        (
            {f"{ROLLOUT}.pipeline_model_parallel_size": 2},
            [f"{ROLLOUT}.pipeline_model_parallel_size: got 2, takes 1", "pipeline"],
        ),
        (
            {f"{ROLLOUT}.tensor_model_parallel_size": 2},
            [f"{ROLLOUT}.tensor_model_parallel_size: got 2", "divisor of the target's 9 attention heads: [1, 3, 9]"],
        ),
        (
            {f"{ROLLOUT}.tensor_model_parallel_size": 3, f"{ROLLOUT}.custom.tlt.debug.fingerprint": True},
            [f"{ROLLOUT}.custom.tlt.debug.fingerprint: got true", "tensor_model_parallel_size=3", "only with 1"],
        ),
        (
            {"actor_rollout_ref.model.lora_rank": 16},
            ["actor_rollout_ref.model.lora: got rank 16", "Set actor_rollout_ref.model.lora.merge=true"],
        ),
        ({"actor_rollout_ref.model.lora.rank": 8}, ["actor_rollout_ref.model.lora: got rank 8"]),
        ({"trainer.device": "cpu"}, ["trainer.device: got 'cpu'", "VERL_PLATFORM=cpu", "trainer.device=cuda"]),
    ],
    ids=lambda value: next(iter(value)).rpartition(".")[2] if isinstance(value, dict) else "",
)
def test_a_refusal_names_the_option_the_value_and_the_cure(run, changes, parts):
    text = refusal(run(changes))
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "changes",
    [
        {f"{ROLLOUT}.tensor_model_parallel_size": 3},
        {f"{ROLLOUT}.engine_kwargs.sglang.mem_fraction_static": 0.5},
        {"actor_rollout_ref.model.lora_rank": 16, "actor_rollout_ref.model.lora.merge": True},
        {"actor_rollout_ref.model.lora_rank": 0},
        {"actor_rollout_ref.model.path": "Qwen/Qwen2.5-7B", f"{ROLLOUT}.tensor_model_parallel_size": 2},
    ],
    ids=["divides", "other engine option", "merged", "no adapter", "not a local folder"],
)
def test_what_looks_like_a_mistake_and_is_none_passes(run, changes):
    checks.check_run(run(changes))


def test_the_cpu_is_a_device_where_the_environment_says_so(run):
    checks.check_run(run({"trainer.device": "cpu"}), on_cpu=True)


def test_a_target_that_is_no_local_folder_is_read_later(run, tmp_path):
    assert checks.target_config(run()) == {"num_attention_heads": 9}
    assert checks.target_config(run({"actor_rollout_ref.model.path": str(tmp_path / "nowhere")})) is None


# --- the mix of precisions that drifts --------------------------------------------------------------------------------

MEGATRON, FSDP = "actor_rollout_ref.actor.megatron.dtype", "actor_rollout_ref.actor.fsdp_config.dtype"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({MEGATRON: "float32"}, MEGATRON),
        ({FSDP: "fp32"}, FSDP),
        ({MEGATRON: "float32", f"{ROLLOUT}.dtype": None}, MEGATRON),  # SGLang's own choice is bfloat16
        ({MEGATRON: "float32", f"{ROLLOUT}.dtype": "float16"}, MEGATRON),
    ],
    ids=["megatron", "fsdp", "default rollout", "half rollout"],
)
def test_a_float32_policy_behind_a_shorter_rollout_is_warned_of_by_name(run, caplog, changes, key):
    config = run(changes)
    with caplog.at_level(logging.WARNING):
        checks.check_run(config)
    (record,) = caplog.records
    rollout = changes.get(f"{ROLLOUT}.dtype", "bfloat16") or "bfloat16"
    expected = (f"{key}={changes[key]}", f"{ROLLOUT}.dtype={rollout}", "drift", "Use one dtype on both sides")
    assert all(part in record.getMessage() for part in expected), record.getMessage()


@pytest.mark.parametrize(
    "changes",
    [{}, {MEGATRON: "float32", f"{ROLLOUT}.dtype": "float32"}, {FSDP: "fp32", f"{ROLLOUT}.dtype": "fp32"}],
    ids=["bfloat16 on both", "float32 on both", "fp32 on both"],
)
def test_the_same_precision_on_both_sides_is_not_warned_of(run, caplog, changes):
    assert checks.precision_drift(run(changes)) is None
