"""The transfer of weights between devices that are hosts: every rank of every replica gets what was sent."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

GlooCheckpointEngine = CheckpointEngineRegistry.get("gloo")
BUCKET = 4096
REPLICAS = 2


def tensors() -> dict[str, torch.Tensor]:
    """Sizes that share a bucket, fill one and exceed one; odd bytes before a dtype that must be aligned."""
    torch.manual_seed(0)
    return {
        "odd": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "float": torch.randn(3, 5, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "view": torch.randn(40, 30).T[3:],
        "large": torch.randn(64, 70).to(torch.bfloat16),
        "last": torch.arange(9),
    }


def transfer(
    sent: dict[str, torch.Tensor], engines: list[GlooCheckpointEngine]
) -> list[list[tuple[str, torch.Tensor]]]:
    """One update in verl's order of calls: a policy of two ranks, then the replicas; what each replica received."""
    policy, replicas = engines[:2], engines[2:]
    metadata = [engine.prepare() for engine in engines]
    topology = GlooCheckpointEngine.build_topology(len(policy), len(replicas), metadata)
    arguments = [
        {name: values[place] for name, values in side.items()}
        for side in topology
        for place in range(len(side["rank"]))
    ]

    async def receive(engine):
        return [named async for named in engine.receive_weights(global_steps=1)]

    def take_part(engine, kwargs):
        engine.init_process_group(**kwargs)
        one = engine.send_weights(iter(sent.items()), global_steps=1) if engine in policy else receive(engine)
        return asyncio.run(one)

    with ThreadPoolExecutor(len(engines)) as pool:
        received = list(pool.map(take_part, engines, arguments))
    for engine in engines:
        engine.finalize()
    return received[2:]


@pytest.fixture
def engines() -> list[GlooCheckpointEngine]:
    masters = [True, False] + [False] * REPLICAS
    return [GlooCheckpointEngine(BUCKET, is_master=master) for master in masters]


def test_every_replica_gets_what_was_sent_again_and_again(engines):
    for _ in range(2):
        sent = tensors()
        for received in transfer(sent, engines):
            assert [name for name, _ in received] == list(sent)
            for name, tensor in received:
                assert tensor.dtype == sent[name].dtype and torch.equal(tensor, sent[name]), name


def test_an_export_that_reuses_its_memory_is_sent_as_it_was(engines):
    memory = torch.zeros(4)

    class Export(dict):
        def items(self):
            for value in range(3):
                yield f"{value}", memory.fill_(value)

    for received in transfer(Export(), engines):
        assert [(name, tensor.tolist()) for name, tensor in received] == [(f"{v}", [float(v)] * 4) for v in range(3)]


def test_weights_outside_of_a_transfer_are_refused(engines):
    with pytest.raises(RuntimeError, match="init_process_group"):
        next(engines[2]._receive())
