"""Torch stand-ins for the `sgl_kernel` operators that SGLang 0.5.17 imports on a CPU machine.

Names and argument order are sgl_kernel's own; all results are written in place, as there. Three files: `cache` (slots
and KV), `tree` (building and walking the verify tree), `sampling` (what the sampling branch of stock verification
calls); `speculative` is sgl_kernel's module of that name, which NGRAM imports from. Knows nothing of SGLang. An
operator that is not here raises an error that names it and says what to install.

Legend: B requests, N nodes of a verify tree (root included), V vocabulary.
"""

from sgl_kernel.cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
)
from sgl_kernel.sampling import top_k_renorm_prob, top_p_renorm_prob, tree_speculative_sampling_target_only
from sgl_kernel.tree import build_tree_kernel_efficient_cpu, verify_tree_greedy_cpu

__version__ = "0.0.0+tlt.standin"
IS_STANDIN = True

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "top_k_renorm_prob",
    "top_p_renorm_prob",
    "tree_speculative_sampling_target_only",
    "verify_tree_greedy_cpu",
]


def __getattr__(name):
    """Import of an operator that is not here succeeds; calling it says what is missing.

    SGLang imports dozens of names that a CPU run never calls, so failing at import would fail for nothing.
    """
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} has no torch stand-in (tlt-cpu-standins {__version__}). Use an option that does not "
            "need it, or install a native sgl_kernel for this machine."
        )

    missing.__name__ = name
    return missing
