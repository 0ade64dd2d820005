"""The arguments under which graphs are captured, as the functions of SGLang read them that decide a graph's shape.

Graphs themselves need a GPU. What is seen here is that an arm's shape and batch sizes reach where SGLang reads them: it
keeps its arguments twice, and its own override changes the other copy.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config
from sglang.srt.model_executor.runner import get_batch_sizes_to_capture
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.speculative.spec_utils import resolve_num_tokens_per_req

from tlt_verl.engine.arms import _arguments

SIZES = list(range(1, 9)) + list(range(10, 33, 2))


@pytest.fixture
def runner():
    """What SGLang's functions read of a model runner: the published arguments, read-only, and its pool's size."""
    graphs = default_cuda_graph_config()
    graphs.decode.bs, graphs.decode.max_bs = SIZES, SIZES[-1]
    own = get_context().override_server_args(
        cuda_graph_config=graphs,
        speculative_num_steps=6,
        speculative_eagle_topk=4,
        speculative_num_draft_tokens=24,
    )
    with own as arguments, get_parallel().override(attn_tp_size=1, attn_cp_size=1):
        yield SimpleNamespace(server_args=arguments, req_to_token_pool=SimpleNamespace(size=30))


def widths(runner):
    return [
        resolve_num_tokens_per_req(phase=p, server_args=runner.server_args) for p in ("draft_decode", "draft_extend")
    ]


def captured(runner):
    return get_batch_sizes_to_capture(runner)[0]


def test_a_runner_reads_the_arms_shape_and_batch_sizes(runner):
    before = captured(runner)
    assert widths(runner) == [4, 24] and before == SIZES[:-1]
    changes = {"speculative_eagle_topk": 1, "speculative_num_steps": 4, "speculative_num_draft_tokens": 5}
    with _arguments([runner], (1, 2, 3), **changes):
        assert widths(runner) == [1, 5] and captured(runner) == [1, 2, 3]
        assert runner.server_args.speculative_num_steps == 4
    assert widths(runner) == [4, 24] and captured(runner) == before


def test_sglangs_override_alone_reaches_neither_widths_nor_batch_sizes(runner):
    """What its own adaptive speculation relies on; should SGLang come to read this copy, `_arguments` can go."""
    get_context().override("test", speculative_eagle_topk=1, speculative_num_draft_tokens=5, cuda_graph_bs_decode=[1])
    assert widths(runner) == [4, 24] and captured(runner) == SIZES[:-1]


def test_sglangs_own_arguments_are_not_touched(runner):
    """They are read-only, and other parts of SGLang hold the same object."""
    own = runner.server_args
    said = dict(vars(own))
    with _arguments([runner], (1, 2), speculative_eagle_topk=1):
        assert vars(own) == said and own.cuda_graph_config.decode.bs == SIZES
        with pytest.raises(AttributeError, match="read-only"):
            runner.server_args.speculative_eagle_topk = 2
    assert runner.server_args is own


def test_without_batch_sizes_the_captured_ones_stay(runner):
    """Where an arm's graphs are not captured, nothing reads the batch sizes; SGLang takes no empty list."""
    with _arguments([runner], (), speculative_eagle_topk=1):
        assert captured(runner) == SIZES[:-1]


def test_the_arguments_come_back_after_a_failure(runner):
    own = runner.server_args
    with pytest.raises(RuntimeError, match="out of memory"), _arguments([runner], (1,)):
        raise RuntimeError("out of memory")
    assert runner.server_args is own
