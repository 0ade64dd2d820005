"""How one batch is drafted, as a value: what it is written as, and what it may be. Knows no engine and no option."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar


class ConfigError(ValueError):
    """An option that cannot be used. The message names the full key, the value it got, and what it takes."""


@dataclass(frozen=True)
class Strategy:
    """How one batch is drafted, written `<drafter>:<num_steps>x<topk>@<num_draft_tokens>` or `off`.

    Args:
        drafter: `eagle` (the trained drafter), `ngram` (model-free) or `off` (no speculation; the numbers are 0).
        num_steps: depth of the tree of drafts; the drafter runs this many times for one verification.
        topk: branches that each drafted token is followed by; 1 drafts a chain.
        num_draft_tokens: tokens that the target verifies at once, the last accepted one (the root) included.

    Raises:
        ConfigError: the numbers do not describe a tree.
    """

    DRAFTERS: ClassVar[tuple[str, ...]] = ("eagle", "ngram", "off")
    TAKES: ClassVar[str] = (
        "eagle:<num_steps>x<topk>@<num_draft_tokens>, for instance eagle:3x1@4, ngram:<num_steps>x<topk>@"
        "<num_draft_tokens>, or off"
    )

    drafter: str
    num_steps: int = 0
    topk: int = 0
    num_draft_tokens: int = 0

    def __post_init__(self) -> None:
        if problem := self._problem():
            written = f"{self.drafter}:{self.num_steps}x{self.topk}@{self.num_draft_tokens}"
            raise ConfigError(f"got {written!r}: {problem}")

    def __str__(self) -> str:
        if self.drafter == "off":
            return "off"
        return f"{self.drafter}:{self.num_steps}x{self.topk}@{self.num_draft_tokens}"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """The strategy that `str` would write as `text`.

        Raises:
            ConfigError: `text` is not of that form, or its numbers do not describe a tree.
        """
        if text == "off":
            return cls("off")
        match = re.fullmatch(r"([a-z]+):(\d+)x(\d+)@(\d+)", text)
        if match is None:
            raise ConfigError(f"got {text!r}: takes {cls.TAKES}")
        return cls(match[1], int(match[2]), int(match[3]), int(match[4]))

    @property
    def largest_tree(self) -> int:
        """Tokens in the full tree: the root, topk at the first step, topk² at each later one."""
        return 1 + self.topk + (self.num_steps - 1) * self.topk**2

    def _problem(self) -> str | None:
        """What is wrong with the numbers, or None."""
        if self.drafter not in self.DRAFTERS:
            return f"drafter {self.drafter!r}; takes one of {', '.join(self.DRAFTERS)}"
        if self.drafter == "off":
            return "off has no numbers" if (self.num_steps, self.topk, self.num_draft_tokens) != (0, 0, 0) else None
        if self.num_steps < 1:
            return f"num_steps is {self.num_steps}; takes 1 or more (write off for no speculation)"
        if self.topk < 1:
            return f"topk is {self.topk}; takes 1 or more"
        low, high = self.num_steps + 1, self.largest_tree
        if not low <= self.num_draft_tokens <= high:
            takes = f"{low}, as a chain drafts one token a step" if low == high else f"{low} to {high}"
            return f"num_draft_tokens is {self.num_draft_tokens}; {self.num_steps}x{self.topk} takes {takes}"
        return None


OFF = Strategy("off")
"""Plain decoding."""
