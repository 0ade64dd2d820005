"""The verify tree: building it from the draft's picks, and walking it along the target's tokens.

A tree is kept as first-child / next-sibling links: `retrieve_next_token[b, i]` is node i's first child and
`retrieve_next_sibling[b, i]` the next child of i's parent, -1 where there is none. Children stand in ascending order.
Legend in the package's docstring.
"""

import torch

_QLEN_ONLY = 1  # TreeMaskMode.QLEN_ONLY: the mask is N x N a request, without the prefix


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    verified_seq_len,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    draft_token_num,
    tree_mask_mode=_QLEN_ONLY,
):
    """Fill mask, positions and links of the verify trees.

    Args:
        parent_list: int64 [B, >=1 + (depth-2)*topk + ...]; entry k is the index, among all candidates, of the parent
            token of the k-th group of topk candidates.
        selected_index: int64 [B, N-1], ascending; the candidates that became nodes 1..N-1.
        verified_seq_len: [B] tokens before the tree.
        tree_mask: bool [B*N*N], out; entry (i, j) says whether node i sees node j.
        positions: int64 [B*N], out.
        retrieve_index, retrieve_next_token, retrieve_next_sibling: int64 [B, N], out.
    """
    if int(tree_mask_mode) != _QLEN_ONLY:
        raise NotImplementedError(f"tree_mask_mode={tree_mask_mode}: the CPU stand-in builds QLEN_ONLY (1) masks")
    batch, nodes = selected_index.shape[0], draft_token_num
    parent = _chain(batch, nodes) if topk == 1 else _parents(parent_list, selected_index, topk)
    mask = _ancestors(parent)
    tree_mask[: batch * nodes * nodes].copy_(mask.reshape(-1))
    positions.copy_((verified_seq_len.long()[:, None] + mask.sum(-1) - 1).reshape(-1))
    retrieve_index.copy_(torch.arange(batch * nodes).view(batch, nodes))
    _link(parent, retrieve_next_token, retrieve_next_sibling)


def reconstruct_indices_from_tree_mask(
    tree_mask,
    verified_seq_len,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    batch_size,
    draft_token_num,
):
    """Positions and links of the verify trees that the masks describe; a node that is below none hangs nowhere.

    Args:
        tree_mask: bool [>= B*N*N]; entry (i, j) says whether node i sees node j.
        verified_seq_len: [B] tokens before the tree.
        positions: int64 [B*N], out.
        retrieve_index, retrieve_next_token, retrieve_next_sibling: int64 [B, N], out.
    """
    nodes = draft_token_num
    index = torch.arange(nodes)
    mask = tree_mask[: batch_size * nodes * nodes].view(batch_size, nodes, nodes).bool()
    above = mask & (index < index[:, None])
    parent = torch.where(above, index, -1).amax(-1)
    positions.copy_((verified_seq_len.long()[:, None] + above.sum(-1)).reshape(-1))
    retrieve_index.copy_(torch.arange(batch_size * nodes).view(batch_size, nodes))
    _link(parent, retrieve_next_token, retrieve_next_sibling)
    retrieve_next_sibling.masked_fill_(parent < 0, -1)


def _chain(batch, nodes):
    """Parents [B, N] of a chain: -1, 0, 1, ..."""
    return torch.arange(-1, nodes - 1).expand(batch, nodes)


def _parents(parent_list, selected_index, topk):
    """Parents [B, N] as node indices, -1 for the root."""
    if parent_list.shape[1] == 0:  # one step: every candidate hangs from the root
        return torch.nn.functional.pad(torch.zeros_like(selected_index), (1, 0), value=-1)
    group = selected_index // topk  # [B, N-1]; group 0 hangs from the root
    candidate = parent_list.gather(1, group.clamp(max=parent_list.shape[1] - 1))
    is_parent = selected_index[:, None, :] == candidate[:, :, None]  # [B, child, node - 1]
    parent = torch.where(group == 0, 0, is_parent.int().argmax(-1) + 1)
    return torch.nn.functional.pad(parent, (1, 0), value=-1)


def _ancestors(parent):
    """mask [B, N, N]: the path from the root to each node, itself included. A parent stands before its children."""
    batch, nodes = parent.shape
    mask = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    rows = torch.arange(batch)
    for node in range(1, nodes):
        mask[:, node] |= mask[rows, parent[:, node]]
    return mask


def _link(parent, next_token, next_sibling):
    """First-child and next-sibling links from parents [B, N]."""
    nodes = parent.shape[1]
    index = torch.arange(nodes)
    none = nodes  # larger than every node: "no such node" under min
    child = torch.where(parent[:, None, :] == index[:, None], index, none).amin(-1)
    later = (parent[:, None, :] == parent[:, :, None]) & (index > index[:, None])
    sibling = torch.where(later, index, none).amin(-1)
    next_token.copy_(torch.where(child == none, -1, child))
    next_sibling.copy_(torch.where(sibling == none, -1, sibling))


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk each tree from its root along the target's tokens until no child carries the token.

    Args:
        predicts: int32 [B*N], out; the target's token at every accepted node (the last one is the bonus token).
        accept_index: int32 [B, depth+1], out; flat indices of the accepted nodes, -1 behind them.
        accept_token_num: int32 [B], out; accepted drafts, without root and bonus.
        candidates: [B, N] tokens of the nodes.
        target_predict: [B, N] the target's token at each node.
    """
    tables = (candidates, retrive_index, retrive_next_token, retrive_next_sibling, target_predict)
    rows = zip(*(table.tolist() for table in tables), strict=True)
    most = accept_index.shape[1]
    for b, (tokens, flat, child, sibling, target) in enumerate(rows):
        path = [0]
        while len(path) < most and (node := _child_with(target[path[-1]], child[path[-1]], tokens, sibling)) >= 0:
            path.append(node)
        where = torch.tensor([flat[node] for node in path])
        predicts[where] = torch.tensor([target[node] for node in path], dtype=predicts.dtype)
        accept_index[b, : len(path)] = where.to(accept_index.dtype)
        accept_token_num[b] = len(path) - 1


def _child_with(token, node, tokens, sibling):
    """The node among `node` and its later siblings that carries `token`, or -1."""
    while node >= 0 and tokens[node] != token:
        node = sibling[node]
    return node
