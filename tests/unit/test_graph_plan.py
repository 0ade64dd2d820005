"""The plan of captured graphs: covers what the tuner can choose, and no more; SGLang's formulas, against SGLang."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest
from sglang.srt.mem_cache.allocation_sizing import get_alloc_len_per_decode
from sglang.srt.server_args import ServerArgs

from tlt_verl.config import StrategyConfig
from tlt_verl.engine.graph_plan import (
    DRAFT,
    EXTEND,
    VERIFY,
    GraphPlan,
    ModelSizes,
    captures_of_everything,
    estimate,
    keys_of,
    largest,
    reserved_tokens,
    sglang_batch_sizes,
    up_to,
)
from tlt_verl.engine.tuner import Tuner
from tlt_verl.strategy import OFF, Strategy

ARMS = ("eagle:2x1@3", "eagle:4x1@5", "ngram:4x1@5", "eagle:1x1@2", "eagle:4x2@8", "ngram:7x2@8", "eagle:6x4@24")
STRATEGIES = tuple(map(Strategy.parse, ARMS))
SIZES = sglang_batch_sizes(256)
BOUNDS = (None, 0, 1, 7, 8, 9, 33, 64, 256, 300)
QWEN = ModelSizes(hidden=3584, intermediate=18944, layers=28, vocab=152064, context=32768, tp_size=2)


def random_strategies(rng: random.Random) -> tuple[Strategy, ...]:
    found = []
    for _ in range(rng.randint(1, 6)):
        steps, topk = rng.randint(1, 8), rng.choice((1, 1, 2, 4, 8))
        full = Strategy("eagle", steps, topk, steps + 1).largest_tree
        found.append(Strategy(rng.choice(("eagle", "ngram")), steps, topk, rng.randint(steps + 1, min(full, 64))))
    return tuple(found)


SETS = (STRATEGIES, (OFF,), *(random_strategies(random.Random(seed)) for seed in range(30)))


# --- what is captured


@pytest.mark.parametrize("bound", BOUNDS)
def test_whatever_the_tuner_can_choose_is_covered(bound):
    """Every strategy at every batch size that it may run at has the graphs of its kinds and shapes."""
    for strategies in SETS:
        plan = GraphPlan(strategies, SIZES, bound)
        for strategy, batch_size in itertools.product(plan.strategies, range(1, SIZES[-1] + 1)):
            if strategy != OFF and bound is not None and batch_size > bound:
                continue
            for key in keys_of(strategy):
                assert plan.sizes(*key) and plan.sizes(*key)[-1] >= batch_size, f"{strategy} at {batch_size}: {key}"


def test_the_tuner_chooses_nothing_that_is_not_covered():
    """The tuner itself, at random batch sizes; each of its strategies is the fast one in turn."""
    config = StrategyConfig(arms=list(ARMS), max_running_for_drafting=20)
    plan, chosen = GraphPlan(STRATEGIES, SIZES, 20), set()
    for fast in plan.strategies:
        rng = random.Random(0)
        tuner = Tuner.from_config(config, rng)
        for _ in range(1000):
            batch_size = rng.randint(1, 40)
            strategy = tuner.choose(batch_size)
            chosen.add(strategy)
            assert all(max(plan.sizes(*key), default=0) >= batch_size for key in keys_of(strategy))
            tuner.observe(strategy, batch_size, [1] * batch_size, 0.1 if strategy == fast else 1.0)
    assert OFF in chosen and len(chosen) > 2


@pytest.mark.parametrize("bound", BOUNDS)
def test_nothing_is_captured_twice(bound):
    for strategies in SETS:
        captures = GraphPlan(strategies, SIZES, bound).captures
        assert len({capture.key for capture in captures}) == len(captures)
        assert all(len(set(capture.batch_sizes)) == len(capture.batch_sizes) for capture in captures)


@pytest.mark.parametrize("bound", BOUNDS)
def test_nothing_is_captured_that_no_strategy_reaches(bound):
    """A graph of a batch size is reached by some batch between the next smaller size and itself."""
    for strategies in SETS:
        plan = GraphPlan(strategies, SIZES, bound)
        for capture in plan.captures:
            users = [strategy for strategy in plan.strategies if capture.key in keys_of(strategy)]
            most = SIZES[-1] if OFF in users else min(SIZES[-1], SIZES[-1] if bound is None else bound)
            smaller = (0, *capture.batch_sizes)
            assert users and all(below < most for below, _ in zip(smaller, capture.batch_sizes, strict=False))


def test_verifications_of_one_width_are_shared_and_trees_are_not_chains():
    plan = GraphPlan(map(Strategy.parse, ["eagle:4x1@5", "ngram:4x1@5", "eagle:2x2@5"]), SIZES, 64)
    assert [str(capture) for capture in plan.captures] == [
        "verify width=1 tree=0",
        "verify width=5 tree=0",
        "draft steps=4 topk=1 width=5",
        "extend width=5",
        "verify width=5 tree=1",
        "draft steps=2 topk=2 width=5",
    ]
    everything = captures_of_everything(plan.strategies, SIZES)
    assert len(everything) == 8 and all(capture.batch_sizes == SIZES for capture in everything)


def test_model_free_strategies_need_verification_alone():
    plan = GraphPlan([Strategy.parse("ngram:7x2@8")], SIZES)
    assert {capture.kind for capture in plan.captures} == {VERIFY}


def test_one_step_of_drafts_needs_no_draft_graph():
    """SGLang's extend proposes the first step's drafts (`EagleDraftWorker._capture_cuda_graphs`)."""
    assert [kind for kind, _ in keys_of(Strategy.parse("eagle:1x1@2"))] == [VERIFY, EXTEND]


def test_widths():
    tokens = {(c.kind, c.shape): c.tokens_per_request for c in GraphPlan(STRATEGIES, SIZES).captures}
    assert tokens[VERIFY, (1, 0)] == 1 and tokens[VERIFY, (24, 1)] == 24
    assert tokens[DRAFT, (6, 4, 24)] == 4 and tokens[EXTEND, (24,)] == 24


def test_off_has_every_batch_size_and_the_others_up_to_the_bound():
    plan = GraphPlan(STRATEGIES, SIZES, 33)
    for capture in plan.captures:
        assert capture.batch_sizes == (SIZES if capture.shape == (1, 0) else up_to(SIZES, 33))
    assert up_to(SIZES, 33)[-1] == 40


def test_without_graphs_nothing_is_captured():
    plan = GraphPlan(STRATEGIES, ())
    assert plan.captures == () and plan.logits_rows == 0 and plan.with_own(STRATEGIES[0]) == ()


def test_sglangs_own_captures_follow_the_plan_or_are_as_few_as_may_be():
    plan = GraphPlan(STRATEGIES, SIZES, 8)
    assert plan.sizes_of_own(Strategy.parse("eagle:6x4@24"), VERIFY) == tuple(range(1, 9))
    assert plan.sizes_of_own(Strategy.parse("eagle:7x4@30"), VERIFY) == (1,)
    assert plan.with_own(Strategy.parse("eagle:6x4@24")) == plan.captures
    extra = plan.with_own(Strategy.parse("eagle:7x4@30"))[len(plan.captures) :]
    assert [(c.kind, c.batch_sizes) for c in extra] == [(VERIFY, (1,)), (DRAFT, (1,)), (EXTEND, (1,))]


@pytest.mark.parametrize("most", [1, 5, 8, 9, 31, 64, 100, 160, 256, 257, 300, 512])
def test_batch_sizes_are_sglangs(most):
    arguments = sglang_arguments(1, 1, 2, page_size=1)
    assert sglang_batch_sizes(most) == tuple(arguments._generate_decode_cuda_graph_batch_sizes(most))


# --- what SGLang reserves


def sglang_arguments(steps: int, topk: int, width: int, page_size: int) -> ServerArgs:
    """SGLang's arguments with the fields that its formulas read; not resolved, which would want a model."""
    arguments = ServerArgs.__new__(ServerArgs)
    vars(arguments).update(
        speculative_algorithm="EAGLE",
        speculative_num_steps=steps,
        speculative_eagle_topk=topk,
        speculative_num_draft_tokens=width,
        speculative_adaptive=False,
        disable_cuda_graph_padding=False,
        page_size=page_size,
    )
    return arguments


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_largest_reserves_enough_for_every_strategy(page_size):
    """By SGLang's own formula: what it reserves under `largest` is no less than under any of the strategies."""
    for strategies in SETS:
        own = largest(strategies, page_size)
        reserved = get_alloc_len_per_decode(sglang_arguments(*own, page_size))
        assert reserved == reserved_tokens(*own, page_size)
        for s in strategies:
            if s.drafter == "eagle":
                needed = get_alloc_len_per_decode(sglang_arguments(s.num_steps, s.topk, s.num_draft_tokens, page_size))
            else:
                needed = max(s.num_draft_tokens, 1)
            assert reserved >= needed, f"{s} under {own}"


def test_largest_is_a_tree_that_can_be_drafted():
    for strategies in SETS:
        Strategy("eagle", *largest(strategies))  # raises where it is none


def test_largest_is_one_of_the_strategies_where_one_is_deepest_and_widest():
    assert largest(STRATEGIES) == (6, 4, 24)
    assert largest([Strategy.parse("ngram:7x1@8")]) == (7, 1, 8)
    assert largest([OFF]) == (1, 1, 2)


# --- memory


def test_more_captures_take_more_memory():
    totals = [estimate(GraphPlan(STRATEGIES, SIZES, bound).captures, QWEN).total for bound in (0, 1, 8, 32, 64, 256)]
    assert totals == sorted(set(totals))
    fewer = [estimate(GraphPlan(STRATEGIES[:count], SIZES, 64).captures, QWEN).total for count in range(8)]
    assert fewer == sorted(fewer)
    everything = estimate(captures_of_everything(STRATEGIES, SIZES), QWEN)
    assert everything.total > estimate(GraphPlan(STRATEGIES, SIZES).captures, QWEN).total == totals[-1]


@pytest.mark.parametrize("size", ["hidden", "layers", "vocab", "context", "draft_layers", "dtype_bytes"])
def test_larger_models_take_more_memory(size):
    captures = GraphPlan(STRATEGIES, SIZES, 64).captures
    larger = ModelSizes(**(vars(QWEN) | {size: 2 * getattr(QWEN, size)}))
    assert estimate(captures, larger).total > estimate(captures, QWEN).total


def test_an_estimate_by_hand():
    """One verify graph of 2 requests of 3 tokens, hidden 4, MLP 8, vocabulary 10, context 16, one layer, one device."""
    (capture,) = captures_of_everything([], [2])
    assert capture.shape == (1, 0)
    plan = GraphPlan([Strategy.parse("ngram:2x1@3")], [2])
    chain = next(capture for capture in plan.captures if capture.shape == (3, 0))
    memory = estimate([chain], ModelSizes(hidden=4, intermediate=8, layers=1, vocab=10, context=16))
    assert memory.outputs == 6 * 4 * 2
    assert memory.activations == 6 * (3 * 8 + 2 * 4) * 2  # the MLP; a head of ten tokens takes less
    assert memory.buffers == 4 * 2 * 16 * 4 + 6 * 4 * 2
    assert memory.logits == 6 * 10 * 4
    assert memory.nodes == 20 * 4096 + 2**20 // 10
    assert memory.total == sum(vars(memory).values())


def test_a_hot_vocabulary_takes_a_smaller_buffer_of_its_own():
    captures = GraphPlan([Strategy.parse("eagle:4x1@5")], SIZES, 64).captures
    hot = estimate(captures, ModelSizes(**(vars(QWEN) | {"draft_vocab": 32000})))
    assert hot.logits == 64 * 5 * (152064 + 32000) * 4
    assert hot.activations < estimate(captures, QWEN).activations


def test_the_plan_needs_neither_torch_nor_sglang():
    """verl's side imports it too. In a process of its own, where nothing else has been imported."""
    code = "import sys, tlt_verl.engine.graph_plan; print({'torch', 'sglang', 'verl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
