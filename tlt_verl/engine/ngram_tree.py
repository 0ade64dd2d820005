"""From places in automata to a tree of drafts: which tokens, in which order of trust, in exactly N nodes.

Trust is measured, not assumed: every draft that was judged (its parent was accepted) is counted under the kind of its
place, the length of its match and its share among the continuations of its context. The tree is grown best first by
the product of these accept rates along the path. Knows neither requests nor SGLang.

A place is of one of three kinds. GROUP and GLOBAL are exact matches, in the index of the request's own prompt and in
that of all prompts. ALIGNED overlooks single tokens: where a text that was followed so far has another token (another
digit in the same line), it is followed on behind that token, as long as it is right again.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from tlt_verl.engine.ngram_automaton import Place

GROUP, GLOBAL, ALIGNED = range(3)
NO_PARENT = -1

Places = list[tuple[int, Place]]
"""Kinds and places: where a path stands. Something follows each of them."""

_NOTHING = -1  # cell, owner and kind of a node that is no guess: the root and padding
_CONTINUATIONS = 64
"""Continuations of one context that are looked at; only very short contexts have more."""


class Trust:
    """The accept rate of a draft, given that its parent was accepted, by kind, match length (octaves) and share."""

    LENGTHS, SHARES = 8, 5
    _PRIOR, _MEMORY = 8.0, 256.0  # judgements that the first guess is worth; after which older ones count half

    def __init__(self) -> None:
        self._tries = [self._PRIOR] * (3 * self.LENGTHS * self.SHARES)
        self.rates = [
            (1 - 0.6 / (1 + length)) * (share + 0.5) / self.SHARES
            for _ in (GROUP, GLOBAL, ALIGNED)
            for length in range(self.LENGTHS)
            for share in range(self.SHARES)
        ]

    @classmethod
    def cell(cls, kind: int, matched: int, seen: int, all_seen: int) -> int:
        """Index into `rates` of a draft whose context of `matched` tokens was seen `all_seen` times, `seen` so."""
        length = min(matched.bit_length(), cls.LENGTHS) - 1
        share = min(cls.SHARES - 1, cls.SHARES * seen // all_seen) if all_seen else 0
        return (kind * cls.LENGTHS + length) * cls.SHARES + share

    def judge(self, cell: int, accepted: bool) -> None:
        """Count a draft whose parent was accepted."""
        tries = self._tries[cell] + 1
        self.rates[cell] += (accepted - self.rates[cell]) / tries
        self._tries[cell] = tries if tries < self._MEMORY else tries / 2


@dataclass(frozen=True)
class Shape:
    """What a tree may look like; the numbers of a `Strategy`.

    Args:
        num_steps: most drafts on a path.
        topk: most drafts behind one node; 1 makes a chain.
        num_draft_tokens: nodes, the root included: exactly so many.

    Raises:
        ValueError: a tree of that depth and width has fewer nodes.
    """

    num_steps: int
    topk: int
    num_draft_tokens: int

    def __post_init__(self) -> None:
        if not 1 < self.num_draft_tokens <= 1 + self.topk + (self.num_steps - 1) * self.topk**2:
            raise ValueError(f"{self.num_draft_tokens} nodes do not fit in a tree of {self.num_steps}x{self.topk}")

    @property
    def most_parents(self) -> int:
        """Nodes other than the root that may have drafts behind them, as in the trees of EAGLE's builder."""
        return self.topk * (self.num_steps - 1)


@dataclass
class Proposal:
    """A tree of N nodes, breadth first.

    Args:
        tokens: [N]; the first is the root, the request's last token.
        parents: [N]; a parent stands before its children, `NO_PARENT` for the root.
        drafts: nodes that stand for a guess; the others only fill the tree, and are verified like any.
        expected: accept length that the trust in the drafts promises, the bonus token included.
        cells, owners, kinds: [N], of the place that each guess came from; -1 for the root and padding.
        places: [N], where the path to each node stands; empty for padding.
    """

    tokens: list[int]
    parents: list[int]
    drafts: int = 0
    expected: float = 1.0
    cells: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    places: list[Places] = field(default_factory=list)

    def judge(self, produced: Sequence[int], trust: Trust) -> list[int]:
        """Tell `trust` what became of the guesses, given the tokens that the verification produced.

        Returns:
            The accepted guesses, in the order of the path, without the root.
        """
        node, path = 0, []
        for token in produced:
            accepted = NO_PARENT
            for child in range(node + 1, len(self.tokens)):
                if self.parents[child] == node and self.cells[child] != _NOTHING:
                    hit = self.tokens[child] == token
                    trust.judge(self.cells[child], hit)
                    accepted = child if hit else accepted
            if accepted == NO_PARENT:
                break
            node = accepted
            path.append(node)
        return path

    def aligned(self, path: Sequence[int], produced: Sequence[int]) -> Places:
        """The ALIGNED place behind the first token that was not accepted, if any, for the next tree.

        Args:
            path: what `judge` returned for `produced`.
        """
        if len(path) >= len(produced):
            return []
        token, fresh = produced[len(path)], None
        for kind, place in self.places[path[-1] if path else 0]:
            foreseen = token in place[0].next[place[1]]
            if kind == ALIGNED and (foreseen or place[2] > 1):  # never two tokens overlooked in a row
                return _if_continued(_overlook(place, token))
            if kind != ALIGNED and not foreseen and fresh is None:
                fresh = place
        return [] if fresh is None else _if_continued(_overlook(fresh, token))


def propose(places: Places, root: int, shape: Shape, trust: Trust) -> Proposal:
    """Grow the tree behind `root`.

    Args:
        places: of the root, in order of preference between equals.
    """
    tree = _Tree(root, places, shape)
    if shape.topk == 1:
        _grow_chain(tree, places, shape, trust)
    else:
        _grow_tree(tree, places, shape, trust)
    return tree.filled()


def _grow_chain(tree: _Tree, places: Places, shape: Shape, trust: Trust) -> None:
    """Always the likeliest continuation of all places."""
    rates, probability = trust.rates, 1.0
    for node in range(shape.num_draft_tokens - 1):
        best_rate, best = 0.0, (0, 0, 0, 0)
        for kind, (automaton, state, matched) in places:
            count, following = automaton.count, automaton.next[state]
            if len(following) == 1:
                ((token, child),) = following.items()
            else:
                token, child = max(islice(following.items(), _CONTINUATIONS), key=lambda item: count[item[1]])
            cell = trust.cell(kind, matched, count[child], count[state])
            if rates[cell] > best_rate:
                best_rate, best = rates[cell], (token, cell, automaton.owner[child], kind)
        if not best_rate:
            break
        probability *= best_rate
        places = _advance(places, best[0])
        tree.add(node, *best, places, probability)


def _grow_tree(tree: _Tree, places: Places, shape: Shape, trust: Trust) -> None:
    """Always the likeliest path of those that may be added."""
    queue: list[tuple[float, int, int, tuple[int, int, int, int]]] = []
    node, ticket = 0, 0  # tickets: between equals the first one counts
    while True:
        if tree.depths[node] < shape.num_steps:
            for rate, guess in _guesses(tree.places[node], shape.topk, trust):
                ticket += 1
                heapq.heappush(queue, (-tree.probabilities[node] * rate, ticket, node, guess))
        while queue and not tree.takes(queue[0][2]):
            heapq.heappop(queue)
        if not queue or len(tree.tokens) == shape.num_draft_tokens:
            break
        negative, _, parent, guess = heapq.heappop(queue)
        node = tree.add(parent, *guess, _advance(tree.places[parent], guess[0]), -negative)


def _guesses(places: Places, topk: int, trust: Trust) -> list[tuple[float, tuple[int, int, int, int]]]:
    """The topk likeliest continuations of all places: accept rate and (token, cell, owner, kind), best first."""
    best: dict[int, tuple[float, tuple[int, int, int, int]]] = {}
    for kind, (automaton, state, matched) in places:
        count, following = automaton.count, automaton.next[state]
        children = list(islice(following.items(), _CONTINUATIONS))
        if len(children) > 1:
            children = sorted(children, key=lambda item: -count[item[1]])[:topk]
        for token, child in children:
            cell = trust.cell(kind, matched, count[child], count[state])
            rate = trust.rates[cell]
            if token not in best or rate > best[token][0]:
                best[token] = (rate, (token, cell, automaton.owner[child], kind))
    return sorted(best.values(), key=lambda guess: -guess[0])[:topk]


def _advance(places: Places, token: int) -> Places:
    """The places behind `token` that something follows."""
    moved = []
    for kind, place in places:
        automaton, state, matched = place
        child = automaton.next[state].get(token)
        if child is not None and automaton.next[child]:
            moved.append((kind, (automaton, child, matched + 1)))
        elif kind == ALIGNED:
            moved += _if_continued(_overlook(place, token))
        else:
            state, matched = automaton.longest(*automaton.advance(state, matched, token))
            if matched:
                moved.append((kind, (automaton, state, matched)))
    return moved


def _overlook(place: Place, token: int) -> Place:
    """The place behind `token`, or behind its likeliest continuation where that is another; tokens right since."""
    automaton, state, matched = place
    following = automaton.next[state]
    child = following.get(token)
    if child is not None:
        return automaton, child, matched + 1
    return automaton, max(following.values(), key=automaton.count.__getitem__), 1


def _if_continued(place: Place) -> Places:
    return [(ALIGNED, place)] if place[0].next[place[1]] else []


class _Tree:
    """Nodes in the order in which they are added, and the shape's limits."""

    def __init__(self, root: int, places: Places, shape: Shape) -> None:
        self._shape, self._parents_left = shape, shape.most_parents
        self.tokens, self.parents, self.depths, self.children = [root], [NO_PARENT], [0], [0]
        self.cells, self.owners, self.kinds = [_NOTHING], [_NOTHING], [_NOTHING]
        self.places, self.probabilities = [places], [1.0]

    def takes(self, parent: int) -> bool:
        """Whether a node may be added behind `parent`."""
        children = self.children[parent]
        fits = children < self._shape.topk and self.depths[parent] < self._shape.num_steps
        return fits and (parent == 0 or children > 0 or self._parents_left > 0)

    def add(self, parent: int, token: int, cell: int, owner: int, kind: int, places: Places, probability: float) -> int:
        """Add a node that `takes` allows; its number."""
        self._parents_left -= parent != 0 and self.children[parent] == 0
        self.children[parent] += 1
        self.children.append(0)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.cells.append(cell)
        self.owners.append(owner)
        self.kinds.append(kind)
        self.places.append(places)
        self.probabilities.append(probability)
        return len(self.tokens) - 1

    def filled(self) -> Proposal:
        """The tree with padding, a repetition of the root's token, up to exactly N nodes; breadth first."""
        found = Proposal(self.tokens, self.parents, len(self.tokens) - 1, sum(self.probabilities))
        found.cells, found.owners, found.kinds, found.places = self.cells, self.owners, self.kinds, self.places
        while len(self.tokens) < self._shape.num_draft_tokens:
            parent = next(node for node in reversed(range(len(self.tokens))) if self.takes(node))
            self.add(parent, self.tokens[0], _NOTHING, _NOTHING, _NOTHING, [], 0.0)
        if self._shape.topk > 1:
            order = self._breadth_first()
            place = {NO_PARENT: NO_PARENT} | {node: position for position, node in enumerate(order)}
            found.parents = [place[self.parents[node]] for node in order]
            found.tokens = [self.tokens[node] for node in order]
            found.cells = [self.cells[node] for node in order]
            found.owners = [self.owners[node] for node in order]
            found.kinds = [self.kinds[node] for node in order]
            found.places = [self.places[node] for node in order]
        return found

    def _breadth_first(self) -> list[int]:
        behind: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents[1:], start=1):
            behind[parent].append(node)
        order = [0]
        for node in order:
            order.extend(behind[node])
        return order
