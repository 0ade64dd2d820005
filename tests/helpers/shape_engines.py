"""One engine a shape of drafts, for everything that is tested with it: greedy text, the tap, publications, strategies.

An engine runs its sections one after the other; each test looks at the answers of its own. What varies within one
engine: batches of 8 and 1, a cold and a warm prefix cache, prompts that are prefilled in chunks, retractions, aborts,
stop tokens, drafting switched off and on, and, with the chain, no drafter at first and publications in flight. What all
have in common: float32, a target of 512 tokens, the tap on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import retraction
import torch
from engine_plugin import write_plugin
from engine_runner import CHAIN, SWITCH, SWITCHING, TREE, job, run_engine, speculative
from safetensors.torch import load_file, save_file
from shared_models import GREEDY_VOCAB, greedy_prompts

SHAPES: dict[str, Any] = {"chain 3x1@4": CHAIN, "tree 3x2@6": TREE, "switching at every step": SWITCHING}
WITH_PUBLICATIONS = "chain 3x1@4"
CHUNK, TIMEOUT_S = 24, 600
TOKENS, LONG_TOKENS = 128, 300
GREEDY = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
LONG = GREEDY | {"max_new_tokens": LONG_TOKENS}
SAMPLED = {"temperature": 1.0, "ignore_eos": True}
ABORTS_S = (0.05, 0.12, 0.2, 0.3)  # some requests are running then, others wait after a retraction
GOOD, NAN, MISSING, SHAPE, ABSENT, HOT = 1, 2, 3, 4, 5, 6

Sections = dict[str, list[dict[str, Any]]]


class Engine(NamedTuple):
    """What came of one engine.

    Args:
        target: the model's folder.
        asked: the jobs of each section.
        answers: as `run_engine` gives them, a list a section.
        states: the worker's before each section, by its name, and at the end as `end`.
        segments: what the tap recorded, by request.
    """

    target: Path
    asked: Sections
    answers: dict[str, list[dict[str, Any]]]
    states: dict[str, dict[str, Any]]
    segments: dict[str, list[dict[str, Any]]]

    def joined(self, section: str, field: str) -> list[Any]:
        """A field of all requests of a section, in order."""
        return [value for answer in self.answers[section] for value in answer[field]]


def run_shape(shape: str, models: Path, folder: Path) -> Engine:
    """Boots the engine of a shape on `models`, runs its sections, and takes its log, rings and answers.

    Args:
        models: with `target` and `drafter`.
        folder: for what this engine needs and leaves.
    """
    publishing = shape == WITH_PUBLICATIONS
    asked = sections(publishing)
    drafter = make_versions(models, folder) if publishing else models / "drafter"
    saved, name = folder / "segments.pt", f"test-{shape.split()[0]}-{os.getpid()}"
    options: dict[str, Any] = {"tap": name, "tap_bytes": 128 << 20}
    if publishing:
        options["publications"] = str(folder / "versions")
    engine = speculative("TLT", SHAPES[shape], drafter, **options)
    engine["environment"] |= {SWITCH: str(folder / "retracts")}
    answers = run_engine(
        models / "target",
        [each for jobs in asked.values() for each in jobs],
        timeout_s=TIMEOUT_S,
        plugins=write_plugin(folder / "plugins", "retraction", Path(retraction.__file__).read_text()),
        segments=(name, saved),
        chunked_prefill_size=CHUNK,
        **engine,
    )
    return collect(models / "target", asked, answers, saved)


def collect(target: Path, asked: Sections, answers: list[dict[str, Any]], saved: Path) -> Engine:
    """The answers by section, and the segments by request."""
    by_section, states, at = {}, {}, 0
    for section, jobs in asked.items():
        states[section] = answers[at - 1]["state"][0] if at else {}
        by_section[section] = answers[at : at + len(jobs)]
        at += len(jobs)
    states["end"] = answers[-1]["state"][0]
    segments = defaultdict(list)
    for segment in torch.load(saved):
        segments[segment["request_id"]].append(segment)
    return Engine(target, asked, by_section, states, segments)


def sections(publishing: bool) -> Sections:
    """The jobs, section by section. Publications first make the drafter that the others draft with."""
    prompts = greedy_prompts()
    others = prompts[:8]
    eights = [job(prompts[i : i + 8], [GREEDY] * 8) for i in range(0, 32, 8)]
    ones = [job([prompt], [GREEDY]) for prompt in prompts]
    drafted = {"batch 8": eights, "batch 1, cached": ones, "batch 8, cached": eights, "tap": tap_jobs()}
    if not publishing:
        return drafted
    plain = job(others, [LONG] * 8)
    return {
        "untrained": [plain],
        "published": [job(others, [LONG] * 8, publish=[GOOD])],
        **drafted,
        "broken": [job(others, [LONG] * 8, publish=[NAN, MISSING, SHAPE, ABSENT])],
        "after broken": [plain],
        "hot": [job(others, [LONG] * 8, publish=[HOT])],
        "after hot": [plain],
    }


def tap_jobs() -> list[dict[str, Any]]:
    """With retractions; the last one makes sure that what was aborted before it is in the ring."""
    generator = torch.Generator().manual_seed(3)
    families = torch.randint(0, GREEDY_VOCAB, (4, 20), generator=generator).tolist()
    own = [torch.randint(0, GREEDY_VOCAB, (3 + i % 40,), generator=generator).tolist() for i in range(32)]
    prompts = [families[i % 4] + own[i] for i in range(32)]
    lengths = [8 + 5 * (i % 9) for i in range(32)]

    def batch(base: dict, begin: int, end: int, **more: Any) -> dict[str, Any]:
        params = [{**base, "max_new_tokens": n} for n in lengths[begin:end]]
        return job(prompts[begin:end], params, switch=True, **more)

    stopping = [{"temperature": 1.0, "max_new_tokens": 60, "stop_token_ids": list(range(0, GREEDY_VOCAB, 16))}] * 8
    long = [{**SAMPLED, "max_new_tokens": 420}] * 8
    return [
        batch(SAMPLED, 0, 16, logprobs=True),
        batch(GREEDY, 16, 32),
        batch(SAMPLED, 0, 16),  # on prefix-cache hits
        batch(SAMPLED, 16, 24, commands={"drafting": 0}, logprobs=True),
        batch(SAMPLED, 24, 32, commands={"drafting": 1}),
        job(prompts[:8], stopping, logprobs=True, switch=True),
        *[job(prompts[8:16], long, abort_after_s=seconds, switch=True) for seconds in ABORTS_S],
        batch(GREEDY, 0, 8),
    ]


def make_versions(models: Path, folder: Path) -> Path:
    """The folder `versions`, of drafters to publish; returns an untrained one to begin with."""
    from tlt_verl.drafter import make_drafter

    fitted, versions = models / "drafter", folder / "versions"
    versions.mkdir()
    variant(fitted, versions / f"v{GOOD}")
    variant(fitted, versions / f"v{NAN}", lambda t: t["fc.weight"][3].fill_(torch.nan))
    variant(fitted, versions / f"v{MISSING}", lambda t: t.pop("layers.0.mlp.up_proj.weight"))
    variant(fitted, versions / f"v{SHAPE}", lambda t: t.update({"fc.bias": torch.zeros(7)}))
    variant(fitted, versions / f"v{HOT}", hot=list(range(0, GREEDY_VOCAB, 2)))
    return make_drafter(models / "target", folder / "made")


def variant(fitted: Path, folder: Path, change: Any = None, hot: list[int] | None = None) -> None:
    """A copy of the fitted drafter whose tensors `change` has been given, or that drafts from `hot` tokens."""
    shutil.copytree(fitted, folder)
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if hot is not None:
        torch.save(hot, folder / "hot_tokens.pt")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hot_vocab_size": len(hot)}))
