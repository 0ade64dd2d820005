"""The drafter: its layouts, checkpoints, and its making from a target. Knows neither verl nor sglang."""

from tlt_verl.drafter.check import check_drafter
from tlt_verl.drafter.eagle import HOT_TOKENS, DrafterError, check_target
from tlt_verl.drafter.from_target import is_untrained, make_drafter
from tlt_verl.drafter.prepare import prepare_drafter

__all__ = [
    "HOT_TOKENS",
    "DrafterError",
    "check_drafter",
    "check_target",
    "is_untrained",
    "make_drafter",
    "prepare_drafter",
]
