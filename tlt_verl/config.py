"""Every option of the plugin: its type, its default, what it means and what it takes. The one place of defaults.

The options live in verl's configuration under `actor_rollout_ref.rollout.custom.tlt`. This module reads that node and
nothing else: it knows neither verl nor sglang nor torch, loads no model and touches no file, so a mistake is reported
before anything is started. Only options that code reads are here.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tlt_verl.strategy import ConfigError, Strategy

PREFIX = "actor_rollout_ref.rollout.custom.tlt"

ALGORITHMS = ("eagle",)
"""The drafters' algorithms that this version runs."""


def _about(help: str, takes: str) -> dict[str, str]:
    """The metadata of an option: what it means, and what it takes (the error message's last words)."""
    return {"help": help, "takes": takes}


@dataclass
class DrafterConfig:
    """Which drafter proposes tokens."""

    path: str | None = field(
        default=None,
        metadata=_about(
            "A drafter in SGLang's EAGLE format; it is checked against the target. null: one is made from the target.",
            "a path of a folder, or null",
        ),
    )
    algorithm: str = field(
        default="eagle",
        metadata=_about("The drafter's architecture and layout.", ", ".join(ALGORITHMS)),
    )
    hot_vocab: int | None = field(
        default=None,
        metadata=_about(
            "Tokens that a drafter trained in the run drafts from. null: as many as the rollouts need; 0: all.",
            "a number of 0 or more, or null",
        ),
    )


@dataclass
class StrategyConfig:
    """How much is drafted, and how the strategy of a batch is found."""

    arms: list[str] = field(
        default_factory=lambda: ["eagle:3x1@4", "eagle:7x1@8", "ngram:3x1@4", "ngram:7x1@8"],
        metadata=_about(
            "The strategies that may be used; which one is used at which batch size is measured. off is always one.",
            f"a list of one or more strategies, each once: {Strategy.TAKES}",
        ),
    )
    tune: bool = field(
        default=True,
        metadata=_about(
            "Find out which strategy is fastest at each batch size. false: the only arm runs always.",
            "true, or false with exactly one arm",
        ),
    )
    buckets: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64],
        metadata=_about(
            "Batch sizes up to each of these share what is learnt; above the last one there is one bucket more.",
            "a list of whole numbers above 0, ascending",
        ),
    )
    epsilon: float = field(
        default=0.1,
        metadata=_about(
            "How often a strategy that may be better than the best known one is tried again. 0: each is tried once.",
            "a number from 0 to 1",
        ),
    )
    window: int = field(
        default=16,
        metadata=_about(
            "Observations of a strategy in a bucket whose median counts; each is of a few steps.",
            "a whole number of 1 or more",
        ),
    )
    max_running_for_drafting: int | None = field(
        default=None,
        metadata=_about(
            "Nothing is drafted, nor tried, while more requests than this run. null: whatever is faster.",
            "a whole number of 0 or more, or null",
        ),
    )

    def parsed(self) -> tuple[Strategy, ...]:
        """The arms as strategies, in their order."""
        return tuple(Strategy.parse(text) for text in self.arms)


@dataclass
class TapConfig:
    """What of the rollouts is recorded for training the drafter."""

    enable: bool = field(
        default=False,
        metadata=_about(
            "Record the hidden states of prompts and responses in shared memory, from where a drafter is trained.",
            "true or false",
        ),
    )
    buffer_gb: float = field(
        default=0.25,
        metadata=_about(
            "Size of each scheduler's ring in /dev/shm, in GiB. What is not read in time is overwritten, oldest first.",
            "a number above 0",
        ),
    )
    max_tokens_per_step: int = field(
        default=65536,
        metadata=_about(
            "Most tokens that a scheduler records between two syncs of the policy; the second half of them is kept for "
            "long responses.",
            "a number above 0",
        ),
    )


@dataclass
class SpotConfig:
    """How the drafter is trained on devices that stand idle."""

    enable: bool = field(
        default=True,
        metadata=_about("Train the drafter while a replica's device is idle. Turns the tap on.", "true or false"),
    )
    idle_ms: float = field(
        default=100.0,
        metadata=_about("How long a device must have been idle before training begins.", "a number above 0"),
    )
    yield_ms: float = field(
        default=50.0,
        metadata=_about("Longest time in which a device is given back; micro-steps are cut to it.", "a number above 0"),
    )
    micro_batch_tokens: int = field(
        default=2048,
        metadata=_about("Most tokens of a micro-step, whatever yield_ms allows.", "a number above 0"),
    )
    lr: float = field(default=5.0e-4, metadata=_about("AdamW's learning rate.", "a number above 0"))
    buffer_gb: float = field(
        default=1.0,
        metadata=_about("Host memory for segments in each spot worker, in GiB.", "a number above 0"),
    )


@dataclass
class GateConfig:
    """What a trained drafter must show before it serves."""

    held_out: float = field(
        default=0.1,
        metadata=_about("Share of the prompts on which the drafter is judged and never trained.", "above 0, below 1"),
    )
    tokens: int = field(
        default=2000,
        metadata=_about("Most held-out tokens that one judgement takes.", "a number above 0"),
    )
    every_s: float = field(
        default=1.0,
        metadata=_about(
            "Training time between two judgements of one worker, in seconds; never less than twice what the last one "
            "took.",
            "a number above 0",
        ),
    )
    least: float = field(
        default=2.0,
        metadata=_about("Accept length that the first drafter must reach, where nothing is drafted yet.", "1 or more"),
    )


@dataclass
class DebugConfig:
    """Checks that cost time and change nothing."""

    fingerprint: bool = field(
        default=False,
        metadata=_about(
            "After each weight sync, compare a fingerprint of every target tensor in the engine with the policy's "
            "export.",
            "true or false",
        ),
    )


@dataclass
class TLTConfig:
    """All options. `OmegaConf.structured(TLTConfig)` is the schema with its defaults."""

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    tap: TapConfig = field(default_factory=TapConfig)
    spot: SpotConfig = field(default_factory=SpotConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def options(cls: type = TLTConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option's dotted key below the prefix, and its dataclass field (`metadata` has `help` and `takes`)."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from options(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def load_config(node: Mapping[str, Any] | DictConfig | None, prefix: str = PREFIX) -> TLTConfig:
    """Read and validate the options. None, and an empty section, mean the defaults.

    Args:
        node: what stands under `prefix` in the configuration.
        prefix: the node's full key, for the messages.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value that this version does not take.
    """
    config = _build(TLTConfig, _plain(node, prefix), prefix)
    _check_algorithm(config.drafter.algorithm, f"{prefix}.drafter.algorithm")
    _check_strategy(config.strategy, f"{prefix}.strategy")
    for section, names in _ABOVE_ZERO.items():
        for name in names:
            _check_above_zero(getattr(config, section), name, f"{prefix}.{section}")
    _check_range(config.drafter, "hot_vocab", f"{prefix}.drafter", lambda size: size is None or size >= 0)
    _check_range(config.gate, "held_out", f"{prefix}.gate", lambda share: 0 < share < 1)
    _check_range(config.gate, "least", f"{prefix}.gate", lambda accept_len: 1 <= accept_len < float("inf"))
    _check_least(config, f"{prefix}.gate.least")
    return config


_ABOVE_ZERO = {
    "tap": ("buffer_gb", "max_tokens_per_step"),
    "spot": ("idle_ms", "yield_ms", "micro_batch_tokens", "lr", "buffer_gb"),
    "gate": ("tokens", "every_s"),
}


def _plain(node: Any, key: str) -> Any:
    """`node` without omegaconf's containers, interpolations resolved."""
    if not isinstance(node, Mapping):
        return node
    try:
        config = node if isinstance(node, DictConfig) else OmegaConf.create(dict(node))
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: cannot be read: {error}") from error


_Section = TypeVar("_Section")


def _build(cls: type[_Section], node: Any, key: str) -> _Section:
    """An instance of the section `cls` from plain containers."""
    if node is None:
        return cls()
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}: got {node!r}, takes a section with the keys {', '.join(_names(cls))}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in node.items():
        if name not in _names(cls):
            raise ConfigError(_unknown(cls, str(name), value, key))
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{key}.{name}")
        else:
            values[name] = _typed(_field(cls, name), hints[name], value, f"{key}.{name}")
    return cls(**values)


def _names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(item for item in dataclasses.fields(cls) if item.name == name)


def _unknown(cls: type, name: str, value: Any, key: str) -> str:
    """The message for an unknown key: a near miss in its section first, then anywhere."""
    message = f"{key}.{name}: unknown key (got {value!r}); {key} takes {', '.join(_names(cls))}."
    if near := difflib.get_close_matches(name, _names(cls), n=1):
        return f"{message} Did you mean {key}.{near[0]}?"
    leaves = {dotted.rpartition(".")[2]: dotted for dotted, _ in options()}
    if near := difflib.get_close_matches(name, leaves, n=1):
        return f"{message} Did you mean the option {leaves[near[0]]}?"
    return message


def _typed(item: dataclasses.Field, hint: Any, value: Any, key: str) -> Any:
    """`value` if it has exactly the option's type: a number is not a string here, and 1 is not true."""
    if hint == list[str]:
        # YAML 1.1 reads an unquoted off as false: in a list of strategies it can mean nothing else
        value = ["off" if entry is False else entry for entry in value] if isinstance(value, list | tuple) else value
        fits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    elif hint == list[int]:
        value = list(value) if isinstance(value, tuple) else value
        fits = isinstance(value, list) and all(type(entry) is int for entry in value)
    else:
        value = float(value) if hint is float and type(value) is int else value
        fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    if not fits or value == "":
        raise ConfigError(f"{key}: got {value!r} ({type(value).__name__}), takes {item.metadata['takes']}")
    return value


def _check_algorithm(value: str, key: str) -> None:
    if value == "eagle3":
        raise ConfigError(f"{key}: got 'eagle3', which is not available in this version; takes {', '.join(ALGORITHMS)}")
    if value not in ALGORITHMS:
        near = difflib.get_close_matches(value, ALGORITHMS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}: got {value!r}, takes {', '.join(ALGORITHMS)}.{hint}")


def _check_above_zero(section: Any, name: str, key: str) -> None:
    _check_range(section, name, key, lambda value: 0 < value < float("inf"))


def _check_range(section: Any, name: str, key: str, fits: Callable[[Any], bool]) -> None:
    value = getattr(section, name)
    if not fits(value):
        raise ConfigError(f"{key}.{name}: got {value!r}, takes {_field(type(section), name).metadata['takes']}")


def _check_least(config: TLTConfig, key: str) -> None:
    """What no drafter can reach would keep every drafter from serving."""
    drafting = [strategy for strategy in config.strategy.parsed() if strategy.drafter == "eagle"]
    deepest = max(drafting, key=lambda strategy: strategy.num_steps, default=None)
    if deepest is not None and config.gate.least > deepest.num_steps + 1:
        raise ConfigError(
            f"{key}: got {config.gate.least}, takes at most {deepest.num_steps + 1}: {deepest} drafts "
            f"{deepest.num_steps} tokens and the target adds one"
        )


def _check_strategy(section: StrategyConfig, key: str) -> None:
    _check_arms(section.arms, f"{key}.arms")
    _check_range(section, "tune", key, lambda tune: tune or len(section.arms) == 1)
    _check_range(section, "buckets", key, lambda edges: edges and edges[0] > 0 and edges == sorted(set(edges)))
    _check_range(section, "epsilon", key, lambda epsilon: 0 <= epsilon <= 1)
    _check_range(section, "window", key, lambda window: window >= 1)
    _check_range(section, "max_running_for_drafting", key, lambda most: most is None or most >= 0)


def _check_arms(arms: list[str], key: str) -> None:
    if not arms:
        raise ConfigError(f"{key}: got 0 arms; takes one or more, such as [eagle:3x1@4], or [off] for no speculation")
    found: list[Strategy] = []
    for text in arms:
        try:
            strategy = Strategy.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        if strategy in found:
            raise ConfigError(f"{key}: got {text!r} twice in {arms}; takes each strategy once: remove one")
        found.append(strategy)
