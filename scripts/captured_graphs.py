"""The graphs that a worker captured, beside their plan and its estimate: for check_engine.py. Pure functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlt_verl.config import Strategy
from tlt_verl.engine.graph_plan import DRAFT, EXTEND, VERIFY, Capture, GraphPlan, ModelSizes, estimate, largest

MIB = 2**20


def graphs(found: Sequence[dict[str, Any]], model: Path, arms: Sequence[Strategy]) -> list[dict[str, Any]]:
    """Each recorded set of graphs, beside the plan's and the estimate for it."""
    config = json.loads((model / "config.json").read_text())
    if not found:
        return []
    sizes = ModelSizes(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
    )
    batch_sizes = max((each["batch_sizes"] for each in found), key=len)
    plan = GraphPlan(arms, batch_sizes, None)
    planned = {capture.key: capture for capture in plan.with_own(Strategy("eagle", *largest(arms)))}
    rows = []
    for each in found:
        capture = capture_of(each)
        wanted = planned.pop(capture.key, None)
        memory = dataclasses.replace(estimate([capture], sizes), logits=0)  # one buffer for all of them
        rows.append(
            each
            | {
                "capture": str(capture),
                "planned": None if wanted is None else len(wanted.batch_sizes),
                "estimate": dataclasses.asdict(memory),
            }
        )
    return rows + [{"capture": f"missing: {capture}"} for capture in planned.values()]


def capture_of(found: dict[str, Any]) -> Capture:
    """A recorded set of graphs in the plan's words."""
    sizes = tuple(sorted(found["batch_sizes"]))
    if found["runner"] == "EAGLEDraftCudaGraphRunner":
        return Capture(DRAFT, (found["steps"], found["topk"], found["width"]), sizes)
    width = found["tokens_per_request"]
    if found["runner"] == "EAGLEDraftExtendCudaGraphRunner":
        return Capture(EXTEND, (width,), sizes)
    return Capture(VERIFY, (width, int(found["topk"] > 1)), sizes)


def graph_rows(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return ["no graphs"]
    head = ("graphs", "plan", "s", "reserved", "allocated", "beside", "estimate", "its nodes")
    lines = [f"{'MiB of device memory':<34}" + "".join(f"{name:>10}" for name in head)]
    total = [0.0] * 8
    for each in found:
        if "runner" not in each:
            lines.append(each["capture"])
            continue
        memory = each["estimate"]
        tensors = sum(memory.values()) - memory["nodes"]
        held = each["held"] if each["held"] is not None else each["free"]
        row = [
            len(each["batch_sizes"]),
            each["planned"] or 0,
            each["seconds"],
            *(value / MIB for value in (each["reserved"], each["allocated"], held - each["reserved"], tensors)),
            memory["nodes"] / MIB,
        ]
        total = [a + b for a, b in zip(total, row, strict=True)]
        lines.append(f"{each['capture']:<34}" + _numbers(row))
    remark = "estimate: of tensors, without the logits' buffer, which all share; beside: the driver's, beside torch's"
    return [*lines, f"{'together':<34}" + _numbers(total), remark, ""]


def _numbers(row: Sequence[float]) -> str:
    return "".join(f"{value:>10}" if isinstance(value, int) else f"{value:>10.1f}" for value in row)
