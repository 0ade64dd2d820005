"""What the sampling branch of SGLang's stock verification calls. tlt_verl's own verification does not use these.

They are here so that stock EAGLE can be run and measured on a CPU machine as it would run on a GPU. Legend in the
package's docstring.
"""

import torch


def top_k_renorm_prob(probs, top_ks):
    """probs [R, V] cut to the top_ks [R] largest entries (ties at the threshold stay) and renormalised."""
    k = top_ks.reshape(-1).long().clamp(max=probs.shape[-1])
    largest = probs.sort(dim=-1, descending=True).values
    kept = torch.where(probs >= largest.gather(1, k[:, None] - 1), probs, 0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_prob(probs, top_ps):
    """probs [R, V] cut to the smallest set whose mass reaches top_ps [R], and renormalised."""
    ordered, index = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before > top_ps.reshape(-1, 1), 0)
    kept = torch.zeros_like(probs).scatter_(1, index, ordered)
    return kept / kept.sum(-1, keepdim=True)


def tree_speculative_sampling_target_only(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    uniform_samples,
    uniform_samples_for_final_sampling,
    target_probs,
    draft_probs,
    threshold_single=1.0,
    threshold_acc=1.0,
    deterministic=True,
):
    """Accept children one after the other with the target's own probabilities; sample the rest where none is taken.

    Args:
        uniform_samples: float32 [B, N] in [0, 1), one coin a node; uniform_samples_for_final_sampling: float32 [B].
        target_probs: float32 [B, N, V]. draft_probs is not read: the drafts are taken as certain.
        The other arguments as in `verify_tree_greedy_cpu`.
    """
    tables = (candidates, retrive_index, retrive_next_token, retrive_next_sibling, uniform_samples)
    rows = zip(*(table.tolist() for table in tables), strict=True)
    most = accept_index.shape[1]
    for b, (tokens, flat, child, sibling, coins) in enumerate(rows):
        path, refused = [0], []
        while len(path) < most:
            node, refused = _coin_child(
                path[-1], tokens, child, sibling, coins, target_probs[b], threshold_single, threshold_acc
            )
            if node < 0:
                break
            path.append(node)
            refused = []
        emitted = [tokens[node] for node in path[1:]]
        emitted.append(_residual_token(target_probs[b, path[-1]], refused, uniform_samples_for_final_sampling[b]))
        where = torch.tensor([flat[node] for node in path])
        predicts[where] = torch.tensor(emitted, dtype=predicts.dtype)
        accept_index[b, : len(path)] = where.to(accept_index.dtype)
        accept_token_num[b] = len(path) - 1


def _coin_child(node, tokens, child, sibling, coins, probs, threshold_single, threshold_acc):
    """The accepted child of `node` (or -1) and the tokens of the children refused before it."""
    mass, refused, candidate = 0.0, [], child[node]
    while candidate >= 0:
        probability = float(probs[node, tokens[candidate]])
        mass += probability
        if coins[node] < mass / threshold_acc or probability >= threshold_single:
            return candidate, refused
        refused.append(tokens[candidate])
        candidate = sibling[candidate]
    return -1, refused


def _residual_token(probs, refused, coin):
    """Sample from probs [V] without the refused tokens, by the inverse of the cumulative sum (float64)."""
    left = probs.double().clone()
    if refused:
        left[refused] = 0
    cumulative = left.cumsum(0)
    index = torch.searchsorted(cumulative, coin.double() * cumulative[-1], right=True)
    return int(index.clamp(max=left.numel() - 1))
