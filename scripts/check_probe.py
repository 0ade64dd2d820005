#!/usr/bin/env python
"""What the NVML probe says of a real GPU while others use it: nobody, another process that computes, one that only
holds memory, and ourselves.

    scripts/check_probe.py [--device 0] [--seconds 4]

Prints one JSON object: for each part how often the probe said idle and busy, by cause, in the second half of the part
(a driver tells utilisation up to a second late), and how long it took from the begin of the load to the first busy
reading. Ends with status 1 where a part is not read as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from tlt_verl.spot.idle import NvmlProbe
from tlt_verl.spot.nvml import report

GIB = 1 << 30
POLL_S = 0.02
_LOAD = """
import sys, time, torch
compute, seconds, gib = sys.argv[1] == "compute", float(sys.argv[2]), float(sys.argv[3])
held = torch.empty(int(gib * 2**30), dtype=torch.uint8, device="cuda")
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
print("ready", flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end:
    if compute:
        for _ in range(20):
            a = torch.nn.functional.normalize(a @ a)
        torch.cuda.synchronize()
    else:
        time.sleep(0.05)
"""


def load(kind: str, seconds: float, gib: float) -> subprocess.Popen[str]:
    """A process that computes, or only holds memory; it has begun when this returns."""
    command = [sys.executable, "-c", _LOAD, kind, str(seconds), str(gib)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def watch(probe: NvmlProbe, seconds: float) -> dict[str, Any]:
    """Read the probe for so long."""
    begun, said, first_busy = time.monotonic(), Counter[str](), None
    while (elapsed := time.monotonic() - begun) < seconds:
        reading = probe.read()
        if not reading.idle and first_busy is None:
            first_busy = elapsed
        if elapsed > seconds / 2:
            said["idle" if reading.idle else reading.cause] += 1
        time.sleep(POLL_S)
    return {"said": dict(said), "first_busy_s": first_busy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="0", help="as in CUDA_VISIBLE_DEVICES")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    own: set[int] = set()
    probe = NvmlProbe(options.device, 4 * GIB, lambda: own)
    free = (probe.device.sample().free_bytes or 0) / GIB
    parts: dict[str, Any] = {}

    def part(name: str, wanted: set[str], kind: str | None = None, gib: float = 1.0, ours: bool = False) -> None:
        process = load(kind, options.seconds + 1, gib) if kind else None
        if process is not None and ours:
            own.add(process.pid)
        probe.training = ours
        parts[name] = watch(probe, options.seconds)
        parts[name]["as_it_is"] = set(parts[name]["said"]) == wanted
        if process is not None:
            process.wait()
        probe.training = False
        time.sleep(2.0)  # the last sample of utilisation is old by then

    part("nobody", {"idle"})
    part("another computes", {"other_process"}, "compute")
    part("another holds 2 GiB", {"idle"}, "hold", 2.0)
    part("another holds all but 2 GiB", {"memory"}, "hold", free - 2.5)
    part("we train", {"idle"}, "compute", ours=True)
    part("nobody again", {"idle"})
    found = report()
    print(json.dumps({"driver": found.driver, "names": found.names, "free_gib": free, "parts": parts}, indent=2))
    return 0 if all(each["as_it_is"] for each in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
