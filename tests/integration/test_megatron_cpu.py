"""Stock verl's Megatron engine on the CPU device, against Hugging Face and against itself.

Everything real but the sizes: verl's engine, loss and checkpoint manager, mbridge, megatron-core, random models.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORKER = Path(__file__).with_name("megatron_worker.py")
VOCAB = 128
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # enough that attention and rotation show in the logits
}
ROPE = {"rope_type": "default", "rope_theta": 5e3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The untied Qwen models come before the tied ones: mbridge keeps a tied model's name of the head for the whole process.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters=ROPE, tie_word_embeddings=False),
    "llama_tied_3_layers": LlamaConfig(
        **SIZES | {"num_hidden_layers": 3}, rope_parameters=ROPE, tie_word_embeddings=True
    ),
    "llama3_rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False),
    "linear_rope": LlamaConfig(**SIZES, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}),
    "qwen2": Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, rope_parameters=ROPE, head_dim=32, tie_word_embeddings=False),
    "qwen3_tied": Qwen3Config(**SIZES, rope_parameters=ROPE, head_dim=16, tie_word_embeddings=True),
}
GENERATOR = torch.Generator().manual_seed(7)
SAMPLES = [torch.randint(0, VOCAB - 1, (n,), generator=GENERATOR).tolist() for n in (23, 9, 40, 17)]
DTYPES = ("float32", "bfloat16")
ALL = list(itertools.product(CONFIGS, DTYPES))


def make_model(config: PretrainedConfig, folder: Path) -> Path:
    """A random checkpoint whose norms and biases are not the trivial ones, exact in bfloat16."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    words = models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="1").save_pretrained(folder)
    return folder


def run_worker(scenario: str, folder: Path, world_size: int = 1, **options: Any) -> Any:
    """Run the worker as `world_size` processes and return what rank 0 found."""
    result = folder / f"{scenario}.{len(os.listdir(folder))}.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scenario, json.dumps(options), str(result)],
            env=os.environ | {key: str(value) for key, value in env.items()} | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    logs = [process.communicate(timeout=240)[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(log[-6000:] for log in logs)
    return torch.load(result, weights_only=False)


def hf_outputs(path: Path, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Per sample: log-probs of the next token (s - 1,) and entropies (s,), in float32 from logits of `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    out: dict[str, list[torch.Tensor]] = {"log_probs": [], "entropy": []}
    for sample in SAMPLES:
        ids = torch.tensor([sample])
        with torch.no_grad():
            logp = model(ids).logits[0].float().log_softmax(-1)  # (s, V)
        out["log_probs"].append(logp[:-1].gather(1, ids[0, 1:, None])[:, 0])
        out["entropy"].append(-(logp.exp() * logp).sum(-1))
    return out


def log_probs(outputs: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    return [x[: len(sample) - 1].float() for x, sample in zip(outputs["log_probs"], SAMPLES, strict=True)]


def furthest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x.float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(config, root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def forward(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    paths = {name: str(path) for name, path in checkpoints.items()}
    return run_worker("forward", tmp_path_factory.mktemp("forward"), models=paths, samples=SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_export_gives_the_loaded_checkpoint(forward: Any, checkpoints: dict[str, Path], name: str, dtype: str) -> None:
    """A weight dropped, permuted (GQA) or confused with the tied embedding: the rollout would get another model."""
    exported = forward[name, dtype]["weights"]
    checkpoint = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).state_dict()
    if CONFIGS[name].tie_word_embeddings:
        exported.setdefault("lm_head.weight", exported["model.embed_tokens.weight"])
    assert exported.keys() == checkpoint.keys()
    assert {t.dtype for t in exported.values()} == {getattr(torch, dtype)}
    different = [key for key, value in checkpoint.items() if not torch.equal(exported[key].float(), value)]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_equals_hugging_face(forward: Any, checkpoints: dict[str, Path], name: str, layout: str) -> None:
    """A wrong rotation, norm, bias, scale or mask. 1e-4 nats; what is measured is 1e-5."""
    expected, found = hf_outputs(checkpoints[name], torch.float32), forward[name, "float32"][layout]
    assert furthest(log_probs(found), expected["log_probs"]) < 1e-4
    assert furthest(found["entropy"], expected["entropy"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_errs_no_more_than_hugging_face_does(
    forward: Any, checkpoints: dict[str, Path], name: str, layout: str
) -> None:
    """bf16 kept where a sum needs fp32 (norm, softmax). The error against fp32 is at most twice that of HF's bf16."""
    exact = hf_outputs(checkpoints[name], torch.float32)["log_probs"]
    hf_error = furthest(hf_outputs(checkpoints[name], torch.bfloat16)["log_probs"], exact)
    error = furthest(log_probs(forward[name, "bfloat16"][layout]), exact)
    assert error < 2 * hf_error, (error, hf_error)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_packed_samples_do_not_see_each_other(forward: Any, name: str, dtype: str) -> None:
    """Attention across the boundary, or positions that run on: log-probs would depend on who shares the batch."""
    found = forward[name, dtype]
    packed, other = log_probs(found["packed"]), log_probs(found["packed_with_another_neighbour"])
    assert furthest(packed[1:], other[1:]) == 0
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]  # the products have another shape, so another order of sums
    assert furthest(packed, log_probs(found["one_by_one"])) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_reference_equals_the_policy_before_an_update(forward: Any, name: str, dtype: str) -> None:
    """A KL reference that is built in another way (no DDP, no optimizer): the KL would not start at zero."""
    assert furthest(forward[name, dtype]["packed"]["log_probs"], forward[name, dtype]["reference"]["log_probs"]) == 0


@pytest.mark.slow
def test_nothing_is_compiled(forward: Any) -> None:
    """torch.compile on the way to the entropy: ten seconds in every worker, and an error where there is no compiler."""
    assert forward["compiled"] == 0


@pytest.mark.slow
def test_bf16_multiplies_in_bf16(forward: Any) -> None:
    """A silent upcast: the update would be right and, without AMX, several times slower."""
    seen = forward["products"]
    assert {"mm"} < set(seen), seen
    assert set.union(*seen.values()) == {"torch.bfloat16"}, seen


@pytest.mark.slow
def test_attention_reads_both_forms_of_mask(forward: Any) -> None:
    """verl's keep-mask or Megatron's drop-mask ignored, or read the wrong way round."""
    found = forward["attention"]
    for form in ("keep", "no_mask"):
        torch.testing.assert_close(found[form][found["real"]], found["forbidden"][found["real"]])


@pytest.mark.slow
def test_attention_refuses_what_it_would_get_wrong(forward: Any) -> None:
    """Left padding would shift the causal triangle; boundaries that miss tokens would leave them out."""
    assert "right-padded" in forward["attention"]["left_padded"]
    assert "0:4" in forward["attention"]["wrong_boundaries"]


def hf_gradient(path: Path) -> tuple[float, float]:
    """Loss (mean over the response's tokens) and gradient norm of the whole batch, from Hugging Face."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for sample in SAMPLES:
        ids = torch.tensor([sample])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        kept = logp[max(len(sample) // 3, 1) - 1 :]
        total, count = total - kept.sum(), count + len(kept)
    loss = total / count
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


@pytest.fixture(scope="module")
def two_steps(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By number of ranks: two updates, with a checkpoint after the first; and the second update resumed from it."""
    folder = tmp_path_factory.mktemp("train")
    options = {"model": str(checkpoints["llama"]), "samples": SAMPLES}
    found: dict[str, Any] = {}
    for world in (1, 2):
        options["checkpoints"] = str(folder / f"{world}_ranks")
        found[f"trained by {world}"] = run_worker("train", folder, world, resume=False, **options)
        found[f"resumed by {world}"] = run_worker("train", folder, world, resume=True, **options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_update_has_hugging_face_gradient(two_steps: Any, checkpoints: dict[str, Path], dtype: str) -> None:
    """A backward pass that misses a term, or a loss scaled by the number of micro-batches."""
    loss, norm = hf_gradient(checkpoints["llama"])
    first = two_steps["trained by 1"][dtype]["steps"][0]
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    assert first["loss"] == pytest.approx(loss, rel=tolerance)
    assert first["grad_norm"] == pytest.approx(norm, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks_update_as_one(two_steps: Any, dtype: str) -> None:
    """Gradients not reduced, reduced twice, or weights not gathered after the sharded update."""
    one, two = (two_steps[f"trained by {world}"][dtype] for world in (1, 2))
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel={"float32": 1e-5, "bfloat16": 1e-2}[dtype])
    difference = furthest(list(one["weights"].values()), [two["weights"][name] for name in one["weights"]])
    assert difference < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]  # an update moves a weight by about 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_moves_the_policy_and_not_the_reference(two_steps: Any, forward: Any, dtype: str) -> None:
    """Weights shared between the actor and its reference: the KL would stay at zero."""
    before, after = forward["llama", dtype]["packed"]["log_probs"], two_steps["trained by 1"][dtype]
    assert furthest(after["reference"]["log_probs"], before) == 0
    assert furthest(after["actor"]["log_probs"], before) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2])
def test_resume_continues_as_if_never_stopped(two_steps: Any, world: int, dtype: str) -> None:
    """Moments, step count, fp32 master weights, learning rate or generator lost between save and load."""
    never_stopped, resumed = (two_steps[f"{how} by {world}"][dtype] for how in ("trained", "resumed"))
    assert resumed["steps"][0] == never_stopped["steps"][1]
    weights = never_stopped["weights"]
    assert not [name for name, value in weights.items() if not torch.equal(value, resumed["weights"][name])]
    assert torch.equal(resumed["rng"], never_stopped["rng"])
