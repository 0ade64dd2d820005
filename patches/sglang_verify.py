"""SGLang's verification, for batches of the algorithm TLT.

Stock `eagle_sample` takes the argmax whatever the temperature on every device but CUDA, and on CUDA cuts by top-k and
top-p one after the other, which is not what the engine samples from without speculation. Batches of other algorithms go
to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

_EAGLE_SAMPLE = "sglang.srt.speculative.eagle_utils:eagle_sample"


def _install(eagle_sample: Callable[..., Any]) -> None:
    """Put `eagle_sample(original, verify_input, batch, logits_output, grammar_mask)` around the stock function."""
    hooks.around(SEAM.name, _EAGLE_SAMPLE, eagle_sample)


SEAM = Seam(
    name="sglang.verify",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(
            path=_EAGLE_SAMPLE,
            parameters=("verify_input", "batch", "logits_output", "grammar_mask"),
            source_contains=("return predict, num_correct_drafts + 1, accept_index",),
        ),
        Target(
            path="sglang.srt.speculative.eagle_worker_common:run_eagle_verify",
            source_contains=(
                "eagle_sample(verify_input, batch, logits_output, grammar_mask)",
                "compute_spec_v2_logprobs",
            ),
        ),
        Target(
            path="sglang.srt.speculative.eagle_utils:verify_tree_greedy_func",
            parameters=("predicts", "accept_index", "accept_token_num", "candidates", "target_predict"),
        ),
        Target(
            path="sglang.srt.layers.sampler:Sampler._sample_from_probs",
            parameters=("probs", "sampling_info", "positions", "simple_sampling_case"),
        ),
        Target(path="sglang.srt.layers.sampler:create_sampler"),
        Target(
            path="sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.apply_logits_bias", parameters=("logits",)
        ),
        Target(path="sglang.srt.utils.async_probe:sanitize_nan_logits"),
    ),
    why="Exact verification at any temperature, top-k, top-p and min-p, on every device.",
    install=_install,
)
