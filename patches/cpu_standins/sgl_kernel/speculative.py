"""The operator that SGLang's NGRAM worker imports from this module instead of the package."""

from sgl_kernel.tree import reconstruct_indices_from_tree_mask

__all__ = ["reconstruct_indices_from_tree_mask"]
