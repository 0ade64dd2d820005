"""The options: defaults, types, ranges, and what each mistake says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tlt_verl import strategy as strategy_module
from tlt_verl.config import PREFIX, ConfigError, Strategy, TLTConfig, load_config, options

YAML = Path(__file__).parents[2] / "configs" / "tlt.yaml"


def message(node: object, **kwargs: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(node, **kwargs)  # type: ignore[arg-type]
    return str(error.value)


# --- defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [None, {}, {"drafter": None}, OmegaConf.create({}), OmegaConf.create(None)])
def test_nothing_given_means_the_defaults(node):
    assert load_config(node) == TLTConfig()


def test_the_yaml_file_holds_every_default():
    text = OmegaConf.to_container(OmegaConf.load(YAML))
    assert text == OmegaConf.to_container(OmegaConf.structured(TLTConfig))
    assert load_config(OmegaConf.load(YAML)) == TLTConfig()


def test_every_key_of_the_yaml_file_has_a_comment_above_it():
    lines = YAML.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("  ") and ":" in line and "#" not in line]
    assert len(keys) == len(list(options()))
    assert all(lines[i - 1].strip().startswith("#") for i in keys)


def test_every_option_has_help():
    assert [key for key, _ in options()] == [
        "drafter.path",
        "drafter.algorithm",
        "drafter.hot_vocab",
        "strategy.arms",
        "strategy.tune",
        "strategy.buckets",
        "strategy.epsilon",
        "strategy.window",
        "strategy.max_running_for_drafting",
        "tap.enable",
        "tap.buffer_gb",
        "tap.max_tokens_per_step",
        "spot.enable",
        "spot.idle_ms",
        "spot.yield_ms",
        "spot.micro_batch_tokens",
        "spot.lr",
        "spot.buffer_gb",
        "gate.held_out",
        "gate.tokens",
        "gate.every_s",
        "gate.least",
        "debug.fingerprint",
    ]
    for key, item in options():
        assert item.metadata["help"] and item.metadata["takes"], key


def test_defaults_are_not_shared():
    load_config(None).strategy.arms.append("off")
    assert load_config(None).strategy.arms == ["eagle:3x1@4", "eagle:7x1@8", "ngram:3x1@4", "ngram:7x1@8"]


# --- reading --------------------------------------------------------------------------------------------------------

GIVEN = {"drafter": {"path": "/models/drafter"}, "strategy": {"arms": ["eagle:5x4@16"]}, "debug": {"fingerprint": True}}


@pytest.mark.parametrize("node", [GIVEN, OmegaConf.create(GIVEN), {k: OmegaConf.create(v) for k, v in GIVEN.items()}])
def test_values_are_read_from_dicts_and_omegaconf(node):
    config = load_config(node)
    assert (config.drafter.path, config.drafter.algorithm) == ("/models/drafter", "eagle")
    assert config.strategy.parsed() == (Strategy("eagle", 5, 4, 16),)
    assert config.debug.fingerprint is True


def test_the_options_of_spot_training_and_of_the_gate_are_read_up_to_their_bounds():
    spot = {"enable": True, "idle_ms": 1, "yield_ms": 0.5, "micro_batch_tokens": 1, "lr": 2.0e-4, "buffer_gb": 4}
    gate = {"held_out": 0.5, "tokens": 1, "every_s": 1, "least": 1}
    config = load_config({"spot": spot, "gate": gate, "drafter": {"hot_vocab": 0}})
    assert dataclasses.asdict(config.spot) == spot and dataclasses.asdict(config.gate) == gate
    assert isinstance(config.spot.idle_ms, float) and isinstance(config.gate.least, float)
    assert config.drafter.hot_vocab == 0
    assert load_config({"drafter": {"hot_vocab": 2048}}).drafter.hot_vocab == 2048
    assert load_config({"drafter": {"hot_vocab": None}}).drafter.hot_vocab is None


def test_the_options_of_the_strategy_are_read_up_to_their_bounds():
    arms = ["eagle:7x1@8", "eagle:6x4@24", "ngram:8x1@9", "off"]
    bounds = {"buckets": [1, 300], "epsilon": 1, "window": 1, "max_running_for_drafting": 0}
    given = {"arms": arms, "tune": True} | bounds
    config = load_config({"strategy": given}).strategy
    assert dataclasses.asdict(config) == given and isinstance(config.epsilon, float)
    assert [str(strategy) for strategy in config.parsed()] == arms
    assert load_config({"strategy": {"epsilon": 0, "max_running_for_drafting": None}}).strategy.epsilon == 0.0


def test_strategies_are_of_one_class_wherever_they_are_imported_from():
    assert strategy_module.Strategy is Strategy and strategy_module.ConfigError is ConfigError
    assert Strategy("off") == strategy_module.OFF


def test_interpolations_into_the_outer_configuration_are_resolved():
    outer = OmegaConf.create({"home": "/data", "tlt": {"drafter": {"path": "${home}/drafter"}}})
    assert load_config(outer.tlt).drafter.path == "/data/drafter"


@pytest.mark.parametrize("text", ["strategy: {arms: [off]}", "strategy: {arms: ['off']}"])
def test_off_in_yaml_is_the_strategy_off_with_and_without_quotes(text):
    assert load_config(OmegaConf.create(text)).strategy.parsed() == (Strategy("off"),)


def test_an_override_on_hydras_command_line_reads_as_written():
    parser = OverridesParser.create()
    value = parser.parse_override("+strategy.arms=[eagle:3x2@6]").value()
    assert load_config({"strategy": {"arms": value}}).strategy.parsed() == (Strategy("eagle", 3, 2, 6),)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "parts"),
    [
        (
            {"drafter": {"pth": "x"}},
            ["drafter.pth", "'x'", "path, algorithm, hot_vocab", f"Did you mean {PREFIX}.drafter.path?"],
        ),
        (
            {"drafters": {"path": "x"}},
            [f"{PREFIX}.drafters:", "drafter, strategy, tap, spot, gate, debug", f"mean {PREFIX}.drafter?"],
        ),
        ({"fingerprint": True}, [f"{PREFIX}.fingerprint:", "Did you mean the option debug.fingerprint?"]),
        ({"zzz": 1}, [f"{PREFIX}.zzz: unknown key (got 1)"]),
        ({7: 1}, [f"{PREFIX}.7: unknown key"]),
        ({"drafter": "x"}, [f"{PREFIX}.drafter: got 'x'", "section", "path, algorithm"]),
        ("x", [f"{PREFIX}: got 'x'", "section"]),
        ({"drafter": {"path": 3}}, [f"{PREFIX}.drafter.path: got 3 (int)", "path of a folder, or null"]),
        ({"drafter": {"path": ""}}, ["drafter.path: got ''", "null"]),
        ({"drafter": {"path": "???"}}, [PREFIX, "cannot be read"]),
        ({"drafter": {"algorithm": None}}, ["drafter.algorithm: got None", "takes eagle"]),
        ({"drafter": {"algorithm": "eagle3"}}, ["drafter.algorithm: got 'eagle3'", "not available", "takes eagle"]),
        ({"drafter": {"algorithm": "eagel"}}, ["drafter.algorithm: got 'eagel'", "Did you mean eagle?"]),
        ({"debug": {"fingerprint": 1}}, ["debug.fingerprint: got 1 (int)", "true or false"]),
        ({"debug": {"fingerprint": "yes"}}, ["debug.fingerprint: got 'yes' (str)", "true or false"]),
        ({"strategy": {"arms": "eagle:3x1@4"}}, ["strategy.arms: got 'eagle:3x1@4' (str)", "list of one or more"]),
        (
            {"strategy": {"arms": ["eagle:3x1@4", "off"], "tune": False}},
            ["strategy.tune: got False", "exactly one arm"],
        ),
        ({"tap": {"enable": 1}}, ["tap.enable: got 1 (int)", "true or false"]),
        ({"tap": {"buffer_gb": 0}}, ["tap.buffer_gb: got 0.0", "a number above 0"]),
        ({"tap": {"max_tokens_per_step": 1.5}}, ["tap.max_tokens_per_step: got 1.5 (float)", "above 0"]),
        ({"tap": {"max_tokens_per_step": True}}, ["tap.max_tokens_per_step: got True (bool)", "above 0"]),
        ({"drafter": {"hot_vocab": -1}}, ["drafter.hot_vocab: got -1", "a number of 0 or more, or null"]),
        ({"drafter": {"hot_vocab": 2048.0}}, ["drafter.hot_vocab: got 2048.0 (float)", "0 or more, or null"]),
        ({"drafter": {"hot_vocab": True}}, ["drafter.hot_vocab: got True (bool)", "0 or more, or null"]),
        ({"spot": {"enable": "on"}}, ["spot.enable: got 'on' (str)", "true or false"]),
        ({"spot": {"idle_ms": 0}}, ["spot.idle_ms: got 0.0", "a number above 0"]),
        ({"spot": {"yield_ms": -50}}, ["spot.yield_ms: got -50.0", "a number above 0"]),
        ({"spot": {"yield_ms": float("inf")}}, ["spot.yield_ms: got inf", "a number above 0"]),
        ({"spot": {"micro_batch_tokens": 0}}, ["spot.micro_batch_tokens: got 0", "a number above 0"]),
        ({"spot": {"micro_batch_tokens": 1.5}}, ["spot.micro_batch_tokens: got 1.5 (float)", "a number above 0"]),
        ({"spot": {"lr": float("nan")}}, ["spot.lr: got nan", "a number above 0"]),
        ({"spot": {"lr": "1e-3"}}, ["spot.lr: got '1e-3' (str)", "a number above 0"]),
        ({"spot": {"buffer_gb": 0.0}}, ["spot.buffer_gb: got 0.0", "a number above 0"]),
        ({"spot": {"enabled": True}}, ["spot.enabled: unknown key", f"Did you mean {PREFIX}.spot.enable?"]),
        ({"idle_ms": 100}, [f"{PREFIX}.idle_ms: unknown key", "Did you mean the option spot.idle_ms?"]),
        ({"gate": {"held_out": 0}}, ["gate.held_out: got 0.0", "above 0, below 1"]),
        ({"gate": {"held_out": 1.0}}, ["gate.held_out: got 1.0", "above 0, below 1"]),
        ({"gate": {"held_out": float("nan")}}, ["gate.held_out: got nan", "above 0, below 1"]),
        ({"gate": {"tokens": 0}}, ["gate.tokens: got 0", "a number above 0"]),
        ({"gate": {"every_s": 0}}, ["gate.every_s: got 0.0", "a number above 0"]),
        ({"gate": {"least": 0.9}}, ["gate.least: got 0.9", "1 or more"]),
        ({"gate": {"least": float("inf")}}, ["gate.least: got inf", "1 or more"]),
        ({"strategy": {"arms": [3]}}, ["strategy.arms: got [3] (list)", "a list of one or more"]),
        ({"strategy": {"arms": []}}, ["strategy.arms: got 0 arms", "one or more", "[off]"]),
        ({"strategy": {"arms": ["off", "eagle:3x1@4", "off"]}}, ["strategy.arms: got 'off' twice", "remove one"]),
        ({"strategy": {"arms": ["eagle:3x1@4", "eagle:03x1@4"]}}, ["strategy.arms: got 'eagle:03x1@4' twice"]),
        ({"strategy": {"arms": ["eagle-3"]}}, ["strategy.arms: got 'eagle-3'", "<num_steps>x<topk>", "or off"]),
        ({"strategy": {"arms": ["eagle:0x1@1"]}}, ["strategy.arms: got 'eagle:0x1@1'", "num_steps is 0"]),
        ({"strategy": {"arms": ["ngram:8x1@8"]}}, ["strategy.arms: got 'ngram:8x1@8'", "takes 9"]),
        ({"strategy": {"buckets": []}}, ["strategy.buckets: got []", "above 0, ascending"]),
        ({"strategy": {"buckets": [0, 1]}}, ["strategy.buckets: got [0, 1]", "above 0, ascending"]),
        ({"strategy": {"buckets": [2, 1]}}, ["strategy.buckets: got [2, 1]", "above 0, ascending"]),
        ({"strategy": {"buckets": [1, 1]}}, ["strategy.buckets: got [1, 1]", "above 0, ascending"]),
        ({"strategy": {"buckets": [1, 2.0]}}, ["strategy.buckets: got [1, 2.0] (list)", "ascending"]),
        ({"strategy": {"buckets": [True]}}, ["strategy.buckets: got [True] (list)", "ascending"]),
        ({"strategy": {"buckets": 8}}, ["strategy.buckets: got 8 (int)", "a list of whole numbers"]),
        ({"strategy": {"epsilon": -0.1}}, ["strategy.epsilon: got -0.1", "a number from 0 to 1"]),
        ({"strategy": {"epsilon": 1.5}}, ["strategy.epsilon: got 1.5", "a number from 0 to 1"]),
        ({"strategy": {"epsilon": float("nan")}}, ["strategy.epsilon: got nan", "a number from 0 to 1"]),
        ({"strategy": {"window": 0}}, ["strategy.window: got 0", "1 or more"]),
        ({"strategy": {"window": 2.5}}, ["strategy.window: got 2.5 (float)", "1 or more"]),
        ({"strategy": {"max_running_for_drafting": -1}}, ["max_running_for_drafting: got -1", "0 or more, or null"]),
        ({"strategy": {"max_running_for_drafting": "8"}}, ["max_running_for_drafting: got '8' (str)", "or null"]),
        ({"max_running": 8}, [f"{PREFIX}.max_running: unknown key"]),
        ({"strategy": {"arms": ["eagel:3x1@4"]}}, ["strategy.arms", "'eagel'", "eagle, ngram, off"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_taken(node, parts):
    text = message(node)
    assert all(part in text for part in parts), text


def test_an_accept_length_that_no_drafter_can_reach_is_refused_before_anything_starts():
    """One draft a verification makes two tokens at most: a gate that asks for more would never open."""
    text = message({"gate": {"least": 2.5}, "spot": {"enable": True}, "strategy": {"arms": ["eagle:1x1@2"]}})
    assert f"{PREFIX}.gate.least: got 2.5" in text
    arms = ["eagle:1x1@2", "ngram:8x1@9", "eagle:3x1@4"]
    assert load_config({"gate": {"least": 4}, "strategy": {"arms": arms}}).gate.least == 4, "the deepest can"
    text = message({"gate": {"least": 4.5}, "strategy": {"arms": arms}})
    assert "takes at most 4: eagle:3x1@4" in text


def test_an_interpolation_that_leads_nowhere_names_the_node():
    assert message(OmegaConf.create({"drafter": {"path": "${nowhere}"}})).startswith(f"{PREFIX}: cannot be read")


def test_the_prefix_is_the_callers():
    assert message({"debug": 1}, prefix="tlt").startswith("tlt.debug: got 1")


# --- strategies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["off", "eagle:3x1@4", "eagle:1x1@2", "eagle:1x8@9", "eagle:6x4@24", "ngram:8x1@9"])
def test_a_strategy_is_written_as_it_is_read(text):
    assert str(Strategy.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("eagle:3x0@4", "topk is 0"),
        ("eagle:3x1@3", "takes 4"),
        ("eagle:3x1@5", "takes 4"),
        ("eagle:3x2@3", "takes 4 to 11"),
        ("eagle:3x2@12", "takes 4 to 11"),
        ("eagle:3x2", "takes eagle:<num_steps>"),
        ("eagle:-3x2@4", "takes eagle:<num_steps>"),
        ("EAGLE:3x1@4", "takes eagle:<num_steps>"),
        ("off:1x1@2", "no numbers"),
        ("", "takes eagle:<num_steps>"),
    ],
)
def test_a_strategy_that_is_no_tree_is_refused(text, part):
    with pytest.raises(ConfigError, match=r"^got ") as error:
        Strategy.parse(text)
    assert part in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize(("num_steps", "topk"), [(1, 1), (1, 5), (3, 2), (4, 3)])
def test_the_largest_tree_is_counted_as_it_grows(num_steps, topk):
    sizes = [1, topk] + [topk * topk] * (num_steps - 1)  # the root, then what each step proposes
    assert Strategy("eagle", num_steps, topk, sum(sizes)).largest_tree == sum(sizes)


def test_a_strategy_is_a_value():
    assert Strategy.parse("eagle:3x1@4") == Strategy("eagle", 3, 1, 4)
    assert len({Strategy("off"), Strategy("off")}) == 1
