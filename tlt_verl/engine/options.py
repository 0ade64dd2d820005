"""What the processes of one engine are told beside SGLang's own arguments.

SGLang spawns its schedulers and gives them its arguments alone; these options travel in the environment. Whoever starts
the engine calls `EngineOptions.export`, the scheduler reads them back. Knows neither SGLang nor verl.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from tlt_verl.config import Strategy, StrategyConfig

ENVIRONMENT = "TLT_ENGINE_OPTIONS"
TUNER_FILE = "tuner.json"
"""In the folder of publications: what the tuner has learnt, written and read on command."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of one engine; the defaults are those of a bare `sglang.launch_server`.

    Args:
        tap: name of the ring of segments that each scheduler writes (its process id is appended), or None for no tap.
        tap_bytes: size of that ring.
        tap_tokens_per_step: most tokens that are written between two updates of the policy.
        publications: folder whose sub-folders `v<version>` hold the drafters that may be published; or None.
        board: file of the replica's board, on which the scheduler says whether it is busy; or None.
        draft_untrained: draft with a drafter that was made from the target and never trained.
        strategy: the options of `StrategyConfig` by name; {} runs the one strategy that SGLang's arguments describe.
        choose_at_random: every step runs another of the strategies: a test of what must not depend on them.
        seed: of the choices.
    """

    tap: str | None = None
    tap_bytes: int = 256 << 20
    tap_tokens_per_step: int = 65536
    publications: str | None = None
    board: str | None = None
    draft_untrained: bool = False
    strategy: dict[str, Any] = dataclasses.field(default_factory=dict)
    choose_at_random: bool = False
    seed: int = 0

    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies that may run beside `off`; none where SGLang's arguments decide."""
        return StrategyConfig(**self.strategy).parsed() if self.strategy else ()

    @property
    def is_fixed(self) -> bool:
        """Whether one strategy runs always."""
        return not self.choose_at_random and not (self.strategy and StrategyConfig(**self.strategy).tune)

    def export(self, environment: dict[str, str] | None = None) -> None:
        """Write the options to `environment` (default: this process's own), for the processes that it starts."""
        target = os.environ if environment is None else environment
        target[ENVIRONMENT] = json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_environment(cls) -> EngineOptions:
        """The options that this process was started with.

        Raises:
            ValueError: the variable holds something else; names what it holds.
        """
        text = os.environ.get(ENVIRONMENT, "{}")
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            takes = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ValueError(f"{ENVIRONMENT}: got {text!r}, takes a JSON object with the keys {takes}") from error
