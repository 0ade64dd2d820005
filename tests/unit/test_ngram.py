"""The model-free drafter's corpus: what it finds, what it proposes, and what its bounds forget.

What it would catch: a match that is not the longest one, a continuation or a count that the texts do not have, siblings
or former epochs that are not seen (or seen by those who are none), a tree of another shape than was asked for, memory
that grows, and a judgement of drafts that differs from the tokens that were accepted.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from tlt_verl.engine.ngram import SOURCES, Limits, NgramCorpus
from tlt_verl.engine.ngram_automaton import ROOT, Automaton, Index
from tlt_verl.engine.ngram_draft import tree_arrays
from tlt_verl.engine.ngram_tree import ALIGNED, NO_PARENT, Shape

CHAIN = Shape(7, 1, 8)
SHAPES = [Shape(1, 1, 2), CHAIN, Shape(15, 1, 16), Shape(3, 2, 7), Shape(3, 2, 11), Shape(15, 4, 16), Shape(6, 4, 24)]
PROMPT = [100, 101, 102, 103]


# --- against brute force


def continuations(texts, context):
    """What follows `context` in the texts, and how often."""
    n = len(context)
    return Counter(text[i + n] for text in texts for i in range(len(text) - n) if text[i : i + n] == context)


def longest_continued_suffix(texts, text):
    lengths = (n for n in range(len(text), 0, -1) if continuations(texts, text[-n:]))
    return next(lengths, 0)


@pytest.mark.parametrize("seed", range(30))
def test_the_automaton_finds_the_longest_suffix_that_something_followed(seed):
    """Several texts grow side by side; after every token, the match, its continuations and their counts are exact."""
    rng = random.Random(seed)
    alphabet, automaton = rng.choice([1, 2, 3, 6]), Automaton()
    texts = [[] for _ in range(rng.randint(1, 4))]
    ends = [ROOT] * len(texts)
    for _ in range(60):
        who = rng.randrange(len(texts))
        token = rng.randrange(alphabet)
        texts[who].append(token)
        ends[who] = automaton.append(ends[who], token, who)
        for text, end in zip(texts, ends, strict=True):
            state, matched = automaton.longest(end, automaton.length[end])
            assert matched == longest_continued_suffix(texts, text)
            if matched:
                found = {token: automaton.count[child] for token, child in automaton.next[state].items()}
                assert found == continuations(texts, text[-matched:])


@pytest.mark.parametrize("seed", range(20))
def test_a_text_from_elsewhere_is_matched_too(seed):
    rng = random.Random(seed)
    automaton, written, end = Automaton(), [], ROOT
    for _ in range(80):
        written.append(rng.randrange(3))
        end = automaton.append(end, written[-1], 0)
    state, matched, read = ROOT, 0, []
    for _ in range(80):
        read.append(rng.randrange(3))
        state, matched = automaton.advance(state, matched, read[-1])
        known = (
            n for n in range(len(read), 0, -1) if any(written[i : i + n] == read[-n:] for i in range(len(written)))
        )
        assert matched == next(known, 0)


@pytest.mark.parametrize("seed", range(10))
def test_an_index_is_bounded_and_forgets_the_oldest_first(seed):
    rng, index = random.Random(seed), Index(max_tokens=100)
    trails = [index.trail() for _ in range(3)]
    for appended in range(1, 501):
        index.extend(rng.choice(trails), [rng.randrange(5)], 0)
        assert index.tokens <= 100
        assert index.tokens + index.evicted == appended
    text = list(range(1000, 1040))
    index.extend(index.trail(), text, 0)
    assert index.generation > 5
    reader = index.trail()
    index.extend(reader, text[:9], 1)
    assert any(text[9] in automaton.next[state] for automaton, state, _ in index.places(reader))


def test_a_text_goes_on_matching_when_the_automata_change_places():
    """The reader's own trail was written into what is now the older automaton."""
    index = Index(max_tokens=40)
    line = list(range(15))
    reader = index.trail()
    index.extend(reader, line + line[:4], 0)  # 19 of 20: the next token but one turns
    index.extend(reader, line[4:6], 0)
    assert index.generation == 1
    (place,) = [place for place in index.places(reader) if place[0] is index.old]
    assert place[2] == 6 and list(place[0].next[place[1]]) == [line[6]]


# --- who sees what


def corpus_of(**limits):
    return NgramCorpus(Limits(**limits))


def proposed(corpus, name, shape=CHAIN, beside=()):
    """The guesses of a request's chain, padding left out, in a batch beside others."""
    *_, proposal = corpus.propose([*beside, name], shape)
    return proposal.tokens[1 : 1 + proposal.drafts]


def test_own_prompt_and_output():
    corpus = corpus_of()
    corpus.begin("a", [1, 2, 3, 4, 5, 9])
    corpus.extend("a", [2, 3])
    assert proposed(corpus, "a") == [4, 5, 9, 2, 3, 4, 5]  # and what was repeated is repeated again
    corpus.extend("a", [4, 5, 9, 7])
    assert corpus.metrics()["accepted/own"] == 3


def test_siblings_see_each_other_while_they_write():
    corpus = corpus_of()
    for name in ("a", "b"):
        corpus.begin(name, PROMPT)
    corpus.extend("a", [1, 2, 3])
    assert proposed(corpus, "b", beside=["a"])[:3] == [1, 2, 3]
    corpus.extend("b", [1, 2])
    corpus.extend("a", [4, 5])
    assert proposed(corpus, "b", beside=["a"])[:3] == [3, 4, 5]
    assert corpus.metrics()["accepted/siblings"] == 2


def test_the_newest_tokens_of_siblings_in_the_same_batch_are_seen():
    corpus = corpus_of()
    for name in ("a", "b"):
        corpus.begin(name, PROMPT)
    corpus.extend("a", [1, 2, 3])
    behind, _ = corpus.propose(["b", "a"], CHAIN)  # a is indexed after b, and before b's tree
    assert behind.tokens[1:4] == [1, 2, 3]


def test_other_prompts_are_found_in_the_global_index_alone():
    corpus = corpus_of()
    corpus.begin("a", PROMPT)
    corpus.begin("b", [7, 8])
    corpus.extend("a", [1, 2, 3, 4])
    corpus.extend("b", [1, 2])
    assert proposed(corpus, "a") == []
    assert proposed(corpus, "b")[:2] == [3, 4]
    corpus.extend("b", [3, 4])
    assert corpus.metrics()["accepted/global"] == 2


def test_responses_of_former_epochs_are_found_though_their_group_is_gone():
    corpus = corpus_of(group_tokens=60, global_tokens=2)
    answer = list(range(30))
    corpus.begin("a", PROMPT, epoch=0)
    corpus.extend("a", answer)
    corpus.finish("a")
    for number in range(4):  # other prompts push the group out
        corpus.begin(f"x{number}", [200 + number])
        corpus.extend(f"x{number}", [300 + i for i in range(25)])
        corpus.propose([f"x{number}"], CHAIN)
    corpus.begin("b", PROMPT, epoch=1)
    corpus.extend("b", answer[:1])
    assert proposed(corpus, "b") == answer[1:8]
    corpus.extend("b", answer[1:8])
    assert corpus.metrics()["accepted/former"] == 7


def test_a_single_other_token_is_overlooked():
    """The lines differ in one token; behind it the text is known again at once, though the suffix never was there."""
    corpus = corpus_of()
    corpus.begin("a", PROMPT)
    line = [1, 2, 3, 4, 0, 5, 6, 7, 8]
    corpus.extend("a", [*line, 1, 2, 3])
    assert proposed(corpus, "a", Shape(1, 1, 2)) == [4]
    corpus.extend("a", [4])
    assert proposed(corpus, "a", Shape(1, 1, 2)) == [0]
    corpus.extend("a", [55])
    (proposal,) = corpus.propose(["a"], Shape(3, 1, 4))
    assert proposal.tokens[1:] == [5, 6, 7] and proposal.kinds[1:] == [ALIGNED] * 3
    corpus.extend("a", [5])
    corpus.extend("a", [6, 7])  # decoded without being asked
    (proposal,) = corpus.propose(["a"], Shape(1, 1, 2))
    assert ALIGNED not in proposal.kinds


def test_a_request_without_any_match_gets_padding_alone():
    corpus = corpus_of()
    corpus.begin("a", PROMPT)
    corpus.extend("a", [1])
    (proposal,) = corpus.propose(["a"], CHAIN)
    assert (proposal.drafts, proposal.expected) == (0, 1.0)
    assert proposal.tokens == [1] * 8 and proposal.parents == [-1, 0, 1, 2, 3, 4, 5, 6]
    corpus.extend("a", [1, 1, 2])  # padding that is accepted by chance is no guess that was right
    assert corpus.metrics()["accepted"] == 0


# --- trees


def random_corpus(rng, requests=4):
    corpus = corpus_of()
    for number in range(requests):
        corpus.begin(f"r{number}", [rng.randrange(6) for _ in range(rng.randint(1, 12))])
        corpus.extend(f"r{number}", [rng.randrange(6) for _ in range(rng.randint(0, 60))])
    return corpus, [f"r{number}" for number in range(requests)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_every_tree_has_exactly_the_shape_that_was_asked_for(shape, seed):
    rng = random.Random(seed)
    corpus, names = random_corpus(rng)
    for _ in range(6):
        for proposal in corpus.propose(names, shape):
            n = shape.num_draft_tokens
            assert len(proposal.tokens) == len(proposal.parents) == len(proposal.cells) == n
            assert proposal.parents[0] == NO_PARENT
            assert all(low <= high for low, high in pairwise(proposal.parents[1:]))  # breadth first
            assert all(parent < node for node, parent in enumerate(proposal.parents))
            tree_arrays(proposal.parents, shape)  # depth, width and number of parents
            guesses = [(proposal.parents[i], proposal.tokens[i]) for i in range(1, n) if proposal.cells[i] >= 0]
            assert len(guesses) == len(set(guesses)) == proposal.drafts
            assert 1 <= proposal.expected <= n
        for name in names:
            corpus.extend(name, [rng.randrange(6) for _ in range(rng.randint(1, 3))])


def test_a_tree_branches_where_siblings_disagreed():
    corpus = corpus_of()
    for name, token in (("a", 1), ("b", 2), ("c", 2), ("d", 3)):
        corpus.begin(name, PROMPT)
        corpus.extend(name, [9, token, 50 + token])
    corpus.begin("e", PROMPT)
    corpus.extend("e", [9])
    *_, proposal = corpus.propose(["a", "b", "c", "d", "e"], Shape(2, 3, 7))
    assert proposal.parents == [-1, 0, 0, 0, 1, 2, 3]
    assert proposal.tokens == [9, 2, *proposal.tokens[2:4], 52, *(50 + token for token in proposal.tokens[2:4])]
    assert set(proposal.tokens[2:4]) == {1, 3}


@pytest.mark.parametrize("numbers", [(3, 1, 5), (2, 2, 8), (1, 4, 6), (3, 1, 1)])
def test_a_shape_that_no_tree_has_is_refused(numbers):
    with pytest.raises(ValueError, match="nodes do not fit"):
        Shape(*numbers)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 1.0])
def test_the_promised_accept_length_is_the_one_that_comes(noise):
    """A line repeated with random tokens in it: trust is measured, so what it promises holds on the average."""
    corpus, rng, line = corpus_of(), random.Random(0), list(range(12))
    corpus.begin("a", PROMPT)
    corpus.extend("a", line * 2)
    promised, produced, position = [], [], 0
    for _ in range(1200):
        (proposal,) = corpus.propose(["a"], CHAIN)
        tokens, accepting = [], True
        while accepting and len(tokens) < len(proposal.tokens):
            tokens.append(rng.randrange(12) if rng.random() < noise else line[position % 12])
            accepting = tokens[-1] == dict(enumerate(proposal.tokens)).get(len(tokens))
            position += 1
        corpus.extend("a", tokens)
        promised.append(proposal.expected)
        produced.append(len(tokens))
    settled = slice(400, None)
    assert sum(promised[settled]) == pytest.approx(sum(produced[settled]), rel=0.08)


# --- bounds


def test_memory_is_bounded_and_what_is_forgotten_is_counted():
    rng = random.Random(0)
    limits = {"group_tokens": 500, "global_tokens": 300, "stored_tokens": 400, "former_responses": 3}
    corpus, written = corpus_of(**limits), 0
    for number in range(120):
        name = f"r{number}"
        corpus.begin(name, [number % 7, 1000])
        for _ in range(10):
            corpus.propose([name], CHAIN)
            corpus.extend(name, [rng.randrange(50) for _ in range(4)])
        corpus.finish(name)
        written += 40
        counts = corpus.metrics()
        assert counts["held/group"] <= 500 and counts["held/global"] <= 300 and counts["held/stored"] <= 400
    assert counts["held/stored"] + counts["evicted/stored"] == written
    assert counts["evicted/group"] > 0 and counts["evicted/global"] > 0


def test_more_live_groups_than_there_is_room_for_do_not_push_each_other_out():
    """Those that have a group keep it; the others are refused one, and do not make and lose it at every step."""
    corpus = corpus_of(group_tokens=400, global_tokens=10)
    names = [f"r{number}" for number in range(10)]
    for number, name in enumerate(names):
        corpus.begin(name, [1000 * number + i for i in range(50)])
        corpus.extend(name, [1000 * number])
    evicted = []
    for step in range(1, 30):
        proposals = corpus.propose(names, CHAIN)
        counts = corpus.metrics()
        assert counts["held/group"] <= 400
        evicted.append(counts["evicted/group"])
        for number, name in enumerate(names):
            corpus.extend(name, [1000 * number + step % 50])
    assert evicted[-1] <= 150, "groups come and go"
    assert sum(proposal.drafts == 7 for proposal in proposals) >= 4
    for name in names[:9]:
        corpus.finish(name)
    for _ in range(3):
        last = corpus.propose(["r9"], CHAIN)
    assert last[0].drafts == 7, "there is room now"


def test_one_request_longer_than_its_group_may_be_is_bounded():
    corpus = corpus_of(group_tokens=100, catch_up=1000)
    corpus.begin("a", PROMPT)
    for _ in range(50):
        corpus.extend("a", list(range(10)))
        corpus.propose(["a"], CHAIN)
        assert corpus.metrics()["held/group"] <= 100
    assert proposed(corpus, "a")[:3] == [0, 1, 2]


def test_what_was_written_unasked_is_caught_up_a_little_a_step():
    """While nobody asks for proposals nothing is indexed; afterwards a step indexes no more than the limits say."""
    corpus = corpus_of(catch_up=100, backlog=50, global_tokens=2)
    text = list(range(1000, 1600))
    corpus.begin("a", PROMPT)
    corpus.extend("a", text)
    corpus.begin("b", PROMPT)
    corpus.extend("b", text[:1])
    assert corpus.metrics()["held/group"] == 0
    held = []
    for _ in range(14):
        corpus.propose(["a", "b"], CHAIN)
        held.append(corpus.metrics()["held/group"])
    assert max(high - low for low, high in pairwise(held)) <= 50
    assert proposed(corpus, "b") == text[1:8]


def test_a_prompt_is_searched_to_its_bound():
    corpus = corpus_of(prompt_tokens=4)
    corpus.begin("a", [1, 2, 3, 4, 5, 6, 1])
    assert corpus.propose(["a"], CHAIN)[0].drafts == 0
    assert corpus.metrics()["held/group"] == 4


def test_requests_that_finish_are_forgotten_and_names_can_come_again():
    corpus = corpus_of()
    corpus.begin("a", PROMPT)
    with pytest.raises(ValueError, match="already there"):
        corpus.begin("a", PROMPT)
    corpus.finish_all()
    assert "a" not in corpus
    corpus.finish("a")
    corpus.begin("a", PROMPT)
    with pytest.raises(ValueError, match="no prompt"):
        corpus.begin("b", [])


@pytest.mark.parametrize("seed", range(5))
def test_a_replay_is_deterministic_and_its_counts_add_up(seed):
    def replayed():
        rng = random.Random(seed)
        corpus, names = random_corpus(rng)
        found = []
        for _ in range(20):
            proposals = corpus.propose(names, Shape(6, 2, 9))
            found += [(proposal.tokens, proposal.parents) for proposal in proposals]
            for name, proposal in zip(names, proposals, strict=True):
                taken = rng.randint(0, 2)
                corpus.extend(name, [*proposal.tokens[1 : 1 + taken], rng.randrange(6)])
        return found, corpus.metrics()

    (found, counts), again = replayed(), replayed()
    assert (found, counts) == again
    assert counts["accepted"] == sum(counts[f"accepted/{source}"] for source in SOURCES)
    assert 0 < counts["accepted"] <= counts["drafted"]
