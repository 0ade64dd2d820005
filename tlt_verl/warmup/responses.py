"""Segments put together to the responses that they are of, to replay what an engine has just generated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from tlt_verl.drafter.packing import Sample
from tlt_verl.segments import Segment


def whole_samples(
    prompts: Sequence[Sequence[int]], responses: Mapping[int, Sequence[int]], segments: Iterable[Segment]
) -> list[Sample]:
    """Prompt and response of each response that ended, with its hidden states.

    The last token has none; a row of zeros stands in its place, which a replay never reads.

    Args:
        responses: token ids, by the prompt's place in `prompts`.
        segments: what the tap recorded of them, prompts included.

    Raises:
        RuntimeError: the tap has not recorded a response whole.
    """
    parts: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        parts[segment.request_id].append(segment)
    features_of = {
        tuple(torch.cat([part.tokens for part in run]).tolist()): torch.cat([part.hidden for part in run])
        for run in parts.values()
        if run[0].start == 0
    }
    samples = []
    for place, response in responses.items():
        tokens = tuple(prompts[place]) + tuple(response)
        features = features_of.get(tokens[:-1], features_of.get(tokens))
        if features is None:
            raise RuntimeError(f"the tap recorded nothing of the response to prompt {place}")
        missing = len(tokens) - len(features)
        features = torch.cat([features, features.new_zeros(missing, features.shape[1])])
        samples.append(Sample(torch.tensor(tokens), features, len(prompts[place])))
    return samples
