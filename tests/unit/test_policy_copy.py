"""verl's copies of a policy on a machine without a device, which cannot pin memory, and is its own host."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu, fsdp2_sharded_save_to_cpu
from verl.utils.megatron_utils import copy_megatron_model_to_cpu, restore_megatron_model_from_cpu


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def values_of(chunk):
    return {name: torch.as_tensor(value.detach()).clone() for name, value in chunk.named_parameters()}


def update(chunk):
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.add_(1.0)


def test_a_megatron_policy_comes_back_as_it_was_when_it_was_copied():
    chunks = [torch.nn.Linear(3, 2), torch.nn.LayerNorm(4)]
    before = [values_of(chunk) for chunk in chunks]
    copies = copy_megatron_model_to_cpu(chunks)
    for chunk in chunks:
        update(chunk)
    restore_megatron_model_from_cpu(chunks, copies)
    for chunk, values in zip(chunks, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in values_of(chunk).items())


def test_an_fsdp2_policy_comes_back_as_it_was_when_it_was_copied(one_rank):
    model = fully_shard(torch.nn.Linear(3, 2), mesh=one_rank)
    before = [parameter.full_tensor().clone() for parameter in model.parameters()]
    shards, spec = fsdp2_sharded_save_to_cpu(model)
    update(model)
    fsdp2_sharded_load_from_cpu(model, shards, spec)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.full_tensor(), value)
