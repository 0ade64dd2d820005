"""Through the real engine, the tokens of a speculating request follow the target's distribution exactly.

The joint distribution of the first tokens of a request, from 20,000 samples a case, against the exact one by
chi-square. The short form takes as many at temperature 1, for each shape, and 4,096 in the other cases (`-m long`: in
all of them). The first token comes from the prefill, all others from verification; tokens 3
to 5 need accepted drafts of every depth. Each result prints the smallest departure that it would have seen: with 20,000
samples, at a significance of 2e-5, any distribution at a total variation of 0.054 or more from the exact one (0.032
with top-k and top-p) fails with a probability of at least 0.99; with 4,096, of 0.12. There are 44 such tests
(88 with the long forms): a right engine fails the file less than once in 500. Engines are seeded and get each batch
whole, so a result is the same in every run. Held fixed here: EOS is ignored, a vocabulary of 12, one rank.

What it would catch: argmax in place of sampling, cuts in another order or another set, a draft that is accepted more
often than the target wills, a bonus token from the wrong node, wrong tree masks, positions or cache rows, and
parameters or penalties of one request that reach another. Two negative controls, both stock SGLang, must fail.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import negative_control
import pytest
import torch
from chi_square import ALPHA, chi_square
from engine_plugin import write_plugin
from engine_runner import CHAIN, SWITCH, SWITCHING, TREE, job, rounding, run_engine, speculative
from exact import ExactTarget, sequence_logprobs
from fitted_drafter import fit_drafter
from shared_models import once
from small_model import make_target
from transformers import AutoModelForCausalLM

from tlt_verl.drafter import HOT_TOKENS

pytestmark = pytest.mark.slow

PROMPT = [1, 5, 7, 2, 9, 3]
SHAPES = {"chain 3x1@4": CHAIN, "tree 3x2@6": TREE, "switching at every step": SWITCHING}
TIMEOUT_S = 600
HOT = [1, 2, 4, 7, 8, 10]
SAMPLES, FEWER, CALLS = 20000, 4096, 8
PENALISED_SAMPLES, PENALISED_CALLS = 4096, 4  # where 20,000 are not asked for
WHOLE = ("T=1",)
"""Cases with all samples in the short form, too."""

PLAIN = {
    "T=1": {"temperature": 1.0, "max_new_tokens": 5},
    "T=0.7": {"temperature": 0.7},
}
CUT = {
    "top_p=0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k=8": {"temperature": 1.0, "top_k": 8},
    "top_k=6, top_p=0.8, T=0.8": {"temperature": 0.8, "top_k": 6, "top_p": 0.8},
    "min_p=0.1": {"temperature": 1.0, "min_p": 0.1},
}
ALONE = {"min_p=0.1 alone": {"temperature": 1.0, "min_p": 0.1}}
"""In a batch of its own: whether a batch needs cutting is decided for all of its requests together."""
JOINT = "top_k=6, top_p=0.8, T=0.8"
PENALISED = {
    "repetition_penalty": {"temperature": 0.7, "repetition_penalty": 1.8},
    "frequency and presence": {"temperature": 0.7, "frequency_penalty": 0.6, "presence_penalty": 0.5},
    "min_new_tokens": {"temperature": 1.0, "min_new_tokens": 3, "max_new_tokens": 4},
    "logit_bias": {"temperature": 1.0, "logit_bias": {"3": 1.5, "8": -2.0}},
    "unpenalised": {"temperature": 1.0},
}
CASES = PLAIN | CUT | ALONE | PENALISED
SPANS = {"min_new_tokens": (1, 4)}  # the tokens to compare, where it is not the first three
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}
SCORED = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "cut": {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3},
    "greedy": {"temperature": 0.0},
}


class Batch(NamedTuple):
    """Requests of one call, all behind `PROMPT`: the name of each one's case, and the job that runs them."""

    names: list[str]
    job: dict[str, Any]

    @classmethod
    def of(cls, cases: Mapping[str, dict[str, Any]], each: Mapping[str, int], **options: Any) -> Batch:
        """`each[name]` requests of every case, evenly mixed."""
        places = [((i + 0.5) / each[name], name) for name in cases for i in range(each[name])]
        names = [name for _, name in sorted(places)]
        params = [{"max_new_tokens": 3, "ignore_eos": True} | cases[name] for name in names]
        return cls(names, job([PROMPT] * len(names), params, **options))

    def outputs(self, answer: dict[str, list[Any]], name: str, field: str = "output_ids") -> list[Any]:
        """A field of every request of a case, all calls."""
        calls = len(answer[field]) // len(self.names)
        return [value for value, of in zip(answer[field], self.names * calls, strict=True) if of == name]


def equally(cases: Mapping[str, Any], samples: int, calls: int) -> dict[str, int]:
    return dict.fromkeys(cases, samples // calls)


def batches(fewer: int) -> dict[str, Batch]:
    """What an engine of each shape runs, with `fewer` samples of the cases that are not `WHOLE`."""
    counts = {name: (SAMPLES if name in WHOLE else fewer) // CALLS for name in PLAIN | CUT}
    counts["min_p=0.1"] = min(2 * PENALISED_SAMPLES, fewer) // CALLS
    return {
        "plain": Batch.of(PLAIN, counts, calls=CALLS),
        "cut": Batch.of(CUT | {"greedy": GREEDY}, counts | {"greedy": 8}, calls=CALLS),
        "alone": Batch.of(ALONE, equally(ALONE, fewer, CALLS), calls=CALLS),
        "penalised": Batch.of(PENALISED, equally(PENALISED, PENALISED_SAMPLES, PENALISED_CALLS), calls=PENALISED_CALLS),
        "scored": Batch.of(
            {name: params | {"max_new_tokens": 12} for name, params in SCORED.items()},
            dict.fromkeys(SCORED, 32),
            logprobs=True,
        ),
    }


BATCHES, LONG_BATCHES = batches(FEWER), batches(SAMPLES)
JOINT_ALONE = Batch.of({JOINT: CUT[JOINT]}, {JOINT: 2048}, calls=4)
T1_ALONE = Batch.of({"T=1": {"temperature": 1.0}}, {"T=1": 2048}, calls=4)


class Ran(NamedTuple):
    """What an engine of the algorithm TLT was asked and answered, by the batch's name.

    `hot` has the cases of `plain`, with the drafter that the engine began with, which knows half of the vocabulary and
    cannot propose the rest; the others had the whole one, published in between.
    """

    batches: dict[str, Batch]
    answers: dict[str, dict[str, list[Any]]]

    def outputs(self, batch: str, name: str, field: str = "output_ids") -> list[Any]:
        """A field of every request of a case."""
        return self.batches[batch].outputs(self.answers[batch], name, field)

    def accept_length(self, batch: str, name: str) -> float:
        """Tokens a verification, from the engine's own counters."""
        drafts = sum(self.outputs(batch, name, "spec_num_correct_drafts"))
        return 1 + drafts / sum(self.outputs(batch, name, "spec_verify_ct"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder with `target`, `drafter`, `hot`, which drafts from half of the vocabulary, and `versions/v1`."""

    def make(folder: Path) -> None:
        fit_drafter(make_target(folder / "target"), folder / "drafter")
        shutil.copytree(folder / "drafter", folder / "hot")
        torch.save(HOT, folder / "hot" / HOT_TOKENS)
        shutil.copytree(folder / "drafter", folder / "versions" / "v1")

    return once(tmp_path_factory, "sampled", make)


@pytest.fixture(scope="module")
def model(models):
    return AutoModelForCausalLM.from_pretrained(models / "target").float().eval()


@pytest.fixture(scope="module")
def exact(model):
    return ExactTarget(model, PROMPT)


def run(models, jobs, **options):
    """The answer to each job, from one engine. With a tokenizer, for `min_new_tokens`."""
    more = {"skip_tokenizer_init": False, "max_running_requests": 512, "disable_radix_cache": True}  # for speed
    return run_engine(models / "target", jobs, timeout_s=TIMEOUT_S, **more, **options)


FORMS = [*SHAPES, *(pytest.param(f"{shape}, long", marks=pytest.mark.long) for shape in SHAPES)]


@pytest.fixture(scope="module", params=FORMS)
def tlt(request, models):
    """The engine of one shape: the hot drafter, then the whole one, published while requests are in flight."""
    shape, _, long = request.param.partition(", ")
    asked = LONG_BATCHES if long else BATCHES
    asked = {"hot": Batch.of(PLAIN, equally(PLAIN, SAMPLES if long else FEWER, CALLS), calls=CALLS), **asked}
    publish = job([PROMPT] * 4, [{"temperature": 1.0, "max_new_tokens": 64, "ignore_eos": True}] * 4, publish=[1])
    first, *names = asked
    jobs = [asked[first].job, publish, *(asked[name].job for name in names)]
    options = speculative("TLT", SHAPES[shape], models / "hot", publications=str(models / "versions"))
    hot, published, *answers = run(models, jobs, **options)
    assert published["publications"][0][0]["reason"] is None
    return Ran(asked, dict(zip(asked, [hot, *answers], strict=True)))


def compared(outputs, exact, params, first=0, last=3):
    """Chi-square of tokens [first, last) of the outputs, printed with its power."""
    joint = exact.joint(params, last)
    joint = joint.sum(tuple(range(first))) if first else joint
    result = chi_square([tuple(output[first:last]) for output in outputs], joint.numpy())
    print(f"\n{params}, tokens {first + 1} to {last}: {result}")
    return result


@pytest.mark.parametrize("name", PLAIN | CUT | ALONE)
def test_first_three_tokens_follow_the_exact_distribution(tlt, exact, name):
    batch = next(batch for batch, cases in (("plain", PLAIN), ("cut", CUT), ("alone", ALONE)) if name in cases)
    outputs = tlt.outputs(batch, name)
    assert len(outputs) >= (SAMPLES if name in WHOLE else FEWER)
    assert compared(outputs, exact, CASES[name]).p > ALPHA
    length = tlt.accept_length(batch, name)
    print(f"accept length {length:.2f}")
    assert length >= 1.3, "too few drafts are accepted to test acceptance"


def test_later_tokens_follow_the_exact_distribution(tlt, exact):
    outputs = tlt.outputs("plain", "T=1")
    assert len(outputs) >= SAMPLES
    assert compared(outputs, exact, CASES["T=1"], first=2, last=5).p > ALPHA


@pytest.mark.parametrize("name", PENALISED)
def test_penalised_requests_follow_the_exact_distribution_in_a_mixed_batch(tlt, exact, name):
    assert compared(tlt.outputs("penalised", name), exact, CASES[name], *SPANS.get(name, ())).p > ALPHA


def test_unpenalised_requests_are_drafted_for_beside_penalised_ones(tlt):
    assert tlt.accept_length("penalised", "unpenalised") >= 1.3


def test_greedy_requests_stay_greedy_beside_sampled_ones(tlt, model):
    inputs = torch.tensor([PROMPT])
    wanted = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, min_new_tokens=12)
    assert tlt.outputs("cut", "greedy") == [wanted[0, len(PROMPT) :].tolist()] * (8 * CALLS)


@pytest.mark.parametrize("name", SCORED)
def test_logprobs_are_the_targets_at_the_sampling_temperature(tlt, model, name):
    outputs, found = tlt.outputs("scored", name), tlt.outputs("scored", name, "logprobs")
    params = SCORED[name] | ({"temperature": 1.0} if name == "greedy" else {})
    for output, logprobs in zip(outputs, found, strict=True):
        wanted = sequence_logprobs(model, PROMPT, output, params)
        assert len(logprobs) == 12
        torch.testing.assert_close(torch.tensor(logprobs).double(), wanted, rtol=0, atol=rounding(1e-4))


@pytest.mark.parametrize("name", PLAIN)
def test_a_hot_vocabulary_changes_what_is_drafted_and_nothing_else(tlt, exact, name):
    outputs = tlt.outputs("hot", name)
    assert len(outputs) >= FEWER
    assert compared(outputs, exact, CASES[name]).p > ALPHA
    assert {token for output in outputs for token in output} > set(HOT), "only hot tokens came out"
    length = tlt.accept_length("hot", name)
    print(f"accept length {length:.2f} with a vocabulary of {len(HOT)}")
    assert length >= 1.1, "too few drafts are accepted to test acceptance"
    assert length < tlt.accept_length("plain", name), "the whole vocabulary was not published"


@pytest.fixture(scope="module")
def plain(models):
    """The answers of an engine without speculation: penalised requests, and top-k with top-p."""
    return run(models, [BATCHES["penalised"].job, JOINT_ALONE.job], attention_backend="tlt_cpu")


@pytest.mark.parametrize("name", PENALISED)
def test_the_exact_distribution_is_the_engines_own_with_penalties(plain, exact, name):
    outputs = BATCHES["penalised"].outputs(plain[0], name)
    assert compared(outputs, exact, CASES[name], *SPANS.get(name, ())).p > ALPHA


def test_the_exact_distribution_is_the_engines_own_with_top_k_and_top_p(plain, exact):
    assert compared(plain[1]["output_ids"], exact, CASES[JOINT]).p > ALPHA


@pytest.fixture(scope="module")
def stock(models, tmp_path_factory):
    """Stock EAGLE: T=1 with the argmax that it takes on a CPU; then, sampling as on CUDA, T=1 and top-k with top-p."""
    folder = tmp_path_factory.mktemp("stock")
    plugins = write_plugin(folder / "plugins", "negative_control", Path(negative_control.__file__).read_text())
    argmax = T1_ALONE.job
    sampling = [T1_ALONE.job | {"switch": True}, JOINT_ALONE.job | {"switch": True}]
    options = speculative("EAGLE", CHAIN, models / "drafter")
    environment = {SWITCH: str(folder / "samples")}
    return run(models, [argmax, *sampling], plugins=plugins, environment=environment, **options)


def test_negative_control_argmax_verification_fails(stock, exact):
    assert compared(stock[0]["output_ids"], exact, CASES["T=1"]).p < 1e-6


def test_the_stock_control_is_right_where_stock_verification_is(stock, exact):
    assert compared(stock[1]["output_ids"], exact, CASES["T=1"]).p > ALPHA


def test_negative_control_stock_verification_of_top_k_with_top_p_fails(stock, exact):
    assert compared(stock[2]["output_ids"], exact, CASES[JOINT]).p < 1e-6
