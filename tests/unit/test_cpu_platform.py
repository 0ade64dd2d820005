"""The CPU device without Megatron: verl's platform, the host as a device, and how "cuda" is read as the host."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tlt_verl.patches import megatron_host_device

from tlt_verl.cpu import bridge, host_device
from tlt_verl.cpu.adam_state import set_adam_step, start_adam_state
from tlt_verl.cpu.install import install_cpu_device
from tlt_verl.cpu.read_as_host import read_as_host

# torch.cuda names in the modules that are read as the host, and why the host has no answer to them.
NO_COUNTERPART = {
    "CUDAGraph": "only asked for when random numbers are drawn inside a captured graph",
    "amp": "only for torch older than 2.4",
    "clock_rate": "straggler detector",
    "power_draw": "straggler detector",
    "temperature": "straggler detector",
    "utilization": "straggler detector",
}


@pytest.fixture
def platform() -> ModuleType:
    return importlib.import_module("tlt_verl.cpu.platform")


def run_python(code: str, **env: str) -> str:
    """Run in a process of its own: what the CPU device installs is for good."""
    clean = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_platform_is_chosen_and_never_detected(platform: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU job whose driver is broken that silently continues on the host."""
    from verl.plugin.platform import PlatformRegistry, platform_manager

    assert PlatformRegistry.get("cpu") is platform.PlatformCPU
    assert not platform.PlatformCPU().is_platform_available(use_smi_check=True)
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    assert platform_manager._detect_platform_name() != "cpu"


def test_rollout_actor_is_told_to_use_the_cpu(platform: ModuleType) -> None:
    """sglang decides when it is imported: without this in the actor's environment it looks for CUDA."""
    assert platform.PlatformCPU().rollout_env_vars() == {"SGLANG_USE_CPU_ENGINE": "1"}


def test_ray_is_asked_for_the_resource_that_verl_hard_codes(platform: ModuleType) -> None:
    """Placement groups ask for GPU whatever the platform says: another name would never be scheduled."""
    assert platform.PlatformCPU().ray_resource_name() == "GPU"
    assert platform.PlatformCPU().ray_resource_options(1) == {"num_gpus": 1}


def test_current_device_serves_as_device_and_as_index() -> None:
    """An int would be sent to an accelerator; a plain "cpu" would build the device "cpu:cpu"."""
    here = host_device.current_device()
    assert torch.zeros(1).to(here).device.type == "cpu"
    assert torch.device(f"cpu:{here}") == torch.device("cpu", 0)
    assert host_device.default_generators[here] is torch.default_generator


def test_host_generator_is_saved_and_restored() -> None:
    """Megatron forks the device's generator around initialisation and dropout."""
    state = host_device.get_rng_state()
    first = torch.rand(3)
    host_device.random.set_rng_state(state, device="cpu")
    assert torch.equal(torch.rand(3), first)


def test_host_memory_is_the_process() -> None:
    """Metrics of memory that are always zero."""
    assert 10**6 < host_device.memory_allocated() <= 1.1 * host_device.max_memory_allocated()
    available, total = host_device.mem_get_info()
    assert 0 < available < total


def test_host_events_measure_time() -> None:
    start, end = host_device.Event(enable_timing=True), host_device.Event(enable_timing=True)
    start.record()
    host_device.current_stream().record_event(end)
    assert 0 <= start.elapsed_time(end) < 1e3


def test_unknown_device_call_is_named() -> None:
    """A silent no-op in the place of a call that matters."""
    with pytest.raises(AttributeError, match=r"torch\.cuda\.CUDAGraph has no counterpart"):
        _ = host_device.CUDAGraph


def test_every_device_call_of_megatron_has_a_counterpart() -> None:
    """A new megatron-core that calls something of torch.cuda which the host does not answer."""
    (folder,) = set(importlib.util.find_spec("megatron").submodule_search_locations)
    called = set()
    for name in megatron_host_device._MODULES:
        source = Path(folder).parent.joinpath(*name.split(".")).with_suffix(".py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                called.add(node.attr)
    assert {name for name in called if not hasattr(host_device, name)} == set(NO_COUNTERPART)


SOURCE = """
import torch
from torch.cuda import current_device
OPTION = "cuda_graph_impl"
def build(device="cuda"):
    return torch.zeros(2, device=device), torch.empty(1, device=torch.cuda.current_device(), pin_memory=True)
def move(tensor): return tensor.cuda(non_blocking=True)
def is_fp32(tensor): return tensor.type() == "torch.cuda.FloatTensor"
class Model(torch.nn.Module):
    def place(self): return super().cuda(current_device())
def fail(): raise ValueError(torch.cuda.is_available())
"""


@pytest.fixture
def device_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "says_cuda.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "says_cuda", raising=False)
    read_as_host(["says_cuda"])
    return importlib.import_module("says_cuda")


def test_cuda_is_read_as_the_host(device_module: ModuleType) -> None:
    """Each way in which megatron-core says "the device", on a torch without CUDA."""
    assert {t.device.type for t in device_module.build()} == {"cpu"}
    tensor = torch.zeros(1)
    assert device_module.move(tensor) is tensor
    assert device_module.is_fp32(tensor) and not device_module.is_fp32(tensor.bfloat16())
    assert device_module.OPTION == "cuda_graph_impl"


def test_reading_changes_nothing_else(device_module: ModuleType, tmp_path: Path) -> None:
    """torch itself changed, line numbers lost, or a byte-code cache that a run with a GPU would pick up."""
    assert torch.cuda.current_device is not host_device.current_device and device_module.torch is torch
    with pytest.raises(ValueError) as error:
        device_module.fail()
    assert traceback.extract_tb(error.value.__traceback__)[-1].lineno == len(SOURCE.splitlines())
    assert not list(tmp_path.rglob("*.pyc"))


def test_a_module_that_is_already_there_is_refused(device_module: ModuleType) -> None:
    """Half of Megatron on the host and half on a device that does not exist."""
    with pytest.raises(ImportError, match="says_cuda"):
        read_as_host(["says_cuda"])


def test_not_installed_where_torch_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU machine that trains on its host."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match="Unset VERL_PLATFORM"):
        install_cpu_device()
    assert sys.meta_path == before


@pytest.mark.slow
def test_every_seam_fits_the_installed_packages() -> None:
    """An upgrade that a patch was not written for."""
    code = """
from tlt_verl.cpu import install
from tlt_verl.patches.megatron_host_device import SEAM
for seam in (SEAM, *(seam for _, seam, _ in install._AFTER)):
    print(seam.name, seam.problems())
"""
    assert run_python(code).splitlines() == [
        "megatron.host_device []",
        "verl.gloo_backend []",
        "verl.megatron_config []",
        "verl.gloo_weights []",
        "verl.policy_copy []",
        "verl.fsdp2_copy []",
        "verl.eager_entropy []",
        "megatron.adam_resume []",
        "mbridge.local_layers []",
        "mbridge.rope []",
    ]


INSTALL = """
import sys, torch
zeros, cuda, tensor = torch.zeros, dict(vars(torch.cuda)), dict(vars(torch.Tensor))
from tlt_verl.cpu.install import install_cpu_device
install_cpu_device(); install_cpu_device()
import verl
from verl.plugin.platform import get_platform
"""


@pytest.mark.slow
def test_installing_is_cheap_and_leaves_torch_alone() -> None:
    """Processes that never touch Megatron paying for it; a torch that other libraries trip on."""
    code = """
assert get_platform().device_name == "cpu"
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "mbridge")]
assert torch.zeros is zeros
assert all(vars(torch.cuda)[k] is v for k, v in cuda.items()) and vars(torch.Tensor) == tensor
"""
    run_python(INSTALL + code, VERL_PLATFORM="cpu")


@pytest.mark.slow
def test_megatron_config_takes_float32_and_mbridge() -> None:
    """`megatron.dtype=float32` refused on the host, or another dtype let through with it."""
    code = """
from verl.workers.config import McoreEngineConfig
for dtype in ("float32", "bfloat16"):
    config = McoreEngineConfig(dtype=dtype)
    print(config.dtype, config.vanilla_mbridge, config.sequence_parallel)
try:
    McoreEngineConfig(dtype="float64")
except AssertionError as error:
    print(error)
"""
    expected = ["float32 True False", "bfloat16 True False", "dtype float64 not supported"]
    assert run_python(INSTALL + code, VERL_PLATFORM="cpu").splitlines() == expected


@pytest.mark.slow
def test_process_group_of_verl_starts() -> None:
    """torch refuses the backend that verl 0.9.1 builds for a platform named cpu."""
    code = """
from verl.utils import distributed
print(distributed.initialize_global_process_group(), torch.distributed.get_backend())
distributed.destroy_global_process_group()
"""
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DIST_INIT_METHOD": "tcp://127.0.0.1:0"}
    assert run_python(INSTALL + code, VERL_PLATFORM="cpu", **env).split("\n")[0] == "(0, 0, 1) gloo"


def test_local_names_become_the_fused_ones_that_mbridge_knows() -> None:
    """A norm that is exported under no name, or a linear layer under a norm's."""
    layer = "decoder.layers.11."
    assert bridge.fused_name(layer + "input_layernorm.weight") == layer + "self_attention.linear_qkv.layer_norm_weight"
    assert bridge.fused_name(layer + "pre_mlp_layernorm.weight") == layer + "mlp.linear_fc1.layer_norm_weight"
    for name in (layer + "self_attention.q_layernorm.weight", "decoder.final_layernorm.weight"):
        assert bridge.fused_name(name) == name


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rotations_that_megatron_does_not_compute_are_refused(rope: dict) -> None:
    """A policy that is trained with other positions than it is rolled out with."""
    with pytest.raises(NotImplementedError, match="rope_parameters"):
        bridge.rope_args(rope)


def test_a_started_adam_steps_like_a_fresh_one() -> None:
    """A state that biases the first update, or a step count that parameters share."""
    fresh, started = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    optimizers = [torch.optim.AdamW(params, lr=0.1) for params in (fresh, started)]
    start_adam_state(optimizers[1])
    set_adam_step(optimizers[1], 0)
    for params, optimizer in zip((fresh, started), optimizers, strict=True):
        for _ in range(2):
            for param in params:
                param.grad = torch.tensor([1.0, -2.0, 0.5])
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(fresh, started, strict=True))
