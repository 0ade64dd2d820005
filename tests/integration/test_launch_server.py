"""`python -m sglang.launch_server --speculative-algorithm TLT`, without verl: one server, over HTTP.

Would catch: a plugin that is not loaded by the command line, a drafter that is not made, requests that do not survive
abort or retraction, weights of an update that reach the drafter or leave its shared head behind.
"""

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sglang_server import Server
from tiny_task import make_model
from transformers import AutoModelForCausalLM

from tlt_verl.engine.options import EngineOptions
from tlt_verl.fingerprint import fingerprints

pytestmark = pytest.mark.slow

PROMPT = [10, 20, 30, 40, 50, 60]


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What the model's own float32 forward says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two targets of one shape with different weights: a policy before and after an update. Untied head."""
    folder = tmp_path_factory.mktemp("models")
    before = make_model(folder / "before", tied=False)
    after = make_model(folder / "after", tied=False)
    model = AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(after)
    return before, after


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    environment: dict[str, str] = {}
    EngineOptions(draft_untrained=True).export(environment)
    running = Server(models[0], tmp_path_factory.mktemp("server"), 31877, "TLT", environment=environment)
    yield running
    running.close()


def test_the_command_line_serves_with_a_drafter_made_from_the_target(server, models):
    answer = server.generate(PROMPT, 40)
    assert answer["output_ids"] == greedy(models[0], PROMPT, 40)
    assert answer["meta_info"]["spec_verify_ct"] > 0
    assert answer["meta_info"]["spec_draft_token_num"] == 3 * answer["meta_info"]["spec_verify_ct"]


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_generation_survives_a_pause(server, models, mode):
    """abort returns what there is, the rest follows on resubmission; retract goes on by itself. Greedy, so exact."""
    count = 600
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.generate(PROMPT, count)))
    thread.start()
    time.sleep(1.0)
    server.post("/pause_generation", mode=mode)
    time.sleep(0.3)
    server.post("/continue_generation")
    thread.join()
    tokens = answers[0]["output_ids"]
    if mode == "abort":
        assert answers[0]["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < len(tokens) < count, "the pause came too late or too early to prove anything"
        tokens += server.generate(PROMPT + tokens, count - len(tokens))["output_ids"]
    assert tokens == server.generate(PROMPT, count)["output_ids"]


def test_an_update_reaches_the_target_alone_and_the_shared_head_follows(server, models):
    before, after = models
    _, drafter = server.fingerprints()
    assert len(drafter) == 10  # fc, its bias, q k v o, gate up down, the norm
    server.post("/update_weights_from_disk", model_path=str(after), flush_cache=True)
    target, drafter_now = server.fingerprints()
    assert target == fingerprints(load_file(after / "model.safetensors").items())
    assert target != fingerprints(load_file(before / "model.safetensors").items())
    assert drafter_now == drafter
    assert server.generate(PROMPT, 40)["output_ids"] == greedy(after, PROMPT, 40)
