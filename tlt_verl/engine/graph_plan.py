"""Which CUDA graphs the strategies need, for which batch sizes, and about how much memory they take.

A graph is captured for a kind of forward pass, the shape that a strategy gives it, and a batch size:

    verify  (num_draft_tokens, is a tree)           the target; `off` verifies one token
    draft   (num_steps, topk, num_draft_tokens)     the trained drafter, all its steps but the first
    extend  (num_draft_tokens,)                     the trained drafter reads what was verified

Captures are shared: verifications of one width are equal, whoever drafted. Nothing is drafted above
`max_running_for_drafting`, so only `off` needs the larger batch sizes.

Pure Python: knows neither torch nor SGLang, only SGLang's formulas, which the unit tests compare with it. What captures
is `arms`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tlt_verl.strategy import OFF, Strategy

VERIFY, DRAFT, EXTEND = "verify", "draft", "extend"


@dataclass(frozen=True)
class Capture:
    """The graphs of one kind and shape; for SGLang, one graph runner.

    Args:
        kind: `verify`, `draft` or `extend`.
        shape: as in the module's table.
        batch_sizes: requests of each graph, ascending.
    """

    kind: str
    shape: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What equal captures have in common."""
        return self.kind, self.shape

    @property
    def tokens_per_request(self) -> int:
        """Tokens that each request has in one forward pass."""
        return self.shape[1] if self.kind == DRAFT else self.shape[0]

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest forward pass."""
        return self.batch_sizes[-1] * self.tokens_per_request

    def __str__(self) -> str:
        names = {VERIFY: ("width", "tree"), DRAFT: ("steps", "topk", "width"), EXTEND: ("width",)}[self.kind]
        return f"{self.kind} " + " ".join(f"{name}={size}" for name, size in zip(names, self.shape, strict=True))


class GraphPlan:
    """The captures that strategies need.

    Args:
        strategies: what may run; `off` is added where it is missing.
        batch_sizes: that SGLang would capture; empty where there are no graphs.
        max_running_for_drafting: nothing is drafted for more requests; None for no bound.
    """

    def __init__(
        self, strategies: Iterable[Strategy], batch_sizes: Iterable[int], max_running_for_drafting: int | None = None
    ) -> None:
        self.strategies = tuple(dict.fromkeys([OFF, *strategies]))
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.drafting_sizes = up_to(self.batch_sizes, max_running_for_drafting)
        needed = {key: self._sizes(strategy) for strategy in self.strategies for key in keys_of(strategy)}
        self.captures = tuple(Capture(*key, sizes) for key, sizes in needed.items() if sizes)
        self._captures = {capture.key: capture for capture in self.captures}

    def sizes(self, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The batch sizes that are captured for a kind and shape, ascending; () for none."""
        capture = self._captures.get((kind, shape))
        return () if capture is None else capture.batch_sizes

    def sizes_of_own(self, own: Strategy, *kinds: str) -> tuple[int, ...]:
        """The batch sizes for the captures of these kinds that SGLang makes for its own arguments.

        It makes them all for the same batch sizes, and at least one where none is needed.
        """
        needed = [self.sizes(*key) for key in keys_of(own) if key[0] in kinds]
        return max(needed, key=len, default=()) or self.batch_sizes[:1]

    @property
    def logits_rows(self) -> int:
        """Rows that the logits buffer needs, which the verify and extend graphs share."""
        return max([capture.most_tokens for capture in self.captures if capture.kind != DRAFT], default=0)

    def with_own(self, own: Strategy) -> tuple[Capture, ...]:
        """The plan's captures, and those that SGLang makes for its own arguments and no strategy needs."""
        extra = []
        for kind, shape in keys_of(own):
            if not self.sizes(kind, shape):
                kinds = (VERIFY,) if kind == VERIFY else (DRAFT, EXTEND)
                extra.append(Capture(kind, shape, self.sizes_of_own(own, *kinds)))
        return self.captures + tuple(capture for capture in extra if capture.batch_sizes)

    def _sizes(self, strategy: Strategy) -> tuple[int, ...]:
        return self.batch_sizes if strategy == OFF else self.drafting_sizes


def keys_of(strategy: Strategy) -> list[tuple[str, tuple[int, ...]]]:
    """The kinds and shapes of the graphs that a strategy runs. The first step of drafts is the extend's own."""
    width = max(strategy.num_draft_tokens, 1)
    keys: list[tuple[str, tuple[int, ...]]] = [(VERIFY, (width, int(strategy.topk > 1)))]
    if strategy.drafter == "eagle":
        keys += [(DRAFT, (strategy.num_steps, strategy.topk, width))] if strategy.num_steps > 1 else []
        keys += [(EXTEND, (width,))]
    return keys


def captures_of_everything(strategies: Iterable[Strategy], batch_sizes: Iterable[int]) -> tuple[Capture, ...]:
    """What there would be without a plan: every strategy's own captures at every batch size, nothing shared."""
    sizes = tuple(sorted(set(batch_sizes)))
    return tuple(Capture(*key, sizes) for s in dict.fromkeys([OFF, *strategies]) for key in keys_of(s))


def up_to(batch_sizes: Sequence[int], most: int | None) -> tuple[int, ...]:
    """The ascending batch sizes by which up to `most` requests are covered; all for None, () for 0.

    A batch runs in the next larger graph, so the first size at or above `most` is one of them.
    """
    if most is None:
        return tuple(batch_sizes)
    below = [size for size in batch_sizes if size < most]
    return tuple(batch_sizes[: len(below) + 1]) if most > 0 else ()


def sglang_batch_sizes(most: int) -> tuple[int, ...]:
    """The batch sizes up to `most` that SGLang 0.5.17 captures with speculation.

    After `ServerArgs._generate_decode_cuda_graph_batch_sizes`; `most` is its `cuda_graph_max_bs_decode` or
    `max_running_requests`, whichever is less.
    """
    usual = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8), *range(272, most + 1, 16)]
    return tuple(sorted({size for size in usual if size <= most} | {most}))


# --- what SGLang is told, and what it reserves


def reserved_tokens(num_steps: int, topk: int, num_draft_tokens: int, page_size: int = 1) -> int:
    """Slots of the KV cache that SGLang reserves for a request's next step.

    After `sglang.srt.mem_cache.allocation_sizing.get_alloc_len_per_decode`, for an algorithm whose drafter has a cache.
    """
    if page_size == 1 or topk == 1:
        return max(num_steps * topk, num_draft_tokens)
    pages_of_branch = (2 * (page_size - 1) + num_steps) // page_size
    return max(pages_of_branch * page_size * topk, num_draft_tokens)


def largest(strategies: Iterable[Strategy], page_size: int = 1) -> tuple[int, int, int]:
    """The (num_steps, topk, num_draft_tokens) under which SGLang reserves slots enough for each of the strategies.

    The numbers describe a tree that SGLang can draft, deeper than any of the strategies where one is wider than their
    trees. Best is where they are one of the strategies: SGLang captures graphs for them in any case.
    """
    strategies = list(strategies)

    def slots(strategy: Strategy) -> tuple[int, int]:
        return reserved_tokens(strategy.num_steps, strategy.topk, 0, page_size), strategy.num_draft_tokens

    deepest = max([s for s in strategies if s.drafter == "eagle"], key=slots, default=Strategy("eagle", 1, 1, 2))
    steps, topk = deepest.num_steps, deepest.topk
    width = max([s.num_draft_tokens for s in strategies] + [deepest.num_draft_tokens])
    while Strategy("eagle", steps, topk, steps + 1).largest_tree < width:
        steps += 1
    return steps, topk, width


# --- memory

NODES_PER_LAYER = 10
"""Kernels of one decoder layer in a graph: two norms, four linear layers, rotary embedding, cache write, attention,
activation. An estimate."""
NODE_BYTES = 4 * 2**10
"""Device memory of a kernel node: 3.8 KiB on an H200 with CUDA 13, fitted together with the next one."""
GRAPH_BYTES = 2**20 // 10
"""Device memory of a graph beside its nodes and tensors; fitted."""
WORKSPACE_BYTES = 32 * 2**20
"""What is held for each set of graphs beside their tensors: 20 to 33 MiB on an H200, where cuBLAS's workspace for a
stream has this size."""


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a dense target and of a drafter with the target's width.

    Args:
        hidden: width of the hidden states.
        intermediate: width inside the MLP.
        layers: decoder layers of the target.
        vocab: rows of the target's head.
        context: longest sequence that the engine takes, in tokens.
        draft_layers: decoder layers of the drafter.
        draft_vocab: rows of the drafter's head; 0 for the target's.
        dtype_bytes: of weights and activations.
        tp_size: devices over which one engine is spread; everything below is for one of them.
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    context: int
    draft_layers: int = 1
    draft_vocab: int = 0
    dtype_bytes: int = 2
    tp_size: int = 1


@dataclass(frozen=True)
class Memory:
    """Device memory of captures by what takes it, in bytes. `workspaces` and `nodes` rest on constants that were
    measured on one device; the rest is shapes.
    """

    outputs: int = 0
    activations: int = 0
    buffers: int = 0
    logits: int = 0
    workspaces: int = 0
    nodes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.outputs + self.activations + self.buffers + self.logits + self.workspaces + self.nodes


def estimate(captures: Iterable[Capture], sizes: ModelSizes) -> Memory:
    """The device memory that captures take on one device.

    - outputs: what a graph returns stays allocated as long as the graph (`FullCudaGraphBackend._outputs`). It is the
      hidden states of the forward pass: tokens · hidden · dtype_bytes, for each graph.
    - activations: a runner captures the largest batch first and the others reuse its memory, so the largest counts.
      All runners name one pool, but each captures on a stream of its own and PyTorch does not reuse blocks across
      streams (sgl-project/sglang#33220), so they add up. Of one pass, either the head counts or the MLP.
    - buffers: inputs and FlashAttention's page tables, sized for the largest batch of a runner
      (`FlashAttentionBackend.init_cuda_graph_state`, page size 1): four of [requests, context] int32, six where topk is
      above 1; for a draft, that many for each of its num_steps - 1 backends; for a tree's verification also its mask,
      [requests, width, context + width] bytes.
    - logits: one float32 buffer for each vocabulary, as many rows as the largest verify or extend has tokens
      (`GraphSharedOutput`).
    - workspaces: WORKSPACE_BYTES for each set of graphs.
    - nodes: NODE_BYTES a kernel, GRAPH_BYTES a graph.

    What prefill's graphs take is not part of it, nor NCCL's workspaces, nor what PyTorch reserves beyond what it holds.
    """
    captures = list(captures)
    return Memory(
        outputs=sum(_outputs(capture, sizes) for capture in captures),
        activations=sum(_activations(capture, sizes) for capture in captures),
        buffers=sum(_buffers(capture, sizes) for capture in captures),
        logits=_logits(captures, sizes),
        workspaces=WORKSPACE_BYTES * len(captures),
        nodes=sum(len(c.batch_sizes) * (_nodes(c, sizes) * NODE_BYTES + GRAPH_BYTES) for c in captures),
    )


def _outputs(capture: Capture, sizes: ModelSizes) -> int:
    if capture.kind == DRAFT:
        return 0  # a few integers a draft token
    return sum(capture.batch_sizes) * capture.tokens_per_request * sizes.hidden * sizes.dtype_bytes


def _activations(capture: Capture, sizes: ModelSizes) -> int:
    """The larger of head and MLP. The head's logits are computed in shards, gathered and reordered; drafts' turned to
    float32 logits and probabilities outside the shared buffer.
    """
    vocab, tp = _vocab(capture, sizes), sizes.tp_size
    head = vocab * sizes.dtype_bytes * (1 if tp == 1 else 2) + vocab * sizes.dtype_bytes // tp * (tp > 1)
    if capture.kind == DRAFT:
        head += 2 * 4 * vocab
    mlp = (3 * sizes.intermediate // tp + 2 * sizes.hidden) * sizes.dtype_bytes
    return capture.most_tokens * max(head, mlp)


def _buffers(capture: Capture, sizes: ModelSizes) -> int:
    requests, width = capture.batch_sizes[-1], capture.tokens_per_request
    is_tree = capture.kind != EXTEND and capture.shape[1] > (0 if capture.kind == VERIFY else 1)
    tables = (6 if is_tree else 4) * requests * sizes.context * 4
    if capture.kind == DRAFT:
        return (capture.shape[0] - 1) * tables + requests * sizes.hidden * sizes.dtype_bytes
    mask = requests * width * (sizes.context + width) if is_tree else 0
    return tables + mask + capture.most_tokens * sizes.hidden * sizes.dtype_bytes


def _logits(captures: list[Capture], sizes: ModelSizes) -> int:
    read = [capture for capture in captures if capture.kind != DRAFT]
    vocabs = {_vocab(capture, sizes) for capture in read}
    return max([capture.most_tokens for capture in read], default=0) * sum(vocabs) * 4


def _nodes(capture: Capture, sizes: ModelSizes) -> int:
    """Kernels of one graph: the layers, and about as many as a layer has for embedding, head and metadata."""
    if capture.kind == VERIFY:
        return (sizes.layers + 1) * NODES_PER_LAYER
    passes = capture.shape[0] - 1 if capture.kind == DRAFT else 1
    return passes * (sizes.draft_layers + 1) * NODES_PER_LAYER


def _vocab(capture: Capture, sizes: ModelSizes) -> int:
    return sizes.vocab if capture.kind == VERIFY else sizes.draft_vocab or sizes.vocab
