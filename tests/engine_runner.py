"""One boot of a real SGLang engine for many jobs, in a process of its own.

Tests call `run_engine`; the process is this file, run as a script: a JSON object in, a JSON object out. It knows the
engine's Python interface and nothing of what the tests look for.

`TLT_TEST_ENGINE`, a JSON object of `sglang.Engine`'s arguments, runs the same tests on another device
(`scripts/check_gpu.sh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
import engine_logs
import guard

ENGINE = {
    "skip_tokenizer_init": True,
    "device": "cpu",
    "dtype": "float32",
    "mem_fraction_static": 0.2,
    "max_total_tokens": 16384,
    "max_running_requests": 64,
    "disable_overlap_schedule": True,
    "log_level": "warning",
    "random_seed": 1,
    "sleep_on_idle": True,
    **json.loads(os.environ.get("TLT_TEST_ENGINE", "{}")),
}
CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 6}
SWITCHING = ("eagle:3x1@4", "eagle:3x2@6", "eagle:2x3@7", "ngram:3x1@4", "ngram:4x2@8", "off")
"""Another strategy at random at every step: chains and trees of different width, both drafters, and none."""
_SIXTEEN_BITS = {"float16": 0.02, "bfloat16": 0.15}
SWITCH = "TLT_TEST_SWITCH"
"""Names the file by which a test's own plugin of SGLang is switched on and off."""
_COUNTERS = ("cached_tokens", "completion_tokens", "spec_verify_ct", "spec_num_correct_drafts")


def rounding(in_float32: float) -> float:
    """What logits and hidden states may be off by: more where the engines compute in 16 bits, as they do on a GPU."""
    return {"float32": in_float32, **_SIXTEEN_BITS}[ENGINE["dtype"]]


def speculative(algorithm: str, shape: dict[str, int] | Sequence[str], drafter: Path, **options: Any) -> dict[str, Any]:
    """What `run_engine` takes for a speculative algorithm with a tree of this shape, or that switches between some.

    Args:
        options: more of `EngineOptions`.
    """
    if not isinstance(shape, dict):
        return _switching(algorithm, shape, drafter, **options)
    backend = {} if algorithm == "TLT" or ENGINE["device"] != "cpu" else {"attention_backend": "tlt_cpu"}
    return {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(drafter),
        **shape,
        **backend,
        **({"environment": _exported(**options)} if options else {}),
    }


def _switching(algorithm: str, strategies: Sequence[str], drafter: Path, **options: Any) -> dict[str, Any]:
    from tlt_verl.engine.graph_plan import largest
    from tlt_verl.engine.options import EngineOptions

    options = {"strategy": {"arms": list(strategies)}, "choose_at_random": True, "seed": 7} | options
    steps, topk, width = largest(EngineOptions(**options).strategies())
    shape = {
        "speculative_num_steps": steps,
        "speculative_eagle_topk": topk,
        "speculative_num_draft_tokens": width,
    }
    return speculative(algorithm, shape, drafter, **options)


def _exported(**options: Any) -> dict[str, str]:
    from tlt_verl.engine.options import EngineOptions

    environment: dict[str, str] = {}
    EngineOptions(**options).export(environment)
    return environment


def job(
    prompts: list[list[int]],
    params: list[dict[str, Any]],
    *,
    calls: int = 1,
    logprobs: bool = False,
    commands: dict[str, float] | None = None,
    abort_after_s: float | None = None,
    publish: Sequence[int] = (),
    switch: bool = False,
) -> dict[str, Any]:
    """`calls` calls of `Engine.generate` with the same batch: a prompt and sampling parameters a request.

    A batch reaches the scheduler as one message, so that its batches, and with a seeded engine its samples, are the
    same in every run.

    Args:
        commands: for the worker of an engine with the algorithm TLT, before the job.
        abort_after_s: abort all that is running after this time.
        publish: versions of the drafter to publish one after the other while requests are running: call follows call
            until the last one is published.
        switch: what a test's own plugin of SGLang does, it does during this job: the file `SWITCH` names is there.
    """
    return {
        "prompts": prompts,
        "params": params,
        "calls": calls,
        "logprobs": logprobs,
        "commands": commands,
        "abort_after_s": abort_after_s,
        "publish": list(publish),
        "switch": switch,
    }


def run_engine(
    model: Path,
    jobs: list[dict[str, Any]],
    *,
    timeout_s: float,
    plugins: Path | None = None,
    environment: dict[str, str] | None = None,
    segments: tuple[str, Path] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Boot an engine with `ENGINE | options`, run the jobs in order, shut it down.

    Args:
        plugins: a folder to put on the engine's import path, with the metadata of a plugin.
        environment: more variables for the engine's processes.
        segments: read the rings of this name while the jobs run, and save the list of their segments in this file.

    Returns:
        For each job, lists with an entry a request, call after call: `output_ids`, `request_ids`, `logprobs` (of the
        output tokens, where asked for) and the counters of `meta_info`; and lists of one: `state`, the worker's after
        the job, and with `publish` what `publications` came to.
    """
    request = {"engine": ENGINE | {"model_path": str(model)} | options, "jobs": jobs, "segments": None}
    if segments is not None:
        request["segments"] = [segments[0], str(segments[1])]
    paths = [str(plugins)] if plugins else []
    with tempfile.TemporaryDirectory() as scratch:
        given, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        given.write_text(json.dumps(request))
        variables = os.environ | {
            **({"SGLANG_USE_CPU_ENGINE": "1"} if ENGINE["device"] == "cpu" else {}),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": scratch,
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            **(environment or {}),
        }
        command = [sys.executable, __file__, str(given), str(answer)]
        code, left = _run(command, variables, Path(scratch), timeout_s)
        text = Path(scratch, "log.txt").read_text(errors="replace")
        engine_logs.keep(f"an engine of {model}", text)
        assert code == 0 and answer.exists(), f"the engine ended with {code}:\n{text[-6000:]}"
        assert not left["processes"], f"the engine has ended, and these have not: {left['processes']}"
        assert not [name for name in left["shm"] if name.startswith("tlt-")], f"left in /dev/shm: {left['shm']}"
        return json.loads(answer.read_text())


def _run(
    command: list[str], environment: dict[str, str], scratch: Path, timeout_s: float
) -> tuple[int | str, dict[str, list[str]]]:
    """The exit status, or a word for a timeout; and what was left behind."""
    with Path(scratch, "log.txt").open("w") as log:
        running = guard.start(command, scratch / "left.json", environment=environment, stdout=log, stderr=log)
        try:
            code: int | str = running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"a timeout after {timeout_s} s", {}
        finally:
            running.end()
    return code, running.left()


def main(given: Path, answer: Path) -> None:
    import sglang

    request = json.loads(given.read_text())
    engine = sglang.Engine(**request["engine"])
    try:
        with _reading(request["segments"]):
            answer.write_text(json.dumps([_answer(engine, each) for each in request["jobs"]]))
    finally:
        engine.shutdown()


@contextlib.contextmanager
def _reading(segments: list[str] | None) -> Iterator[None]:
    """Read the rings in a thread for as long as the jobs run, as a spot worker would, and save what was read."""
    if segments is None:
        yield
        return
    import torch

    from tlt_verl.segments import SegmentReader, find_rings

    name, path = segments
    readers = [SegmentReader(ring) for ring in find_rings(name)]
    assert readers, f"no ring {name}"
    ended, found = threading.Event(), []

    def read() -> None:
        while True:
            last = ended.is_set()
            for reader in readers:
                found.extend(reader.poll())
            if last:
                return
            time.sleep(0.01)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert sum(reader.lost + reader.torn for reader in readers) == 0
    torch.save([dataclasses.asdict(segment) for segment in found], path)


def _answer(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    return engine.loop.run_until_complete(_answered(engine, asked))


async def _answered(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from tlt_verl.engine import client

    out: dict[str, Any] = {name: [] for name in ("output_ids", "request_ids", "logprobs", "finish", *_COUNTERS)}
    manager = engine.tokenizer_manager
    if asked["commands"]:
        assert await client.command(manager, **asked["commands"])
    _set_switch(asked["switch"])
    if asked["abort_after_s"] is not None:
        engine.loop.call_later(asked["abort_after_s"], partial(manager.abort_request, abort_all=True))
    publishing = asyncio.create_task(_publish(manager, asked["publish"])) if asked["publish"] else None
    for call in itertools.count(1):
        for response in await engine.async_generate(
            input_ids=asked["prompts"], sampling_params=asked["params"], return_logprob=asked["logprobs"]
        ):
            meta = response["meta_info"]
            out["output_ids"].append(response["output_ids"])
            out["request_ids"].append(meta["id"])
            out["finish"].append(meta["finish_reason"]["type"])
            out["logprobs"].append([entry[0] for entry in meta.get("output_token_logprobs", ())])
            for name in _COUNTERS:
                out[name].append(meta.get(name, 0))
        if call >= asked["calls"] and (publishing is None or publishing.done()):
            break
    if publishing is not None:
        out["publications"] = [publishing.result()]
    out["state"] = [(await manager.get_internal_state())[0].get("tlt")]
    return out


def _set_switch(wanted: bool) -> None:
    if SWITCH in os.environ:
        path = Path(os.environ[SWITCH])
        path.touch() if wanted else path.unlink(missing_ok=True)


async def _publish(manager: Any, versions: list[int]) -> list[dict[str, Any]]:
    """Publish one after the other: why each was rejected, the state after it, and the engine's fingerprints."""
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    from tlt_verl.engine import client

    published = []
    for version in versions:
        await asyncio.sleep(0.2)
        reason = await client.publish(manager, version)
        published.append({"version": version, "reason": reason, **await client.state(manager)})
        _, _, ranks, _ = await manager.check_weights(CheckWeightsReqInput(action="tlt_fingerprint"))
        published[-1]["fingerprints"] = ranks[0]["checksums"]
    return published


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
