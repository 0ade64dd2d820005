"""Suffix automata over growing token sequences: the longest suffix of a sequence that was followed by something before.

An `Automaton` holds many sequences that grow side by side, a token at a time (the generalised suffix automaton: Blumer
et al. 1985, Mohri et al. 2009). A state stands for all contexts that occur at the same places; its transitions are the
tokens that followed, its count is how often it was seen. An `Index` is two automata, the older of which is thrown away
when the younger is full: memory is bounded, and what was said last is never what is lost. Knows tokens, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

ROOT = 0
_COUNTED = 64
"""Suffix links along which an appended token is counted: text that repeats itself endlessly has paths as long as it."""

Place = tuple["Automaton", int, int]
"""An automaton, a state of it, and how many tokens of context are matched there."""


class Automaton:
    """Sequences that share their common contexts. A state is an index; `ROOT` is the empty context.

    Each sequence is known by its end, the state of all of it; two sequences begin as one where they share a start.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self.owner = [-1]
        self.tokens = 0

    def append(self, end: int, token: int, owner: int) -> int:
        """Append a token to the sequence that ends at `end`; amortised constant time.

        Args:
            owner: remembered for the contexts that the token completes, as the last one that wrote them.

        Returns:
            The sequence's new end.
        """
        following = self.next[end].get(token)
        if following is None:
            new = self._new(self.length[end] + 1)
            self._link_new(end, token, new)
        elif self.length[following] == self.length[end] + 1:
            new = following
        else:
            new = self._split(end, token, following)
        self.tokens += 1
        count, owners, link, state = self.count, self.owner, self.link, new
        for _ in range(_COUNTED):
            if state <= ROOT:
                break
            count[state] += 1
            owners[state] = owner
            state = link[state]
        return new

    def advance(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The longest suffix of `matched` tokens at `state` and `token` that is in the automaton: (state, matched)."""
        following = self.next[state].get(token)
        while following is None:
            if state == ROOT:
                return ROOT, 0
            state = self.link[state]
            matched = self.length[state]
            following = self.next[state].get(token)
        return following, matched + 1

    def longest(self, state: int, matched: int) -> tuple[int, int]:
        """The longest suffix of the context that something follows: (state, matched), (`ROOT`, 0) if there is none."""
        while state > ROOT and not self.next[state]:
            state = self.link[state]
            matched = self.length[state]
        return state, matched

    def _new(self, length: int) -> int:
        self.next.append({})
        self.link.append(ROOT)
        self.length.append(length)
        self.count.append(0)
        self.owner.append(-1)
        return len(self.link) - 1

    def _link_new(self, end: int, token: int, new: int) -> None:
        """Give the contexts of `end` the transition to `new`, and `new` its suffix link."""
        transitions, link = self.next, self.link
        while end != -1 and token not in transitions[end]:
            transitions[end][token] = new
            end = link[end]
        if end != -1:
            following = transitions[end][token]
            exact = self.length[following] == self.length[end] + 1
            link[new] = following if exact else self._split(end, token, following)

    def _split(self, end: int, token: int, state: int) -> int:
        """Part the contexts of `state` no longer than that of `end` and `token` from the longer ones."""
        short = self._new(self.length[end] + 1)
        transitions, link = self.next, self.link
        transitions[short] = dict(transitions[state])
        self.count[short], self.owner[short] = self.count[state], self.owner[state]
        link[short], link[state] = link[state], short
        while end != -1 and transitions[end].get(token) == state:
            transitions[end][token] = short
            end = link[end]
        return short


class Trail:
    """One sequence in an `Index`: its end in the younger automaton, and its longest match in the older one."""

    __slots__ = ("end", "generation", "matched", "old_state")

    def __init__(self, generation: int) -> None:
        self.generation, self.end = generation, ROOT
        self.old_state, self.matched = ROOT, 0

    def copy(self) -> Trail:
        """A sequence that begins as this one and goes its own way."""
        other = Trail(self.generation)
        other.end, other.old_state, other.matched = self.end, self.old_state, self.matched
        return other


class Index:
    """At most `max_tokens` tokens of many sequences, in two automata.

    Args:
        max_tokens: when half of it is in the younger automaton, that becomes the older, and the older is forgotten.
    """

    def __init__(self, max_tokens: int) -> None:
        self._half = max(1, max_tokens // 2)
        self.young, self.old = Automaton(), Automaton()
        self.generation = 0
        self.evicted = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.young.tokens + self.old.tokens

    def trail(self) -> Trail:
        """A new, empty sequence."""
        return Trail(self.generation)

    def extend(self, trail: Trail, tokens: Iterable[int], owner: int) -> None:
        """Append tokens to a sequence."""
        for token in tokens:
            self._follow(trail)
            trail.end = self.young.append(trail.end, token, owner)
            if self.old.tokens:
                trail.old_state, trail.matched = self._advance_old(trail, token)
            if self.young.tokens >= self._half:
                self._turn()

    def places(self, trail: Trail) -> Iterator[Place]:
        """Where the sequence's longest continued suffix is, in each automaton that has one."""
        self._follow(trail)
        young, old = self.young, self.old
        state, matched = young.longest(trail.end, young.length[trail.end])
        if matched:
            yield young, state, matched
        if old.tokens:
            state, matched = old.longest(trail.old_state, trail.matched)
            if matched:
                yield old, state, matched

    def _advance_old(self, trail: Trail, token: int) -> tuple[int, int]:
        return self.old.advance(trail.old_state, trail.matched, token)

    def _turn(self) -> None:
        self.evicted += self.old.tokens
        self.old, self.young = self.young, Automaton()
        self.generation += 1

    def _follow(self, trail: Trail) -> None:
        """Take a sequence along that was written before the automata last changed places."""
        if trail.generation == self.generation:
            return
        recent = trail.generation == self.generation - 1
        trail.old_state = trail.end if recent else ROOT
        trail.matched = self.old.length[trail.end] if recent else 0
        trail.end, trail.generation = ROOT, self.generation
