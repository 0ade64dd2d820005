"""`python -m sglang.launch_server --speculative-algorithm TLT`, without verl: one server, over HTTP.

Would catch: a plugin that is not loaded by the command line, a drafter that is not made, requests that do not survive
abort or retraction, weights of an update that reach the drafter or leave its shared head behind.
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tlt_verl.engine.options import EngineOptions
from tlt_verl.fingerprint import fingerprints

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from tiny_task import make_model  # noqa: E402

pytestmark = pytest.mark.slow

PROMPT = [10, 20, 30, 40, 50, 60]
GREEDY = {"temperature": 0, "ignore_eos": True}
BOOT_S = 240


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What the model's own float32 forward says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


class Server:
    """A server process and its HTTP interface."""

    def __init__(self, model: Path, scratch: Path, port: int) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", scratch / "server.log"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
        command += ["--speculative-algorithm", "TLT", "--device", "cpu", "--dtype", "float32", "--log-level", "info"]
        command += ["--mem-fraction-static", "0.2", "--max-total-tokens", "8192", "--skip-server-warmup"]
        command += ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
        command += ["--speculative-num-draft-tokens", "4", "--skip-tokenizer-init", "--max-running-requests", "8"]
        environment = {
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(scratch / "cache"),
        }
        EngineOptions(draft_untrained=True).export(environment)
        self._out = self.log.open("w")
        self.process = subprocess.Popen(
            command, env=environment, stdout=self._out, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._await_health()

    def _await_health(self) -> None:
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"no server after {BOOT_S} s: {self.log.read_text()[-4000:]}")

    def post(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text.startswith((b"{", b"[")) else {}

    def generate(self, prompt: list[int], count: int, **params) -> dict:
        return self.post("/generate", input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": count, **params})

    def fingerprints(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of the target, and of the drafter's own tensors."""
        checksums = self.post("/weights_checker", action="tlt_fingerprint")["ranks"][0]["checksums"]
        target = {name: value for name, value in checksums.items() if not name.startswith("draft.")}
        drafter = {name: value for name, value in checksums.items() if name.startswith("draft.")}
        shared = ("embed_tokens.weight", "lm_head.weight")
        return target, {name: value for name, value in drafter.items() if not name.endswith(shared)}

    def close(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()
        self._out.close()


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
    running = Server(models[0], tmp_path_factory.mktemp("server"), port=31877)
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
