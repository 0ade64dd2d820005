"""What `tlt-verl warmup` is told, and whether it can be done; checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlt_verl.config import ConfigError, Strategy
from tlt_verl.drafter.eagle import check_target, read_config


@dataclass(frozen=True, kw_only=True)
class WarmupOptions:
    """Options of a warm-up.

    Args:
        target: folder of the target.
        prompts: parquet or JSON lines, see `read_prompts`.
        out: folder for the checkpoints `v<version>`, `latest`, `curve.csv` and `report.json`.
        minutes: wall time of everything, the engine's start and the last measurement included.
        tokens: stop when the trainer has learnt from so many tokens; None for no such bound.
        strategy: what is drafted when accept length is measured; a chain.
        hot_vocab: tokens that the draft head knows; None chooses from the rollouts, 0 keeps the whole vocabulary.
        batch: requests at a time.
        max_new_tokens, temperature: of the rollouts.
        held_out: prompts that are never rolled out for training, for the measurements in the engine.
        pack_tokens: rows of one training step.
        lr: of AdamW, behind its warm-up; it falls linearly to a twentieth.
        seed: of the split of the prompts, the engine and the trainer.
        device: `cpu` or `cuda`.
        dtype: of the target in the engine.
        engine: more arguments of `sglang.Engine`, by name; they win over those that the others imply.

    Raises:
        ConfigError: names the option, what it got and what it takes.
    """

    target: Path
    prompts: Path
    out: Path
    minutes: float = 10.0
    tokens: int | None = None
    strategy: str = "eagle:7x1@8"
    hot_vocab: int | None = None
    batch: int = 64
    max_new_tokens: int = 512
    temperature: float = 1.0
    held_out: int = 64
    pack_tokens: int = 1536
    lr: float = 1.5e-3
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("minutes", "batch", "max_new_tokens", "held_out", "pack_tokens", "lr"):
            if not getattr(self, name) > 0:
                raise self._refusal(name, "a number above 0")
        if self.tokens is not None and self.tokens <= 0:
            raise self._refusal("tokens", "a number above 0, or nothing for no bound")
        if self.hot_vocab is not None and self.hot_vocab < 0:
            raise self._refusal("hot_vocab", "a number of tokens, 0 for the whole vocabulary, or nothing to choose")
        if self.temperature < 0:
            raise self._refusal("temperature", "0 or more")
        if self.dtype not in ("bfloat16", "float32", "float16"):
            raise self._refusal("dtype", "bfloat16, float16 or float32")
        parsed = self.parsed_strategy()
        if parsed.drafter != "eagle" or parsed.topk != 1:
            raise self._refusal("strategy", "a chain, such as eagle:7x1@8: accept length is replayed along a chain")
        if not self.prompts.is_file():
            raise self._refusal("prompts", "a file that exists")
        if self.out.exists() and not self.out.is_dir():
            raise self._refusal("out", "a folder, or a name that is free")

    def parsed_strategy(self) -> Strategy:
        """The strategy.

        Raises:
            ConfigError: it is not one.
        """
        try:
            return Strategy.parse(self.strategy)
        except ConfigError as error:
            raise ConfigError(f"--strategy: {error}") from None

    def target_config(self) -> dict[str, Any]:
        """The target's `config.json`.

        Raises:
            DrafterError: there is none, or no drafter for such a target.
        """
        config = read_config(self.target, "--target")
        check_target(config, "--target")
        return config

    def _refusal(self, name: str, takes: str) -> ConfigError:
        return ConfigError(f"--{name.replace('_', '-')}: got {str(getattr(self, name))!r}, takes {takes}")
