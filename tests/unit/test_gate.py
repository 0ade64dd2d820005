"""The gate: what may serve, what may not and why, what is counted, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sampled_target import World, one_thread

from tlt_verl.drafter.packing import Sample
from tlt_verl.spot.gate import Gate, Verdict

Weights = dict[str, torch.Tensor]


class Case:
    """A drafter that is right often, one that noise has spoilt, and what both are judged on."""

    def __init__(self, folder: Path) -> None:
        world = World("llama", folder)
        self.config: dict[str, Any] = json.loads((world.folder / "config.json").read_text())
        self.shared, self.samples = world.shared, world.samples
        self.good: Weights = load_file(world.folder / "model.safetensors")
        generator = torch.Generator().manual_seed(5)
        self.noisy = {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in self.good.items()}

    def judge(self, gate: Gate, candidate: Weights, serving: Weights | None) -> Verdict:
        return gate.judge(candidate, serving, self.config, self.shared, self.samples)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gate"))


@pytest.fixture
def gate() -> Gate:
    return Gate(num_steps=3, dtype=torch.float32)


def test_better_weights_are_published(case: Case, gate: Gate) -> None:
    verdict = case.judge(gate, case.good, case.noisy)
    assert verdict.published and verdict.kind == ""
    assert verdict.candidate_accept_len is not None and verdict.serving_accept_len is not None
    assert verdict.candidate_accept_len > verdict.serving_accept_len >= 1
    assert f"{verdict.candidate_accept_len:.4f} is not below {verdict.serving_accept_len:.4f}" in verdict.reason
    assert verdict.tokens == sum(len(s.tokens) - 1 - s.prompt_len for s in case.samples)
    assert (gate.published, gate.rejected) == (1, 0)


def test_noisy_weights_are_rejected(case: Case, gate: Gate) -> None:
    verdict = case.judge(gate, case.noisy, case.good)
    assert not verdict.published and verdict.kind == "accept_len"
    assert verdict.candidate_accept_len is not None and verdict.serving_accept_len is not None
    assert verdict.candidate_accept_len < verdict.serving_accept_len
    assert f"{verdict.candidate_accept_len:.4f} is below {verdict.serving_accept_len:.4f}" in verdict.reason
    assert gate.reasons == {"accept_len": 1}


def test_equal_weights_lose_nothing_and_are_published(case: Case, gate: Gate) -> None:
    verdict = case.judge(gate, {name: t.clone() for name, t in case.good.items()}, case.good)
    assert verdict.published
    assert verdict.candidate_accept_len == verdict.serving_accept_len


def test_a_margin_asks_for_a_gain(case: Case) -> None:
    gate = Gate(num_steps=3, margin=0.01, dtype=torch.float32)
    verdict = case.judge(gate, case.good, case.good)
    assert verdict.kind == "accept_len" and "a margin of 0.01" in verdict.reason
    assert case.judge(gate, case.good, case.noisy).published


def broken(weights: Weights, name: str, value: torch.Tensor | None) -> Weights:
    changed = {key: tensor for key, tensor in weights.items() if key != name}
    return changed if value is None else changed | {name: value}


def with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[7] = value
    return tensor


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("nan", "layers.0.mlp.up_proj.weight", lambda t: with_one(t, float("nan"))),
        ("nan", "fc.bias", lambda t: with_one(t, float("inf"))),
        ("missing", "layers.0.self_attn.k_proj.weight", lambda t: None),
        ("shape", "fc.weight", lambda t: t[:, :-1].clone()),
        ("dtype", "fc.bias", lambda t: t.long()),
        ("unknown", "lm_head.weight", lambda t: torch.zeros(96, 32)),
    ],
)
def test_unfit_weights_are_rejected_by_name(case: Case, gate: Gate, kind: str, name: str, change: Any) -> None:
    """Whatever serves: unfit weights are not measured at all."""
    candidate = broken(case.good, name, change(case.good.get(name)))
    for serving in (case.noisy, None):
        verdict = case.judge(gate, candidate, serving)
        assert not verdict.published
        assert verdict.kind == kind and name in verdict.reason
        assert verdict.candidate_accept_len is None
    assert gate.reasons == {kind: 2}


def test_the_first_drafter_must_be_able_to_pay(case: Case) -> None:
    for least, published in ((1.2, True), (3.9, False)):
        gate = Gate(num_steps=3, least=least, dtype=torch.float32)
        verdict = case.judge(gate, case.good, None)
        assert verdict.published is published
        assert verdict.serving_accept_len is None
        assert "the least that pays" in verdict.reason
        assert gate.reasons == ({} if published else {"accept_len": 1})


def test_nothing_is_published_unmeasured(case: Case, gate: Gate) -> None:
    too_short = Sample(tokens=torch.tensor([1, 2]), features=torch.zeros(2, 32), prompt_len=1)
    for samples in ([], [too_short]):
        verdict = gate.judge(case.good, case.noisy, case.config, case.shared, samples)
        assert verdict.kind == "no_data" and not verdict.published
        assert f"none of the {len(samples)} held-out samples" in verdict.reason
    assert gate.reasons == {"no_data": 2}


def test_everything_is_counted(case: Case, gate: Gate) -> None:
    case.judge(gate, case.good, case.noisy)
    case.judge(gate, case.noisy, case.good)
    case.judge(gate, broken(case.good, "fc.bias", None), case.good)
    assert gate.metrics() == {"tlt/gate/published": 1.0, "tlt/gate/rejected": 2.0}
    assert (gate.published, gate.rejected) == (1, 2)
    assert gate.reasons == {"accept_len": 1, "missing": 1}


def test_the_last_rejected_are_kept(case: Case, gate: Gate, tmp_path: Path) -> None:
    folder = tmp_path / "rejected"
    gate.keep_rejected(folder)
    case.judge(gate, case.good, case.noisy)
    assert not folder.exists()  # what is published is not kept here

    verdicts = []
    for size in range(1, 5):
        verdicts.append(case.judge(gate, broken(case.good, "fc.bias", torch.zeros(size)), case.good))
    assert sorted(path.name for path in folder.iterdir()) == ["rejected-000003", "rejected-000004"]
    kept = folder / "rejected-000004"
    assert load_file(kept / "model.safetensors").keys() == case.good.keys()
    assert torch.equal(load_file(kept / "model.safetensors")["fc.bias"], torch.zeros(4))
    assert Verdict(**json.loads((kept / "verdict.json").read_text())) == verdicts[-1]
    assert json.loads((kept / "config.json").read_text()) == case.config


def test_keeping_goes_on_after_a_restart(case: Case, tmp_path: Path) -> None:
    """Numbers continue, what a killed run left half written is overwritten, and other files are left alone."""
    (tmp_path / "notes").mkdir()
    for _ in range(2):
        gate = Gate(num_steps=3, dtype=torch.float32)
        gate.keep_rejected(tmp_path, keep=1)
        case.judge(gate, broken(case.good, "fc.bias", None), case.good)
        (tmp_path / ".rejected-000002").mkdir(exist_ok=True)
        (tmp_path / ".rejected-000002" / "half").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "rejected-000002", ".rejected-000002"}
    assert not (tmp_path / "rejected-000002" / "half").exists()


def test_views_and_shared_memory_can_be_kept(case: Case, gate: Gate, tmp_path: Path) -> None:
    """A trainer's tensors may be slices of one buffer, which safetensors alone refuses to write."""
    gate.keep_rejected(tmp_path)
    buffer = torch.full((2, 32), float("nan"))
    candidate = broken(broken(case.good, "fc.bias", buffer[0]), "layers.0.post_attention_layernorm.weight", buffer[1])
    candidate["fc.weight"] = case.good["fc.weight"].T.contiguous().T
    assert case.judge(gate, candidate, case.good).kind == "nan"
    assert torch.equal(
        load_file(tmp_path / "rejected-000001" / "model.safetensors")["fc.weight"], case.good["fc.weight"]
    )


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="num_steps: got 0"):
        Gate(0)
    with pytest.raises(ValueError, match=r"margin: got -0\.1"):
        Gate(3, margin=-0.1)
    for least in (0.5, 4.5, float("nan")):
        with pytest.raises(ValueError, match=f"least: got {least}"):
            Gate(3, least=least)
    with pytest.raises(ValueError, match="keep: got 0"):
        Gate(3).keep_rejected(Path("nowhere"), keep=0)
