"""The model-free drafter: what was written before is proposed again.

Three kinds of text are searched for the longest suffix of a request that something followed: the request's own prompt
and response, its siblings' (the requests with the same prompt, as they are being generated, and the responses of former
epochs), and the responses to all other prompts. Tokens are taken in as they come and indexed only when somebody asks
for proposals, so a corpus that is not asked costs an append a step. All memory is bounded in tokens, and what the
bounds cost is counted. Knows tokens and request names; neither SGLang nor torch nor a device.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tlt_verl.engine.ngram_automaton import Index, Trail
from tlt_verl.engine.ngram_tree import ALIGNED, GLOBAL, GROUP, Places, Proposal, Shape, Trust, propose

SOURCES = ("own", "siblings", "former", "global", "aligned")

_TAIL = 64  # tokens that an overlong backlog keeps as the context of what comes


@dataclass(frozen=True)
class Limits:
    """Bounds of a corpus, in tokens unless said otherwise. An indexed token takes about 0.5 KiB, a stored one 4 bytes.

    Args:
        group_tokens: indexed of all prompts' groups together; the groups used least recently go first.
        global_tokens: indexed of the responses to all prompts.
        stored_tokens: kept of former responses; the prompts used least recently go first.
        former_responses: responses kept a prompt.
        prompt_tokens: of a prompt, its last ones, that are searched.
        catch_up: of one request, that are indexed in one step; what is more waits.
        backlog: of what waits, that is indexed in one step.
    """

    group_tokens: int = 1 << 18
    global_tokens: int = 1 << 16
    stored_tokens: int = 1 << 22
    former_responses: int = 8
    prompt_tokens: int = 4096
    catch_up: int = 512
    backlog: int = 256


@dataclass(eq=False)
class _Group:
    """The requests of one prompt."""

    index: Index
    start: Trail  # behind the prompt
    waiting: deque[tuple[Trail, int, array]] = field(default_factory=deque)
    used: int = 0  # the call of `propose` that used it last


@dataclass(eq=False)
class _Request:
    key: bytes
    prompt: Sequence[int]
    owner: int
    response: array = field(default_factory=lambda: array("i"))
    group: _Group | None = None
    trail: Trail | None = None
    indexed: int = 0  # tokens of the response in the group's index
    everywhere: Trail | None = None
    indexed_everywhere: int = 0
    proposal: Proposal | None = None
    aligned: Places = field(default_factory=list)


class NgramCorpus:
    """Proposals from the text of the requests themselves.

    Args:
        limits: bounds of its memory and of its work.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.trust = Trust()
        self._requests: dict[str, _Request] = {}
        self._groups: OrderedDict[bytes, _Group] = OrderedDict()
        self._former: OrderedDict[bytes, deque[tuple[int, array]]] = OrderedDict()
        self._everywhere = Index(self.limits.global_tokens)
        self._begun = self._call = 0
        self._held = self._stored = 0  # tokens of all groups, and of all former responses
        self._counts: Counter[str] = Counter()

    # --- requests

    def begin(self, request_id: str, prompt: Sequence[int], epoch: int = 0) -> None:
        """A request starts. Requests whose prompts have the same tokens are siblings, or former ones of an epoch ago.

        Args:
            epoch: grows from one pass over the prompts to the next (the policy's version will do); for the metrics.

        Raises:
            ValueError: the prompt is empty, or a request of that name is running.
        """
        if not len(prompt):
            raise ValueError(f"request {request_id!r} has no prompt")
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is already there")
        self._begun += 1
        self._requests[request_id] = _Request(prompt_key(prompt), prompt, epoch << _EPOCH | self._begun)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def length(self, request_id: str) -> int:
        """Tokens of the response that were given to `extend`."""
        return len(self._requests[request_id].response)

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """The response goes on. If a proposal was made since the last call, it is judged by these tokens."""
        request = self._requests[request_id]
        request.response.extend(array("i", tokens))
        if len(tokens):
            proposal, request.proposal, request.aligned = request.proposal, None, []
            if proposal is not None:
                self._judge(request, proposal, tokens)

    def finish(self, request_id: str) -> None:
        """The request is over. Its response is kept for requests with the same prompt; unknown names are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        group = self._groups.get(request.key)
        if group is not None and (request.group is not group or request.indexed < len(request.response)):
            known = request.trail if request.group is group else None
            text = request.response[request.indexed if known is not None else 0 :]
            self._wait(group, known or group.start.copy(), request.owner, text)
        self._store(request)

    def finish_all(self) -> None:
        """No request is running any more."""
        for request_id in list(self._requests):
            self.finish(request_id)

    # --- proposals

    def propose(self, request_ids: Iterable[str], shape: Shape) -> list[Proposal]:
        """One tree for each request, rooted at its last token.

        Everything that these requests have written is indexed first, so siblings see each other's newest tokens.

        Raises:
            KeyError: a request was not begun.
        """
        requests = [self._requests[request_id] for request_id in request_ids]
        self._call += 1
        for request in requests:
            self._index(request)
        self._work(requests)
        while self._held > self.limits.group_tokens and len(self._groups) > 1:
            self._evict_group()
        for request in requests:
            root = request.response[-1] if request.response else request.prompt[-1]
            request.proposal = propose(self._places(request), root, shape, self.trust)
            self._counts["drafted"] += request.proposal.drafts
        self._counts["proposals"] += len(requests)
        return [request.proposal for request in requests if request.proposal is not None]

    def metrics(self) -> dict[str, int]:
        """Counters since the start, and sizes now.

        Returns:
            `proposals`; `drafted`, guesses in them; `accepted`, and of these `accepted/<source>`, by who wrote what was
            matched (`SOURCES`); `refused`, proposals without a group for want of room; `evicted/<where>` and
            `held/<where>`, tokens.
        """
        keys = ["proposals", "drafted", "accepted", "refused", "evicted/group", "evicted/stored", "evicted/waiting"]
        counts = {key: self._counts[key] for key in keys}
        counts |= {f"accepted/{source}": self._counts[f"accepted/{source}"] for source in SOURCES}
        counts["evicted/group"] += sum(group.index.evicted for group in self._groups.values())
        counts["evicted/global"] = self._everywhere.evicted
        held = {"group": self._held, "global": self._everywhere.tokens, "stored": self._stored}
        return counts | {f"held/{where}": tokens for where, tokens in held.items()}

    # --- what was drafted

    def _judge(self, request: _Request, proposal: Proposal, tokens: Sequence[int]) -> None:
        path = proposal.judge(tokens, self.trust)
        request.aligned = proposal.aligned(path, tokens)
        self._counts["accepted"] += len(path)
        for node in path:
            self._counts[f"accepted/{_source(proposal.kinds[node], proposal.owners[node], request.owner)}"] += 1

    def _places(self, request: _Request) -> Places:
        places: Places = []
        if request.group is not None and request.trail is not None:
            places += [(GROUP, place) for place in request.group.index.places(request.trail)]
        if request.everywhere is not None:
            places += [(GLOBAL, place) for place in self._everywhere.places(request.everywhere)]
        return places + request.aligned

    # --- what is indexed

    def _index(self, request: _Request) -> None:
        """Index what the request has written since the last time, or the end of it where that is much."""
        self._join_group(request)
        text, most = request.response, self.limits.catch_up
        if request.group is not None and request.trail is not None:
            if len(text) - request.indexed > most:
                late = len(text) - _TAIL
                self._wait(request.group, request.trail, request.owner, text[request.indexed : late])
                request.trail, request.indexed = request.group.index.trail(), late
            self._add(request.group, request.trail, text[request.indexed :], request.owner)
            request.indexed = len(text)
        if len(text) - request.indexed_everywhere > most:
            request.everywhere, request.indexed_everywhere = None, len(text) - _TAIL
        if request.everywhere is None:
            request.everywhere = self._everywhere.trail()
        self._everywhere.extend(request.everywhere, text[request.indexed_everywhere :], request.owner)
        request.indexed_everywhere = len(text)

    def _join_group(self, request: _Request) -> None:
        """Give the request its group, made where it is not there (any more) and there is room for it."""
        group = self._groups.get(request.key) or self._make_group(request)
        if group is not None:
            group.used = self._call
            self._groups.move_to_end(request.key)
        if request.group is not group:
            request.group, request.indexed = group, 0
            request.trail = None if group is None else group.start.copy()

    def _make_group(self, request: _Request) -> _Group | None:
        """Forgets groups that no running request uses; those in use keep a quarter of the room to grow."""
        prompt = request.prompt[-self.limits.prompt_tokens :]
        room = self.limits.group_tokens - self.limits.group_tokens // 4 - len(prompt)
        while self._held > room and self._groups and next(iter(self._groups.values())).used < self._call - 1:
            self._evict_group()
        if self._held > room and self._groups:
            self._counts["refused"] += 1
            return None
        index = Index(self.limits.group_tokens)
        group = self._groups[request.key] = _Group(index, index.trail())
        self._add(group, group.start, prompt, _PROMPT)
        for owner, response in self._former.get(request.key, ()):
            self._wait(group, group.start.copy(), owner, response)
        return group

    def _add(self, group: _Group, trail: Trail, tokens: Sequence[int], owner: int) -> None:
        before = group.index.tokens
        group.index.extend(trail, tokens, owner)
        self._held += group.index.tokens - before

    def _wait(self, group: _Group, trail: Trail, owner: int, tokens: array) -> None:
        """Let tokens be indexed when there is time."""
        group.waiting.append((trail, owner, tokens))
        if len(group.waiting) > self.limits.former_responses:
            self._counts["evicted/waiting"] += len(group.waiting.popleft()[2])

    def _work(self, requests: list[_Request]) -> None:
        """Index some of what waits in the groups of these requests."""
        left = self.limits.backlog
        for group in {id(request.group): request.group for request in requests}.values():
            while group is not None and group.waiting and left > 0:
                trail, owner, tokens = group.waiting.popleft()
                self._add(group, trail, tokens[:left], owner)
                if len(tokens) > left:
                    group.waiting.appendleft((trail, owner, tokens[left:]))
                left -= len(tokens)

    # --- bounds

    def _evict_group(self) -> None:
        """Forget the group that was used least recently."""
        _, group = self._groups.popitem(last=False)
        self._held -= group.index.tokens
        self._counts["evicted/group"] += group.index.tokens + group.index.evicted
        self._counts["evicted/waiting"] += sum(len(tokens) for *_, tokens in group.waiting)

    def _store(self, request: _Request) -> None:
        """Keep a response for the requests of later epochs."""
        if not request.response:
            return
        kept = self._former.setdefault(request.key, deque())
        self._former.move_to_end(request.key)
        kept.append((request.owner, request.response))
        self._stored += len(request.response)
        if len(kept) > self.limits.former_responses:
            self._drop(kept.popleft()[1])
        while self._stored > self.limits.stored_tokens:
            key, oldest = next(iter(self._former.items()))
            self._drop(oldest.popleft()[1])
            if not oldest:
                del self._former[key]

    def _drop(self, response: array) -> None:
        self._stored -= len(response)
        self._counts["evicted/stored"] += len(response)


_PROMPT = 0  # owner of a prompt; requests count from 1
_EPOCH = 40  # bits of an owner that number the requests; those above them are its epoch


def _source(kind: int, owner: int, reader: int) -> str:
    """Whose text a guess came from; `owner` and `reader` are requests."""
    if kind == GROUP:
        return "own" if owner in (_PROMPT, reader) else "former" if owner >> _EPOCH < reader >> _EPOCH else "siblings"
    return "aligned" if kind == ALIGNED else "global"


def prompt_key(prompt: Sequence[int]) -> bytes:
    """What siblings share: a hash of the prompt's tokens."""
    return hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).digest()
