import random
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import arithmetic  # noqa: E402


def test_worked_solution_is_right_in_every_column():
    assert arithmetic.worked_solution(58, 67) == (
        "Column 1: 8 + 7 + 0 = 15, keep 5, carry 1\nColumn 2: 5 + 6 + 1 = 12, keep 2, carry 1\nAnswer: 125"
    )


def test_worked_solution_takes_addends_of_different_lengths():
    assert "Column 3: 9 + 0 + 0 = 9, keep 9, carry 0" in arithmetic.worked_solution(900, 5)


@pytest.mark.parametrize("held_out", [False, True])
def test_worked_solutions_of_drawn_problems_score_one(held_out):
    rng = random.Random(0)
    for _ in range(200):
        a, b = arithmetic.draw_problem(rng, held_out=held_out)
        assert len(str(a)) == len(str(b)) <= arithmetic.MAX_DIGITS
        assert arithmetic.is_held_out(a, b) == arithmetic.is_held_out(b, a) == held_out
        assert arithmetic.compute_score(arithmetic.DATA_SOURCE, arithmetic.worked_solution(a, b), str(a + b)) == 1.0


@pytest.mark.parametrize(
    ("solution", "score"),
    [
        ("Answer: 125", 1.0),
        ("anything\n\n  Answer: 125 \n\n", 1.0),
        ("Answer: 126\nAnswer: 125", 1.0),
        ("Answer: 125\nAnswer: 126", 0.0),
        ("Answer: 125.", 0.0),
        ("Answer: 0125", 0.0),
        ("Answer: 1,125", 0.0),
        ("Answer:125", 0.0),
        ("The Answer: 125", 0.0),
        ("125", 0.0),
        ("Column 1: 8 + 7 + 0 = 15, keep 5, carry 1\nColumn 2: 5 + 6", 0.0),
        ("", 0.0),
        ("\n \n", 0.0),
    ],
)
def test_only_the_required_final_line_scores(solution, score):
    assert arithmetic.compute_score(arithmetic.DATA_SOURCE, solution, "125", extra_info={"index": 0}) == score


def test_another_data_source_scores_zero():
    assert arithmetic.compute_score("chat/open", "Answer: ", "") == 0.0


def test_lengths_have_a_long_tail():
    rng = random.Random(1)
    lengths = [len(arithmetic.worked_solution(*arithmetic.draw_problem(rng))) for _ in range(4000)]
    median, p99 = np.percentile(lengths, [50, 99])
    assert p99 / median >= 5


def test_verl_finds_the_reward_by_path():
    from verl.utils import import_utils as utils

    score = utils.load_extern_object(module_path=str(SCRIPTS / "arithmetic.py"), object_name="compute_score")
    assert score(data_source=arithmetic.DATA_SOURCE, solution_str="Answer: 7", ground_truth="7", extra_info={}) == 1.0
