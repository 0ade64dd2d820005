"""The task: adding two long numbers column by column, with a worked solution and a rule reward.

Knows how problems are drawn, how they are asked, what a worked solution looks like and what counts as right. Knows
nothing about tokenizers, models or files. The number of digits is log-normal, so the solutions' lengths have the long
tail that speculative rollouts are for: most problems take a few lines, a few take two dozen.

verl takes the reward from here: `reward.custom_reward_function.path=scripts/arithmetic.py`, `name=compute_score`. It
loads this file by path, without registering a module, so the file imports nothing of ours.
"""

import math
import random
import zlib

DATA_SOURCE = "arithmetic/addition"
MEDIAN_DIGITS = 3
SPREAD = 0.85  # sigma of ln(digits): p99 is exp(2.33 * 0.85) = 7 times the median; models cut corners on the longest
MAX_DIGITS = 24
ANSWER_PREFIX = "Answer: "


def draw_problem(rng: random.Random, *, held_out: bool = False) -> tuple[int, int]:
    """Two addends with one log-normal number of digits, 1 to `MAX_DIGITS`; held-out problems only, or others only."""
    while True:
        digits = round(rng.lognormvariate(math.log(MEDIAN_DIGITS), SPREAD))
        digits = min(MAX_DIGITS, max(1, digits))
        low, high = 10 ** (digits - 1), 10**digits
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        if is_held_out(a, b) == held_out:
            return a, b


def is_held_out(a: int, b: int) -> bool:
    """True for one problem in eight, whatever the order of the addends: those are for tests, all others for training.

    A property of the problem, not of a draw: the one-digit problems are so few that sets drawn apart would overlap.
    """
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 8 == 0


def question(a: int, b: int) -> str:
    """What the user asks; it states the final form that `compute_score` requires."""
    return f"What is {a} + {b}? Work column by column from the right and end with the line '{ANSWER_PREFIX}<sum>'."


def worked_solution(a: int, b: int) -> str:
    """One line a column, from the right, then the answer in the form that `compute_score` requires."""
    columns = max(len(str(a)), len(str(b)))
    lines, carry = [], 0
    for column in range(columns):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        lines.append(f"Column {column + 1}: {x} + {y} + {carry} = {total}, keep {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"{ANSWER_PREFIX}{a + b}"])


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info=None, **kwargs) -> float:
    """1.0 if the last non-blank line is exactly `Answer: N` with N the ground truth in plain digits, else 0.0.

    Blanks around that line are ignored. Anything else is wrong: a sum with separators or leading zeros, text after it,
    an answer that is not on the last line, a response cut off before it. The columns are not checked. Rows of another
    data source (the chat set, which has no truth) score 0.0.
    """
    if data_source != DATA_SOURCE or not solution_str.strip():
        return 0.0
    last_line = solution_str.strip().splitlines()[-1].strip()
    return float(last_line == f"{ANSWER_PREFIX}{ground_truth}")
