# ruff: noqa: E402  (the CPU device is installed before verl is imported)
"""verl's own Megatron engine on the CPU device, in a process of its own: `megatron_worker.py SCENARIO OPTIONS RESULT`.

A process of its own because installing the CPU device is for good, Megatron's parallel state is global, and a resumed
run must not share anything with the one that saved. OPTIONS is JSON; RESULT is written with torch.save by rank 0.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"

from tlt_verl.cpu.install import install_cpu_device

install_cpu_device()

import torch
import torch._dynamo.utils
from megatron.core.packed_seq_params import PackedSeqParams
from torch.utils._python_dispatch import TorchDispatchMode
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.megatron_utils import unwrap_model
from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.engine import BaseEngine, EngineRegistry
from verl.workers.utils.losses import sft_loss

LR = 1e-3
DTYPES = ("float32", "bfloat16")


def build(path: str, dtype: str, forward_only: bool = False) -> BaseEngine:
    """The engine as verl's worker builds it from default options; `forward_only` is a KL reference."""
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="megatron",
        model_config=HFModelConfig(path=path, model_type="language_model"),
        engine_config=McoreEngineConfig(
            dtype=dtype, forward_only=forward_only, override_transformer_config={"attention_backend": "flash"}
        ),
        optimizer_config=McoreOptimizerConfig(
            lr=LR, total_training_steps=10, lr_decay_steps=10, use_checkpoint_opt_param_scheduler=True
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_batch(samples: list[list[int]], micro_batch_size: int) -> Any:
    ids = [torch.tensor(sample) for sample in samples]
    masks = [torch.ones_like(sample) for sample in ids]
    for mask in masks:
        mask[: len(mask) // 3] = 0  # the prompt
    return tu.get_tensordict(
        {"input_ids": tu.nested_tensor_from_tensor_list(ids), "loss_mask": tu.nested_tensor_from_tensor_list(masks)},
        {
            "calculate_entropy": True,
            "micro_batch_size_per_gpu": micro_batch_size,
            "temperature": 1.0,
            "use_dynamic_bsz": False,
        },
    )


def infer(engine: BaseEngine, samples: list[list[int]], packed: bool, micro_batch_size: int = 0) -> dict[str, Any]:
    """Log-probs and entropies of each sample: lists of (s,) tensors; the last position's label is meaningless."""
    engine.engine_config.use_remove_padding = packed
    with engine.eval_mode():
        out = engine.infer_batch(make_batch(samples, micro_batch_size or len(samples)))["model_output"]
    return {key: [x.clone() for x in out[key].unbind()] for key in ("log_probs", "entropy")}


def weights(engine: BaseEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.get_per_tensor_param()[0]}


def train_step(engine: BaseEngine, samples: list[list[int]], micro_batch_size: int) -> dict[str, float]:
    def loss_function(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        return sft_loss(None, model_output, data, dp_group)

    engine.engine_config.use_remove_padding = True
    with engine.train_mode():
        out = engine.train_batch(make_batch(samples, micro_batch_size), loss_function)
        engine.lr_scheduler_step()
    return {"loss": sum(out["loss"]), "grad_norm": float(out["metrics"]["grad_norm"])}


class ProductDtypes(TorchDispatchMode):
    """Collects the dtype of every matrix product and attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if "attention" in name or name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            factors = [x for x in args[:3] if isinstance(x, torch.Tensor)]  # not the fp32 normaliser of a backward
            self.seen.setdefault(name, set()).update(str(x.dtype) for x in factors)
        return func(*args, **(kwargs or {}))


def forward(options: dict[str, Any]) -> dict[Any, Any]:
    """Everything that a process can do without a second rank or a checkpoint; by model and dtype."""
    results: dict[Any, Any] = {}
    samples = options["samples"]
    for name, path in options["models"].items():
        for dtype in DTYPES:
            engine = build(path, dtype)
            changed = [[token + 1 for token in samples[0]], *samples[1:]]
            results[name, dtype] = {
                "weights": weights(engine),
                "packed": infer(engine, samples, packed=True),
                "padded": infer(engine, samples, packed=False),
                "one_by_one": infer(engine, samples, packed=True, micro_batch_size=1),
                "packed_with_another_neighbour": infer(engine, changed, packed=True),
                "reference": infer(build(path, dtype, forward_only=True), samples, packed=True),
            }
    compiled = torch._dynamo.utils.counters["frames"].total()
    return results | {"compiled": compiled, "products": products(options), "attention": attention(options)}


def products(options: dict[str, Any]) -> dict[str, set[str]]:
    """Dtypes of the matrix products of one bf16 update."""
    engine = build(options["models"]["llama"], "bfloat16")
    with ProductDtypes() as dtypes:
        train_step(engine, options["samples"], 2)
    return dtypes.seen


def attention(options: dict[str, Any]) -> dict[str, Any]:
    """The core attention of one layer under each form of mask, and what it refuses."""
    layer = unwrap_model(build(options["models"]["llama"], "float32").module[0]).decoder.layers[0]
    core, S = layer.self_attention.core_attention, 6
    q, k, v = (torch.randn(S, 2, heads, 16) for heads in (4, 2, 2))  # (S, B, H or G, D)
    keep = torch.ones(2, S, dtype=torch.bool)
    keep[1, 4:] = False
    forbidden = torch.ones(S, S, dtype=torch.bool).triu(1) | ~keep[:, None, None, :]

    def refusal(*args: Any, **kwargs: Any) -> str:
        try:
            core(*args, **kwargs)
        except ValueError as error:
            return str(error)
        return ""

    boundaries = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4]))
    return {
        "real": keep.T,
        "no_mask": core(q, k, v, None),
        "keep": core(q, k, v, keep),
        "forbidden": core(q, k, v, forbidden),
        "left_padded": refusal(q, k, v, keep.flip(1)),
        "wrong_boundaries": refusal(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=boundaries),
    }


def train(options: dict[str, Any]) -> dict[str, Any]:
    """By dtype: updates on this rank's share of the samples. Loads a checkpoint first, or saves one after the first."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = options["samples"][rank::world]
    results = {}
    for dtype in DTYPES:
        engine = build(options["model"], dtype)
        reference = build(options["model"], dtype, forward_only=True)
        checkpoint, steps = f"{options['checkpoints']}/{dtype}", []
        if options["resume"]:
            engine.load_checkpoint(checkpoint, del_local_after_load=False)
        else:
            steps.append(train_step(engine, share, 2 // world))
            engine.save_checkpoint(checkpoint, global_step=1)
        steps.append(train_step(engine, share, 2 // world))
        results[dtype] = {
            "steps": steps,
            "weights": weights(engine),
            "rng": torch.get_rng_state(),
            "reference": infer(reference, options["samples"], packed=True),
            "actor": infer(engine, options["samples"], packed=True),
        }
    return results


def main() -> None:
    scenario, options, result = sys.argv[1:]
    initialize_global_process_group_ray(timeout_second=120)
    found = {"forward": forward, "train": train}[scenario](json.loads(options))
    if torch.distributed.get_rank() == 0:
        torch.save(found, result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
