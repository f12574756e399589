"""The calls of torch_npu, with what they take widened: dims, and query heads a key/value head.

Sections are those of the contract, `docs/operators.md`. Backward calls are those of torch_npu's own derivatives.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from ..contract import SELECT_DIMS
from .packing import say_once

Triple = tuple[Tensor, Tensor, Tensor]

_MOST_IN_GROUP = 32  # query heads a key/value head in select attention
_UNBOUNDED = 2147483647


# ---- compress (section 1)


def compress(input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]) -> Tensor:
    """[T, N, D], [block_size, N] -> [windows, N, D]; at least one window."""
    dim = input.shape[-1]
    pooled = torch_npu.npu_nsa_compress(_widen(input, _of_16(dim)), weight, block_size, stride, actual_seq_len=seq_len)
    return _narrow(pooled, dim)


def compress_grad(
    grad: Tensor, input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of `compress` for its input and weight."""
    dim = input.shape[-1]
    grad, input = _widen(grad, _of_16(dim)), _widen(input, _of_16(dim))
    grad_input, grad_weight = torch_npu.npu_nsa_compress_grad(grad, input, weight, block_size, stride, actual_seq_len=seq_len)
    return _narrow(grad_input, dim), grad_weight


# ---- compressed attention (section 2); its gradient is that of fusion attention with sparse_mode 1


def compress_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sizes: tuple[int, int, int, int], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention [T, N1, D2], block ids, softmax max and sum in the memory order [N1, S_b, 8] sample after sample."""
    dim = max(query.shape[-1], value.shape[-1])  # values may not be wider than keys
    query, key = _widen(query, dim), _widen(key, dim)
    return torch_npu.npu_nsa_compress_attention(query, key, value, scale, query.shape[1], *sizes, **options)


# ---- select attention (section 3)


def select_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    masked: bool,
) -> Triple:
    """Attention [T1, N1, D2], softmax max and sum [T1, N1, 8]; `masked` switches the causal mask on."""
    parts, dim = _parts(query, key), value.shape[-1]
    query, key, value = _to_select_dims(query, key, value, parts)
    attention, row_max, row_sum = torch_npu.npu_nsa_select_attention(
        *(query, key, value, _repeat(topk_indices, parts), scale, query.shape[1], 64, topk_indices.shape[-1]),
        atten_mask=triangle(query.device) if masked else None,
        actual_seq_qlen=q_len,
        actual_seq_kvlen=kv_len,
    )
    return _narrow(attention, dim), row_max, row_sum


def select_attention_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    attention: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    masked: bool,
) -> Triple:
    """Gradients of `select_attention` for query, key and value; it masks whatever `masked` says (section 6)."""
    parts, dims = _parts(query, key), (key.shape[-1], value.shape[-1])
    query, key, value = _to_select_dims(query, key, value, parts)
    grad_query, *grads = torch_npu.npu_nsa_select_attention_grad(
        *(_widen(grad, SELECT_DIMS[1]), query, key, value, _widen(attention, SELECT_DIMS[1]), softmax_max, softmax_sum),
        *(_repeat(topk_indices, parts), scale, query.shape[1], 64, topk_indices.shape[-1]),
        atten_mask=triangle(query.device) if masked else None,
        actual_seq_qlen=q_len,
        actual_seq_kvlen=kv_len,
    )
    grad_key, grad_value = (_narrow(_unrepeat(x, parts), dim) for x, dim in zip(grads, dims, strict=True))
    return _narrow(grad_query, dims[0]), grad_key, grad_value


def _to_select_dims(query: Tensor, key: Tensor, value: Tensor, parts: int) -> Triple:
    if (key.shape[-1], value.shape[-1]) != SELECT_DIMS:
        say_once(f"head dims {key.shape[-1]}/{value.shape[-1]} are widened with zeros to {SELECT_DIMS[0]}/{SELECT_DIMS[1]}")
    query, key, value = _widen(query, SELECT_DIMS[0]), _widen(key, SELECT_DIMS[0]), _widen(value, SELECT_DIMS[1])
    return query, _repeat(key, parts), _repeat(value, parts)


def parts_of(group: int) -> int:
    """Into how many parts the query heads of a key/value head are split for the select operator."""
    return next(parts for parts in range(1, group + 1) if group % parts == 0 and group // parts <= _MOST_IN_GROUP)


def _parts(query: Tensor, key: Tensor) -> int:
    group = query.shape[1] // key.shape[1]
    parts = parts_of(group)
    if parts > 1:
        say_once(f"{group} query heads a key/value head go to npu_nsa_select_attention as {parts} times {group // parts}")
    return parts


def _repeat(tensor: Tensor, parts: int) -> Tensor:
    return tensor if parts == 1 else tensor.repeat_interleave(parts, dim=1)


def _unrepeat(tensor: Tensor, parts: int) -> Tensor:
    return tensor if parts == 1 else tensor.unflatten(1, (-1, parts)).sum(dim=2)


# ---- fusion attention (section 4)


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    *,
    atten_mask: Tensor | None,
    sparse_mode: int,
    reach: int = _UNBOUNDED,
    pads_value: bool = False,
) -> Triple:
    """Attention [T1, N1, D2], softmax max and sum in the memory order [N1, S_b, 8] sample after sample.

    With `sparse_mode` 4 a query sees the `reach` tokens before its own. `pads_value` for an installation that takes no values
    narrower than keys.
    """
    dim = value.shape[-1]
    query, key, value = _to_fusion_dims(query, key, value, pads_value)
    attention, row_max, row_sum = torch_npu.npu_fusion_attention(
        *(query, key, value, query.shape[1], "TND"),
        atten_mask=atten_mask,
        scale=scale,
        pre_tockens=reach,
        next_tockens=0 if sparse_mode == 4 else _UNBOUNDED,
        actual_seq_qlen=q_len,
        actual_seq_kvlen=kv_len,
        sparse_mode=sparse_mode,
    )[:3]
    return _narrow(attention, dim), row_max, row_sum


def fusion_attention_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    *,
    atten_mask: Tensor | None,
    sparse_mode: int,
    reach: int = _UNBOUNDED,
    pads_value: bool = False,
) -> Triple:
    """Gradients for query, key and value of `fusion_attention`, and of `compress_attention` with `sparse_mode` 1."""
    dims = query.shape[-1], key.shape[-1], value.shape[-1]
    query, key, value = _to_fusion_dims(query, key, value, pads_value)
    grads = torch_npu.npu_fusion_attention_grad(
        *(query, key, value, _widen(grad, value.shape[-1]), query.shape[1], "TND"),
        atten_mask=atten_mask,
        softmax_max=softmax_max,
        softmax_sum=softmax_sum,
        attention_in=_widen(attention, value.shape[-1]),
        scale_value=scale,
        pre_tockens=reach,
        next_tockens=0 if sparse_mode == 4 else _UNBOUNDED,
        actual_seq_qlen=q_len,
        actual_seq_kvlen=kv_len,
        sparse_mode=sparse_mode,
    )[:3]
    grad_query, grad_key, grad_value = (_narrow(x, dim) for x, dim in zip(grads, dims, strict=True))
    return grad_query, grad_key, grad_value


@cache
def triangle(device: torch.device) -> Tensor:
    """The mask of the causal sparse modes: [2048, 2048], the same for every length."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(diagonal=1)


def _to_fusion_dims(query: Tensor, key: Tensor, value: Tensor, pads_value: bool) -> Triple:
    dim = max(query.shape[-1], value.shape[-1])
    return _widen(query, dim), _widen(key, dim), _widen(value, dim) if pads_value else value


# ---- dims


def _of_16(dim: int) -> int:
    return -(-dim // 16) * 16


def _widen(tensor: Tensor, dim: int) -> Tensor:
    return F.pad(tensor, (0, dim - tensor.shape[-1])) if tensor.shape[-1] < dim else tensor


def _narrow(tensor: Tensor, dim: int) -> Tensor:
    return tensor[..., :dim].contiguous() if tensor.shape[-1] > dim else tensor
