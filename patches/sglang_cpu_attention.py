"""SGLang's attention registries, for the CPU backend `tlt_cpu`.

SGLang has an official registry for target backends and none for draft backends: `DraftBackendFactory` keeps its maps
inside two methods. It also decides by name which backends may launch Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

_FACTORY = "sglang.srt.speculative.draft_utils:DraftBackendFactory"
_CPU_DEFAULTS = "sglang.srt.server_args:ServerArgs._handle_cpu_backends"
_SUPPORT_TRITON = "sglang.srt.utils.common:support_triton"


def _install(
    name: str, backend: Callable[..., Any], draft_backend: Callable[..., Any], choose: Callable[[Any], None]
) -> None:
    """Register `backend(runner)` and `draft_backend(runner, topk, num_steps)` under `name`.

    `choose(server_args)` runs after SGLang has set a CPU's defaults, before it derives anything from them.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    def uses_ours(factory: Any, role: str) -> bool:  # in SGLang's own order of look-up
        args = factory.server_args
        return name == (factory.draft_attn_backend or getattr(args, role) or args.attention_backend)

    def decode_backend(original: Callable[..., Any], factory: Any) -> Any:
        if not uses_ours(factory, "decode_attention_backend"):
            return original(factory)
        if factory.speculative_num_steps <= 1:
            return None
        return draft_backend(factory.draft_model_runner, factory.topk, factory.speculative_num_steps)

    def extend_backend(original: Callable[..., Any], factory: Any) -> Any:
        if not uses_ours(factory, "prefill_attention_backend"):
            return original(factory)
        return backend(factory.draft_model_runner)

    def support_triton(original: Callable[[str], bool], backend: str) -> bool:
        return False if backend == name else original(backend)

    def handle_cpu_backends(original: Callable[..., None], server_args: Any) -> None:
        original(server_args)
        choose(server_args)

    register_attention_backend(name)(backend)
    add_attention_backend_choices([name])
    hooks.around(SEAM.name, f"{_FACTORY}.create_decode_backend", decode_backend)
    hooks.around(SEAM.name, f"{_FACTORY}.create_draft_extend_backend", extend_backend)
    hooks.around(SEAM.name, _SUPPORT_TRITON, support_triton)
    hooks.around(SEAM.name, _CPU_DEFAULTS, handle_cpu_backends)


SEAM = Seam(
    name="sglang.cpu_attention",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(path="sglang.srt.layers.attention.attention_registry:register_attention_backend", parameters=("name",)),
        Target(path="sglang.srt.server_args:add_attention_backend_choices", parameters=("choices",)),
        Target(path=f"{_FACTORY}.create_decode_backend", source_contains=("speculative_num_steps <= 1",)),
        Target(path=f"{_FACTORY}.create_draft_extend_backend"),
        Target(path=f"{_FACTORY}._create_backend", source_contains=("self.draft_attn_backend", "attention_backend")),
        Target(path=_SUPPORT_TRITON, parameters=("backend",)),
        Target(path=_CPU_DEFAULTS, source_contains=("self.attention_backend is None",)),
        Target(path="sglang.srt.layers.attention.base_attn_backend:AttentionBackend.init_forward_metadata"),
        Target(path="sglang.srt.mem_cache.memory_pool:KVWriteLoc"),
    ),
    why="A batched attention backend for CPUs, with the tree-verify and draft modes that torch_native lacks.",
    install=_install,
    cpu_only=True,
)
