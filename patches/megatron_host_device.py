"""megatron-core and mbridge say "cuda" where they mean the device: read it as the host.

The list of modules is here; how they are read is the part that is put in place. The seam is installed before its
targets are imported, so they are looked up as files.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tlt_verl.patches.seam import Seam, SeamError, Target

# The modules of megatron-core and mbridge that say "cuda" in code that a dense decoder runs when verl builds, trains,
# saves, loads and exports it, with data, tensor or pipeline parallelism. (`grep -rnE "torch\.cuda|\.cuda\(|['\"]cuda"`;
# the other places are CUDA graphs, offloading, Megatron-FSDP, experts, inference, profiling.)
_MODULES = (
    "mbridge.core.bridge",
    "mbridge.core.util",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.dot_product_attention",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)


@dataclass(frozen=True, kw_only=True)
class _SourceFile(Target):
    """A module that must exist and contain `source_contains`, checked without importing it."""

    def problem(self) -> str | None:
        package, *rest = self.path.split(".")
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            file = Path(folder, *rest).with_suffix(".py")
            if file.is_file():
                return self._missing_text(file.read_text())
        return f"module {self.path} is gone"

    def _missing_text(self, source: str) -> str | None:
        missing = [text for text in self.source_contains if text not in source]
        return f"{self.path} no longer contains {missing[0]!r}: take it off the list" if missing else None


def _not_about_the_host(record: logging.LogRecord) -> bool:
    """False for the warning that the CPU's generator moved while the device's was in use: here they are one."""
    return "CPU RNG state changed" not in record.getMessage()


def _install(read_as_host: Callable[[Iterable[str]], None]) -> None:
    """`read_as_host(names)` arranges how these modules will be imported, and raises ImportError if one already is."""
    try:
        read_as_host(_MODULES)
    except ImportError as error:
        raise SeamError(f"seam megatron.host_device: {error}. Import verl first.") from error
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_about_the_host)


SEAM = Seam(
    name="megatron.host_device",
    package="megatron-core",
    versions=">=0.16.1,<0.16.2",
    targets=tuple(_SourceFile(path=name, source_contains=("cuda",)) for name in _MODULES),
    why="megatron-core names CUDA literally; on a machine without one its modules must use the host.",
    install=_install,
    cpu_only=True,
)
