"""Replay of recorded responses through the model-free drafter: accept length and cost, without a model.

Under teacher forcing: at every step each running request gets a tree of drafts, its recorded response decides which of
them are accepted, and the next recorded token is the bonus. Requests run side by side and the next one starts when one
ends, as in an engine, so siblings learn from each other exactly as much as they would there.

    python scripts/measure_ngram.py rollouts.jsonl --running 4 --strategies ngram:7x1@8 ngram:15x2@16 --sglang

A line of the file is {"prompt": [token, ...], "response": [token, ...]}, in the order in which requests start. With
`--epochs 2` everything is replayed again with the same corpus: what former epochs' responses are worth at most.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from tlt_verl.config import Strategy
from tlt_verl.engine.ngram import SOURCES, NgramCorpus
from tlt_verl.engine.ngram_tree import Proposal, Shape

Rollout = tuple[list[int], list[int]]  # prompt, response


class Drafter(Protocol):
    """What is replayed: a model-free drafter of any make."""

    def begin(self, request_id: str, prompt: Sequence[int], epoch: int = 0) -> None:
        """A request starts."""

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """Its response goes on."""

    def finish(self, request_id: str) -> None:
        """It is over."""

    def propose(self, request_ids: Sequence[str], shape: Shape) -> list[Proposal]:
        """One tree for each request."""


class SGLangCorpus:
    """SGLang's n-gram corpus, fed as its NGRAM worker feeds it (`ngram_worker.py`).

    Args:
        nodes: of a tree, the root included; fixed when the corpus is made.
        match: `BFS` (recency) or `PROB` (frequency).
        depth: of its trie: longest context and drafts behind it, together.
    """

    def __init__(self, nodes: int, match: str = "BFS", depth: int = 18) -> None:
        from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus as Corpus

        self._corpus, self._nodes, self._depth = Corpus(draft_token_num=nodes, match_type=match), nodes, depth
        self._texts: dict[str, list[int]] = {}

    def begin(self, request_id: str, prompt: Sequence[int], epoch: int = 0) -> None:
        """A request starts; stock inserts nothing of its prompt but what stands in the last `depth` tokens."""
        self._texts[request_id] = list(prompt)

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """Its response goes on."""
        self._texts[request_id].extend(tokens)

    def finish(self, request_id: str) -> None:
        """It is over; what it wrote stays in the trie."""
        self._corpus.erase_match_state([request_id])
        del self._texts[request_id]

    def propose(self, request_ids: Sequence[str], shape: Shape) -> list[Proposal]:
        """Trees of `nodes` nodes, whatever the shape."""
        texts = [self._texts[request_id] for request_id in request_ids]
        tails = [text[-self._depth :] for text in texts]
        self._corpus.batch_put(tails)  # stock inserts after the verification, before the next lookup: the same state
        self._corpus.synchronize()
        tokens, mask = self._corpus.batch_get(list(request_ids), tails, [len(text) for text in texts])
        trees = zip(tokens.reshape(-1, self._nodes), mask.reshape(-1, self._nodes, self._nodes), strict=True)
        return [Proposal(drafts.tolist(), [_parent(row[:i]) for i, row in enumerate(seen)]) for drafts, seen in trees]


def _parent(ancestors: Sequence[int]) -> int:
    return max((node for node, is_ancestor in enumerate(ancestors) if is_ancestor), default=-1)


def accepted_drafts(proposal: Proposal, coming: Sequence[int]) -> int:
    """Drafts of the tree that the coming tokens accept, walking from the root; the last token is never a draft's."""
    node, accepted = 0, 0
    for token in coming[:-1]:
        children = (i for i, parent in enumerate(proposal.parents) if parent == node and proposal.tokens[i] == token)
        node = next(children, -1)
        if node < 0:
            break
        accepted += 1
    return accepted


def replay(
    rollouts: Sequence[Rollout], drafter: Drafter, shape: Shape, running: int, epoch: int = 0
) -> tuple[list[int], float, float]:
    """Replay all rollouts, at most `running` at a time.

    Returns:
        Tokens produced by each verification, seconds spent in `propose`, and in everything else of the drafter.
    """
    waiting = deque(enumerate(rollouts))
    live: dict[str, list[int]] = {}
    done: dict[str, int] = {}
    lengths: list[int] = []
    proposing = keeping = 0.0
    while waiting or live:
        while waiting and len(live) < running:
            number, (prompt, response) = waiting.popleft()
            name = f"r{number}"
            drafter.begin(name, prompt, epoch)
            drafter.extend(name, response[:1])  # the prefill's token
            live[name], done[name] = response, 1
        began = time.perf_counter()
        proposals = drafter.propose(list(live), shape)
        proposing += time.perf_counter() - began
        for name, proposal in zip(list(live), proposals, strict=True):
            coming = live[name][done[name] :]
            produced = min(accepted_drafts(proposal, coming) + 1, len(coming))
            began = time.perf_counter()
            drafter.extend(name, coming[:produced])
            done[name] += produced
            lengths.append(produced)
            if done[name] >= len(live[name]):
                drafter.finish(name)
                del live[name]
            keeping += time.perf_counter() - began
    return lengths, proposing, keeping


def read(path: Path) -> list[Rollout]:
    """The rollouts of a file, those with a token to predict."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [(line["prompt"], line["response"]) for line in lines if len(line["response"]) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", type=Path)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 4], help="requests at a time")
    parser.add_argument("--strategies", nargs="+", default=["ngram:3x1@4", "ngram:7x1@8", "ngram:15x1@16"])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--sglang", action="store_true", help="also SGLang's corpus; it is compiled when first used")
    args = parser.parse_args()
    rollouts = read(args.rollouts)
    print(f"{len(rollouts)} responses, {sum(len(response) for _, response in rollouts)} tokens")
    for text in args.strategies:
        strategy = Strategy.parse(text)
        shape = Shape(strategy.num_steps, strategy.topk, strategy.num_draft_tokens)
        for running in args.running:
            makes: dict[str, Callable[[], Drafter]] = {"ours": NgramCorpus}
            for match in ("BFS", "PROB") if args.sglang else ():
                makes[match] = partial(SGLangCorpus, shape.num_draft_tokens, match)
            for name, make in makes.items():
                drafter = make()
                for epoch in range(args.epochs):
                    report(
                        f"{text:14} running {running} epoch {epoch} {name:5}", rollouts, drafter, shape, running, epoch
                    )


def report(title: str, rollouts: Sequence[Rollout], drafter: Drafter, shape: Shape, running: int, epoch: int) -> None:
    """Replay once and print one line."""
    lengths, proposing, keeping = replay(rollouts, drafter, shape, running, epoch)
    micros = 1e6 / len(lengths)
    line = f"{title} accept length {sum(lengths) / len(lengths):.2f}; {micros * proposing:.0f} us a proposal"
    line += f", {micros * keeping:.0f} us kept"
    if isinstance(drafter, NgramCorpus):
        counts = drafter.metrics()
        line += "; accepted " + " ".join(f"{source}={counts[f'accepted/{source}']}" for source in SOURCES)
    print(line, flush=True)


if __name__ == "__main__":
    main()
