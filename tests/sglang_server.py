"""`python -m sglang.launch_server` in a process of its own, and its HTTP interface, for tests."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import engine_logs
import guard

BOOT_S = 240
GREEDY = {"temperature": 0, "ignore_eos": True}


class Server:
    """A server process and its HTTP interface."""

    def __init__(
        self,
        model: Path,
        scratch: Path,
        port: int,
        algorithm: str,
        *more: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", scratch / "server.log"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
        command += [
            "--speculative-algorithm",
            algorithm,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--log-level",
            "info",
        ]
        command += ["--mem-fraction-static", "0.2", "--max-total-tokens", "8192", "--skip-server-warmup"]
        command += ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
        command += [
            "--speculative-num-draft-tokens",
            "4",
            "--skip-tokenizer-init",
            "--max-running-requests",
            "8",
            *more,
        ]
        variables = {
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(scratch / "cache"),
            **(environment or {}),
        }
        self._out = self.log.open("w")
        self._running = guard.start(
            command, scratch / "left.json", environment=variables, stdout=self._out, stderr=self._out
        )
        self._await_health()

    def _await_health(self) -> None:
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            assert self._running.process.poll() is None, self.log.read_text()[-4000:]
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
        """Kills it with all that came of it."""
        self._running.end()
        self._out.close()
        engine_logs.keep(self.url, self.log.read_text(errors="replace"))
