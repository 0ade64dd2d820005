"""Engines and models that several files of tests share."""

from __future__ import annotations

import pytest
from shape_engines import SHAPES, Engine, run_shape
from shared_models import greedy_target
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def greedy_models(tmp_path_factory):
    """The folder with `target` and `drafter`."""
    return greedy_target(tmp_path_factory)


@pytest.fixture(scope="session")
def model(greedy_models):
    """The target in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(greedy_models / "target").float().eval()


@pytest.fixture(scope="session", params=list(SHAPES))
def engine(request, greedy_models, tmp_path_factory) -> Engine:
    """What came of the engine of one shape."""
    return run_shape(request.param, greedy_models, tmp_path_factory.mktemp(request.param.split()[0]))
