"""Slots of the KV cache: who sits where, and moving rows. Legend in the package's docstring."""

import ctypes

import numpy as np
import torch


def _ragged(req_pool_indices, start, end):
    """Rows and columns of `req_to_token` for the half-open ranges [start, end) of each request, flattened in order."""
    lengths = (end - start).long()
    total = int(lengths.sum())
    request = torch.repeat_interleave(torch.arange(lengths.numel()), lengths, output_size=total)
    offset = torch.arange(total) - (torch.cumsum(lengths, 0) - lengths)[request]
    return req_pool_indices.long()[request], start.long()[request] + offset, total


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write new slots: req_to_token[r, start:end] = the next end - start entries of out_cache_loc."""
    rows, columns, total = _ragged(req_pool_indices, start_offset, end_offset)
    req_to_token[rows, columns] = out_cache_loc[:total].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Read slots: out_cache_loc = req_to_token[r, start:end], request after request."""
    rows, columns, total = _ragged(req_pool_indices, start_offset, end_offset)
    out_cache_loc[:total] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """out_cache_loc [B * topk * num_steps] = the slots right behind each request's sequence."""
    columns = seq_lens.long()[:, None] + torch.arange(topk * num_steps)
    out_cache_loc.copy_(req_to_token[req_pool_indices.long()[:, None], columns].reshape(-1))


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """bonus_tokens [B] = the last accepted token of each row of accept_tokens [B * accept_stride]."""
    last = torch.arange(accept_lens.shape[0]) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last])


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """Compact: the slots of the accepted nodes, in order; -1 entries of accept_index are skipped."""
    index = accept_index.reshape(-1)
    index = index[index > -1].long()
    accept_out_cache_loc[: index.numel()] = out_cache_loc[index].to(accept_out_cache_loc.dtype)


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Move KV rows src_loc -> tgt_loc in every buffer, given as addresses (uint64) and row sizes in bytes.

    Rows are gathered before they are scattered: source and target slots may overlap.
    """
    if tgt_loc.numel() == 0:
        return
    source, target = src_loc.numpy(), tgt_loc.numpy()
    slots = int(max(source.max(), target.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (slots * stride)).from_address(address)
        rows = np.ctypeslib.as_array(memory).reshape(slots, stride)
        rows[target] = rows[source]


def rotate_input_ids_cpu(input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None):
    """Shift each request's tokens left by one; the freed place (the last, or select_index) takes its draft token."""
    starts, lengths, drafts = extend_start_loc.tolist(), extend_seq_lens.tolist(), topk_index.reshape(-1)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length <= 0:
            continue
        input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
        place = start + length - 1 if select_index is None else int(select_index[i])
        input_ids[place] = drafts[i]
