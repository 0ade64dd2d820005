"""`tlt-verl warmup` and `tlt-verl export` as a user runs them, on a small target, and stock SGLang with what they made.

What it would catch: rollouts that the tap loses, a trainer that learns nothing from them, a checkpoint that does not
come back, a replayed accept length that is not the engine's, an export that stock SGLang does not draft with.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sglang_server import Server
from tiny_task import make_model, make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlt_verl.drafter import check_drafter

pytestmark = pytest.mark.slow

MINUTES = 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmup")
    make_model(folder / "target", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():  # sure of its next token: weak layers behind a strong embedding, and a peaked head
        model.model.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, 0.8)
    model.save_pretrained(folder / "target")
    make_prompts(folder / "prompts.parquet", 40)
    return folder


def tlt_verl(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tlt_verl.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def warm_up(folder: Path) -> dict:
    done = tlt_verl(
        folder,
        "warmup",
        *("--target", str(folder / "target")),
        *("--prompts", str(folder / "prompts.parquet")),
        *("--out", str(folder / "out")),
        *("--minutes", str(MINUTES)),
        *("--strategy", "eagle:3x1@4"),
        *("--hot-vocab", "192"),
        *("--held-out", "8"),
        *("--max-new-tokens", "96"),
        *("--batch", "16"),
        *("--dtype", "float32"),
        *("--device", "cpu"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
    return json.loads((folder / "out" / "report.json").read_text())


@pytest.fixture(scope="module")
def first(folder):
    return warm_up(folder)


def test_a_drafter_is_made_that_is_accepted(folder, first):
    assert first["before"]["accept_len"] <= 1.1
    assert first["after"]["accept_len"] > 1.3
    assert first["gate"]["published"] >= 1 and first["version"] >= 1
    assert first["trained"]["tokens"] > 10_000 and first["hot_vocab"] == 192
    assert first["segments_lost"] == 0
    target = json.loads((folder / "target" / "config.json").read_text())
    check_drafter(first["checkpoint"], target)
    with (folder / "out" / "curve.csv").open() as file:
        points = list(csv.DictReader(file))
    assert float(points[-1]["accept_len"]) > 1.3
    assert float(points[-1]["elapsed_s"]) <= 60 * MINUTES


def test_replaying_the_responses_gives_what_the_engine_counted(first):
    assert first["after"]["replayed"] == pytest.approx(first["after"]["accept_len"], rel=0.02)
    assert first["before"]["replayed"] == pytest.approx(first["before"]["accept_len"], rel=0.05)


def test_stock_sglang_drafts_with_the_export(folder, first, tmp_path):
    """Algorithm EAGLE, nothing of ours in the command but the export; the accept length stands in its answer."""
    out = folder / "export"
    done = tlt_verl(
        folder, "export", "--checkpoint", first["checkpoint"], "--target", str(folder / "target"), "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "--speculative-algorithm EAGLE" in done.stdout and "hot_tokens.pt" in done.stdout
    arguments = ["--speculative-draft-model-path", str(out), "--speculative-token-map", str(out / "hot_tokens.pt")]
    arguments += ["--attention-backend", "tlt_cpu"]  # the CPU device's, as stock has none that drafts there
    server = Server(folder / "target", tmp_path, 31893, "EAGLE", *arguments)
    try:
        prompt = AutoTokenizer.from_pretrained(folder / "target").apply_chat_template(
            [{"role": "user", "content": "Say something about 3 and 4."}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        meta = server.generate(prompt, 96)["meta_info"]
    finally:
        server.close()
    print(f"stock SGLang with the export: accept length {meta['spec_accept_length']:.2f}")
    assert meta["spec_accept_length"] > 1.3


def test_a_second_warmup_goes_on_where_the_first_ended(folder, first):
    second = warm_up(folder)
    assert second["before"] is None
    assert second["trained"]["tokens"] > first["trained"]["tokens"]
    assert second["after"]["accept_len"] > 0.9 * first["after"]["accept_len"]
    assert int(Path(second["checkpoint"]).name[1:]) > int(Path(first["checkpoint"]).name[1:])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], ["--minutes: got '0.0'", "above 0"]),
        (["--strategy", "eagle:3x4@9"], ["--strategy", "eagle:7x1@8"]),
        (["--held-out", "30"], ["--held-out: got 30", "at most half of the 40"]),
        (["--max-new-tokens", "100000"], ["--max-new-tokens: got 100000", "context is 1024"]),
        (["--prompts", "nowhere.parquet"], ["--prompts: got 'nowhere.parquet'", "a file that exists"]),
        (["--engine", "triton"], ["--engine", "got 'triton'", "NAME=VALUE"]),
        (["--target", "nowhere"], ["--target: got 'nowhere'", "not a folder"]),
    ],
)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(folder, arguments, words):
    given = ["--target", str(folder / "target"), "--prompts", str(folder / "prompts.parquet"), "--out", "unused"]
    done = tlt_verl(folder, "warmup", *given, *arguments)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
