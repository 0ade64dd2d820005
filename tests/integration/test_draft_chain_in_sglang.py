"""The CPU's draft loop beside SGLang's own, in a real engine: the same drafts at every step of it.

A plugin of SGLang lets both draft from the same batch and keeps both answers; the engine goes on with ours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

DRAFTS = "TLT_TEST_DRAFTS"  # the file that both answers go to
_LAYER = 12.0  # the fitted drafter's layer adds next to nothing: this much larger, a wrong prefix changes the drafts


def install() -> None:
    """The plugin's entry point. It stands on the import path before tlt_verl's, which then installs this function."""
    from tlt_verl.cpu import draft_chain

    inner = draft_chain.draft_forward

    def draft_forward(original, worker, forward_batch):
        ours = inner(original, worker, forward_batch)
        stock = original(worker, forward_batch)
        with Path(os.environ[DRAFTS]).open("a") as file:
            same = all(bool((a == b).all()) for a, b in zip(ours[:2], stock[:2], strict=True))
            chain = getattr(worker, draft_chain._CHAIN) is not None
            print(json.dumps([ours[2].tolist(), stock[2].tolist(), same, chain]), file=file)
        return ours

    draft_chain.draft_forward = draft_forward


def make_drafter(target, folder: Path) -> Path:
    from fitted_drafter import fit_drafter

    file = fit_drafter(target, folder) / "model.safetensors"
    tensors = load_file(file)
    layer = [name for name in tensors if name.startswith("layers.0") and "norm" not in name]
    save_file(tensors | {name: _LAYER * tensors[name] for name in layer}, file)
    return folder


@pytest.fixture(scope="module")
def steps(greedy_models, tmp_path_factory):
    from engine_plugin import write_plugin
    from engine_runner import job, run_engine, speculative
    from shape_engines import GREEDY, TIMEOUT_S
    from shared_models import greedy_prompts
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("draft_chain")
    target = AutoModelForCausalLM.from_pretrained(greedy_models / "target").float().eval()
    drafter = make_drafter(target, folder / "drafter")
    prompts = greedy_prompts()
    jobs = [job(prompts[:1], [GREEDY]), job(prompts[1:9], [GREEDY] * 8), job(prompts[9:12], [GREEDY] * 3)]
    shape = {"speculative_num_steps": 5, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 6}
    run_engine(
        greedy_models / "target",
        jobs,
        timeout_s=TIMEOUT_S,
        plugins=write_plugin(folder / "plugins", "two_chains", Path(__file__).read_text()),
        environment={DRAFTS: str(folder / "drafts")},
        **speculative("TLT", shape, drafter),
    )
    return [json.loads(line) for line in (folder / "drafts").read_text().splitlines()]


def test_the_loop_is_ours_and_there_is_something_to_compare(steps):
    assert all(is_chain for *_, is_chain in steps)
    assert {1, 3, 8} <= {len(ours) for ours, *_ in steps}
    assert all(len(chain) == 5 for ours, *_ in steps for chain in ours)
    tokens = [token for ours, *_ in steps for chain in ours for token in chain]
    assert len(steps) > 50 and len(set(tokens)) > 40


def test_every_draft_is_the_one_that_sglang_would_have_made(steps):
    """In float32; two in a thousand may be near ties of the head, after which a chain goes another way."""
    assert all(same for *_, same, _ in steps)
    pairs = [pair for ours, stock, *_ in steps for pair in zip(ours, stock, strict=True)]
    other = sum(ours != stock for ours, stock in pairs)
    print(f"\n{len(pairs)} chains, {other} differ")
    assert other <= len(pairs) / 500
