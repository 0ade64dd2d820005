"""Mistakes on verl's own command line: each ends with one sentence that names the option, the value and the cure.

Every case is the real command in a process of its own, two at a time. It must end before Ray is started, and so before
a model is loaded; the seconds are printed (`pytest -s`), and those of the processor, which a loaded machine stretches
less than the clock's, are bounded. What these would catch: a check that runs too late, or not at all; a message that
hydra or a traceback buries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
ROLLOUT = "actor_rollout_ref.rollout"
TLT = f"{ROLLOUT}.custom.tlt"
LIMIT_S = 30  # of processor time: 4 to 6 on a quiet machine, almost all of it verl's own import
HYDRAS_LAST_LINE = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
RAY_STARTED = ("ray init kwargs", "Started a local Ray instance")

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
}
DRAFTER = SMOLLM2 | {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
FOLDERS = {
    "target": SMOLLM2,
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 576, "n_head": 9},
    "gemma": SMOLLM2 | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    "narrow_drafter": DRAFTER | {"hidden_size": 288},
    "other_vocabulary": DRAFTER | {"vocab_size": 32000},
    "qwen_drafter": DRAFTER | {"architectures": ["Qwen2ForCausalLMEagle"]},
    "no_weights": DRAFTER,
}


@dataclass(frozen=True)
class Mistake:
    """A run with these overrides, on `target`; `says` must be in the last line of its error.

    Args:
        installed: a package, and the version that it claims to have.
        environment: variables that are set, or with None are not.
    """

    says: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    target: str = "target"
    installed: tuple[str, str] | None = None
    environment: dict[str, str | None] = field(default_factory=dict)


def drafter(name: str, *says: str) -> Mistake:
    return Mistake((f"{TLT}.drafter.path: got", name, *says), (f"+{TLT}.drafter.path={{models}}/{name}",))


MISTAKES = {
    "unknown key": Mistake(
        (f"{TLT}.foo: unknown key (got 1)", "takes drafter, strategy, tap, spot, gate, debug"),
        (f"+{TLT}.foo=1",),
    ),
    "misspelt key": Mistake(
        (f"{TLT}.drafter.pth: unknown key (got '/x')", f"Did you mean {TLT}.drafter.path?"),
        (f"+{TLT}.drafter.pth=/x",),
    ),
    "wrong type": Mistake(
        (f"{TLT}.debug.fingerprint: got 'yes' (str)", "takes true or false"),
        (f"+{TLT}.debug.fingerprint='yes'",),
    ),
    "value out of range": Mistake(
        (f"{TLT}.strategy.arms: got 'eagle:3x1@9'", "num_draft_tokens is 9", "takes 4"),
        (f"{TLT}.strategy.arms=['eagle:3x1@9']",),
    ),
    "drafter path missing": drafter("nowhere", "is not a folder", "Give the folder with config.json"),
    "drafter without weights": drafter("no_weights", "weights cannot be read", "null"),
    "drafter of another hidden size": drafter("narrow_drafter", "hidden_size is 288; the target's is 576", "null"),
    "drafter of another vocabulary": drafter("other_vocabulary", "vocab_size is 32000; the target's is 49152", "null"),
    "drafter of another family": drafter("qwen_drafter", "Qwen2ForCausalLMEagle", "LlamaForCausalLMEagle"),
    "GPT-2 has no drafter": Mistake(("GPT2LMHeadModel", "LlamaForCausalLM"), target="gpt2"),
    "Gemma has no drafter": Mistake(("Gemma2ForCausalLM", "LlamaForCausalLM"), target="gemma"),
    "sglang outside the range": Mistake(
        ("sglang 0.5.99 is outside the tested range >=0.5.17,<0.5.18", "requirements/", "tlt-verl doctor"),
        installed=("sglang", "0.5.99"),
    ),
    "verl outside the range, CPU": Mistake(
        ("verl 0.9.9 is outside the tested range >=0.9.1,<0.9.2", "Install that version", "tlt-verl doctor"),
        installed=("verl", "0.9.9"),
    ),
    "verl outside the range, no CPU device": Mistake(
        ("verl 0.9.9 is outside the tested range >=0.9.1,<0.9.2", "tlt-verl doctor"),
        installed=("verl", "0.9.9"),
        environment={"VERL_PLATFORM": None},
    ),
    "TP that does not divide the heads": Mistake(
        (f"{ROLLOUT}.tensor_model_parallel_size: got 2", "9 attention heads: [1, 3, 9]"),
        (f"{ROLLOUT}.tensor_model_parallel_size=2",),
    ),
    "pipeline parallel": Mistake(
        (f"{ROLLOUT}.pipeline_model_parallel_size: got 2, takes 1",),
        (f"{ROLLOUT}.pipeline_model_parallel_size=2",),
    ),
    "speculation in engine_kwargs": Mistake(
        (f"{ROLLOUT}.engine_kwargs.sglang.speculative_algorithm: got 'EAGLE'", f"{TLT}.strategy.arms"),
        (f"+{ROLLOUT}.engine_kwargs.sglang.speculative_algorithm=EAGLE",),
    ),
    "no VERL_PLATFORM": Mistake(
        ("trainer.device: got 'cpu'", "VERL_PLATFORM=cpu"),
        environment={"VERL_PLATFORM": None},
    ),
}


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    status: int
    output: str
    elapsed_s: float
    processor_s: float

    @property
    def last_line(self) -> str:
        """The last line of the error; hydra's hint behind it is not counted."""
        return [line for line in self.output.splitlines() if line.strip() and line != HYDRAS_LAST_LINE][-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Future[Run]]]:
    """Every case, started two at a time."""
    models = tmp_path_factory.mktemp("models")
    for name, config in FOLDERS.items():
        (models / name).mkdir()
        (models / name / "config.json").write_text(json.dumps(config))
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(start, mistake, models, tmp_path_factory.mktemp("run"))
            for name, mistake in MISTAKES.items()
        }
        yield started
        for future in started.values():
            future.cancel()


def start(mistake: Mistake, models: Path, folder: Path) -> Run:
    environment = {"VERL_PLATFORM": "cpu"} | {k: v for k, v in os.environ.items() if k != "VERL_PLATFORM"}
    for name, value in mistake.environment.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    if mistake.installed:
        package, version = mistake.installed
        metadata = folder / f"{package}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    overrides = [override.format(models=models) for override in mistake.overrides]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(CONFIGS)]
    command += ["--config-name", "smollm2_cpu", f"actor_rollout_ref.model.path={models / mistake.target}"]
    command += [f"hydra.run.dir={folder / 'hydra'}", *overrides]
    begun, log = time.perf_counter(), folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(process.returncode, log.read_text(), elapsed_s, usage.ru_utime + usage.ru_stime)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_the_command_with_its_sentence_before_ray_is_started(name, runs):
    run = runs[name].result()
    print(f"\n{run.elapsed_s:5.1f} s ({run.processor_s:.1f} s of processor)  {name}: {run.last_line}")
    assert run.status != 0
    assert all(part in run.last_line for part in MISTAKES[name].says), run.output[-3000:]
    assert not any(sign in run.output for sign in RAY_STARTED), run.output[-3000:]
    assert run.processor_s < LIMIT_S
