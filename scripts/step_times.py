"""Times of a decode step's parts inside a real engine, by a plugin of SGLang that is on the import path for one run.

`record` puts it there, `read` gives what was written: of every call of a part its name, when it began, and how long it
took. Knows the parts' names in SGLang; not what they are worth.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from engine_plugin import write_plugin

_TIMES = "TLT_STEP_TIMES"
_PLUGIN = """
import os, time

def install():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    kept = []

    def timed(name_of):
        def around(original, owner, *args, **kwargs):
            begin = time.perf_counter()
            result = original(owner, *args, **kwargs)
            if name := name_of(owner, *args):
                kept.append(f"{name} {begin:.7f} {time.perf_counter() - begin:.7f}")
                if name == "process":
                    with open(os.environ["TLT_STEP_TIMES"], "a") as file:
                        print(*kept, sep="\\n", file=file)
                    kept.clear()
            return result
        return around

    def forward(runner, batch, *_):
        return "target" if batch.forward_mode.is_target_verify() and not runner.is_draft_worker else None

    def worker(_, batch, *rest):
        return "prefill" if batch.forward_mode.is_extend() or batch.is_extend_in_batch else "decode"

    speculative = "sglang.srt.speculative.eagle_worker_v2."
    for target, name_of in (
        (speculative + "EagleDraftWorker.draft", lambda *_: "draft"),
        (speculative + "EagleDraftWorker._draft_extend_for_decode", lambda *_: "extend"),
        (speculative + "EAGLEWorkerV2.verify", lambda *_: "verify"),
        (speculative + "EAGLEWorkerV2.forward_batch_generation", worker),
        ("sglang.srt.model_executor.model_runner.ModelRunner.forward", forward),
        ("sglang.srt.managers.scheduler.Scheduler.process_batch_result", lambda *_: "process"),
    ):
        HookRegistry.register(target, timed(name_of), HookType.AROUND)
"""


@dataclass(frozen=True)
class Call:
    """One call of a part: `draft`, `target` (its forward pass), `verify` (that and the sampling), `extend`, `decode`
    (all of these), `prefill`, or `process` (what the scheduler does with a result). Times in seconds.
    """

    part: str
    begin_s: float
    seconds: float


def record(scratch: Path) -> Path:
    """Engines that are started from now on, by this process, write to the file that is returned."""
    plugins = str(write_plugin(scratch / "plugin", "step_times_plugin", _PLUGIN))
    os.environ["PYTHONPATH"] = os.pathsep.join([plugins, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, plugins)
    os.environ[_TIMES] = str(scratch / "times.txt")
    return scratch / "times.txt"


def read(times: Path) -> list[Call]:
    """What was written so far, in order of the calls' ends."""
    rows = (line.split() for line in times.read_text().splitlines())
    return [Call(part, float(begin), float(seconds)) for part, begin, seconds in rows]
