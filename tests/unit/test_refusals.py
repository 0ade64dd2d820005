"""What an engine of the algorithm TLT refuses, asked for through SGLang's own `ServerArgs`, before a model is loaded.

Each would serve tokens that do not follow the target's distribution, or a drafter that is never accepted.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang import ServerArgs
from sglang.srt.environ import envs
from sglang.srt.plugins import load_plugins

from tlt_verl.drafter import DrafterError
from tlt_verl.engine.algorithm import refuse_inexact, refuse_switching
from tlt_verl.engine.options import EngineOptions

TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
}
EXACT = {
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
    "enable_custom_logit_processor": False,
    "rl_on_policy_target": None,
    "speculative_use_rejection_sampling": False,
    "speculative_adaptive": False,
    "pp_size": 1,
}
REFUSED = [
    ("speculative_accept_threshold_single", 0.5),
    ("speculative_accept_threshold_acc", 0.9),
    ("enable_custom_logit_processor", True),
    ("rl_on_policy_target", "fsdp"),
    ("speculative_use_rejection_sampling", True),
    ("speculative_adaptive", True),
    ("pp_size", 2),
]


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    load_plugins()


def folder(path: Path, config: dict[str, Any]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def engine(model: str, **options: Any) -> ServerArgs:
    return ServerArgs(model_path=model, speculative_algorithm="TLT", device="cpu", **options)


@pytest.mark.parametrize(("option", "value"), REFUSED)
def test_an_inexact_option_is_refused_by_name_value_and_cure(option, value):
    with pytest.raises(ValueError) as error:
        refuse_inexact(SimpleNamespace(**EXACT | {option: value}))
    text = str(error.value)
    assert text.startswith(f"{option}={value!r} is refused") and f"Set it to {EXACT[option]!r}" in text


def test_the_defaults_are_exact():
    refuse_inexact(SimpleNamespace(**EXACT))
    assert {option for option, _ in REFUSED} == EXACT.keys()


def test_a_simulated_accept_length_is_refused_with_its_value():
    with envs.SGLANG_SIMULATE_ACC_LEN.override(3.0), pytest.raises(ValueError) as error:
        refuse_inexact(SimpleNamespace(**EXACT))
    assert str(error.value).startswith("SGLANG_SIMULATE_ACC_LEN=3.0 is refused")
    assert "Set it to 0.0" in str(error.value)


# On a CPU SGLang itself refuses rl_on_policy_target first, for the attention backend.
@pytest.mark.parametrize(("option", "value"), [case for case in REFUSED if case[0] != "rl_on_policy_target"])
def test_sglangs_own_interface_asks_before_a_model_is_loaded(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"{option}={value!r} is refused with speculative_algorithm=TLT"):
        engine(folder(tmp_path / "target", TARGET), **{option: value})


def test_ranks_that_compute_together_do_not_choose_for_themselves():
    tuned = EngineOptions(strategy={"arms": ["eagle:3x1@4", "ngram:7x1@8"], "tune": True})
    together, alone = SimpleNamespace(enable_dp_attention=True), SimpleNamespace(enable_dp_attention=False)
    with pytest.raises(ValueError) as error:
        refuse_switching(together, tuned)
    text = str(error.value)
    assert "enable_dp_attention=True is refused" in text and "eagle:3x1@4, ngram:7x1@8" in text
    assert "strategy.tune=false" in text
    refuse_switching(alone, tuned)
    refuse_switching(together, EngineOptions(strategy={"arms": ["eagle:3x1@4"], "tune": False}))
    refuse_switching(together, EngineOptions())


def test_sglangs_own_interface_asks_for_the_choice_of_strategies_too(tmp_path, monkeypatch):
    environment: dict[str, str] = {}
    EngineOptions(strategy={"arms": ["eagle:3x1@4"], "tune": True}).export(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="enable_dp_attention=True is refused"):
        engine(folder(tmp_path / "target", TARGET), enable_dp_attention=True, tp_size=2, dp_size=2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 288}, ["whose hidden_size is 288; the target's is 576"]),
        ({"vocab_size": 32000}, ["whose vocab_size is 32000; the target's is 49152"]),
        ({"architectures": ["Qwen2ForCausalLMEagle"]}, ["Qwen2ForCausalLMEagle", "LlamaForCausalLMEagle"]),
    ],
    ids=["hidden size", "vocabulary", "architecture"],
)
def test_a_drafter_of_another_model_is_refused(changes, parts, tmp_path):
    config = TARGET | {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1} | changes
    drafter = folder(tmp_path / "drafter", config)
    with pytest.raises(DrafterError) as error:
        engine(folder(tmp_path / "target", TARGET), speculative_draft_model_path=drafter)
    assert all(part in str(error.value) for part in (f"speculative_draft_model_path: got {drafter!r}", *parts))


def test_a_target_that_has_no_drafter_is_refused(tmp_path):
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 576, "n_head": 9, "n_layer": 2}
    with pytest.raises(DrafterError, match="GPT2LMHeadModel"):
        engine(folder(tmp_path / "target", config))
