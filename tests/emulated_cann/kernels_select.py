"""npu_nsa_select_attention and its gradient, whose masks do not agree by themselves (section 6).

A row has l' * k slots, one a column of its listed blocks, in the order of the list. Products with keys and values are
taken over many tokens at once, and slots gathered from them or added into them, which is the same for finite inputs.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_common import (
    FLT_MAX,
    HALF,
    by_group,
    by_kv_head,
    is_causal_triangle,
    matmul,
    require,
    require_equal_counts,
    require_heads,
    require_one_type,
    require_statistics,
    row_chunks,
    samples,
    softmax,
    sum_of_products,
    to_rows,
    trap,
)
from .variants import Variants

_LONGEST = 128 * 1024


class _Chunk(NamedTuple):
    """Some rows of a sample."""

    rows: slice  # of the packed queries
    keys: slice  # of the packed keys
    position: Tensor  # of each row in its sample [R, 1, 1]
    ids: Tensor  # [R, N2, k]
    key: Tensor  # [N2, S, D1]
    value: Tensor  # [N2, S, D2]


class _Slots(NamedTuple):
    """What the backward takes a row's slots for, each [R, N2, k * l']."""

    source: Tensor  # the token whose key and value are multiplied
    target: Tensor  # the token that gets the gradient
    masked: Tensor
    stale: Tensor  # holds what someone else left in the workspace


def nsa_select_attention(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Attention over the listed blocks (sections 3, 6.1)."""
    q_spans, kv_spans = _check(args, variants)
    require(len(q_spans) <= 1024, f"{len(q_spans)} samples are more than 1024 (section 3)")
    causal = _masks_forward(args.atten_mask, variants)
    kv_heads = args.key.shape[1]
    for chunk in _chunks(args, q_spans, kv_spans):
        tokens = _tokens(chunk.ids, args.select_block_size)
        logits = _gather(matmul(by_group(args.query[chunk.rows], kv_heads), chunk.key.mT), tokens)
        if causal:
            # Top-left: a query's place in its sample is its place among the keys (section 6.1).
            _mask(logits, tokens > chunk.position)
        probability, row_max, row_sum = softmax(logits.mul_(args.scale))
        attention = matmul(_add_up(probability, tokens, chunk.key.shape[1]), chunk.value)
        args.attention[chunk.rows] = to_rows(attention).to(args.attention.dtype)
        # Here the statistics lie as their shape says (section 3).
        args.softmax_max[chunk.rows] = row_max.T[..., None]
        args.softmax_sum[chunk.rows] = row_sum.T[..., None]


def nsa_select_attention_grad(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """The gradient, from the attention and the softmax statistics that it is given (sections 3, 6.2)."""
    q_spans, kv_spans = _check(args, variants)
    require_one_type(HALF, query=args.query, attention=args.attention, grad=args.grad)
    require_statistics(args)
    most = max(args.query.shape[0], args.key.shape[0])
    require(most <= 2 << 20, f"{most} tokens are more than 2M (section 3)")
    key_grad, value_grad = torch.zeros(args.key.shape), torch.zeros(args.value.shape)
    for chunk in _chunks(args, q_spans, kv_spans):
        slots = _backward_slots(chunk, args, variants, deterministic)
        probability, logits_grad = _slot_gradients(chunk, slots, args)
        width, kv_heads = chunk.key.shape[1], chunk.key.shape[0]
        query, grad = by_group(args.query[chunk.rows], kv_heads), by_group(args.grad[chunk.rows], kv_heads)
        by_source = _add_up(logits_grad, slots.source, width)
        by_target = by_source if slots.source is slots.target else _add_up(logits_grad, slots.target, width)
        query_grad = matmul(by_source, chunk.key) * args.scale
        args.query_grad[chunk.rows] = to_rows(query_grad).to(args.query_grad.dtype)
        key_grad[chunk.keys] += sum_of_products(by_target, query) * args.scale
        value_grad[chunk.keys] += sum_of_products(_add_up(probability, slots.target, width), grad)
    args.key_grad.copy_(key_grad)
    args.value_grad.copy_(value_grad)


def _slot_gradients(chunk: _Chunk, slots: _Slots, args: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Probabilities, rebuilt from their statistics, and the gradient of the logits, [N2, G, R, k * l'] each (section 3)."""
    query, grad, attention, row_max, row_sum = (
        by_group(packed[chunk.rows], chunk.key.shape[0])
        for packed in (args.query, args.grad, args.attention, args.softmax_max[..., :1], args.softmax_sum[..., :1])
    )
    logits = _mask(_gather(matmul(query, chunk.key.mT), slots.source), slots.masked).mul_(args.scale)
    probability = logits.sub_(row_max).exp_().div_(row_sum)
    delta = (grad * attention).sum(-1, keepdim=True)
    logits_grad = probability * (_gather(matmul(grad, chunk.value.mT), slots.source) - delta)
    if slots.stale.any():
        seen = _by_head(slots.stale & ~slots.masked)
        probability.masked_fill_(seen, math.nan)
        logits_grad.masked_fill_(seen, math.nan)
    return probability, logits_grad


def _check(args: SimpleNamespace, variants: Variants) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    require_heads(args)
    require_one_type(HALF, query=args.query, key=args.key, value=args.value)
    require(args.sparse_mode == 2, f"sparse_mode {args.sparse_mode} is not emulated, torch_npu passes 2 (section 3)")
    block_size, count, heads = args.select_block_size, args.select_block_count, args.head_num
    group = heads // args.key.shape[1]
    require(group <= 32, f"{group} query heads a key/value head are more than 32 (section 3)")
    require(heads <= 128, f"{heads} query heads are more than 128 (section 3)")
    require(block_size % 16 == 0 and 16 <= block_size <= 128, f"select_block_size {block_size}: multiples of 16 (section 3)")
    require(1 <= count <= 32, f"select_block_count {count}: 1 to 32 (section 3)")
    dims = (args.key.shape[2], args.value.shape[2])
    trap(any(dim % 16 for dim in dims), f"head dims {dims}: data moves assume multiples of 16 (section 3)")
    require(args.topk_indices.dtype == torch.int32, "topk_indices must be int32 (section 3)")
    q_spans = samples("actual_seq_qlen", args.actual_seq_qlen, args.query.shape[0])
    kv_spans = samples("actual_seq_kvlen", args.actual_seq_kvlen, args.key.shape[0])
    require_equal_counts(actual_seq_qlen=q_spans, actual_seq_kvlen=kv_spans)
    least = block_size * count + variants.refuses_shortest_keys
    for b, ((start, stop), (key_start, key_stop)) in enumerate(zip(q_spans, kv_spans, strict=True)):
        keys = key_stop - key_start
        require(1 <= stop - start <= _LONGEST, f"sample {b} has {stop - start} queries: 1 to {_LONGEST} (section 3)")
        fits = keys % block_size == 0 and least <= keys <= _LONGEST
        require(fits, f"sample {b} has {keys} keys: multiples of {block_size} from {least} to {_LONGEST} (section 3)")
    return q_spans, kv_spans


def _masks_forward(mask: Tensor | None, variants: Variants) -> bool:
    """A mask of any 2-D shape and contents switches the causal mask on (section 6.1)."""
    if mask is None or variants.forward_ignores_mask:
        return False
    if variants.forward_reads_mask:
        trap(not is_causal_triangle(mask), f"reads a mask {list(mask.shape)} as the 2048 x 2048 triangle (section 6.4)")
    return mask.dim() == 2 and mask.dtype in (torch.bool, torch.uint8)


def _chunks(args: SimpleNamespace, q_spans: list[tuple[int, int]], kv_spans: list[tuple[int, int]]) -> Iterator[_Chunk]:
    kv_heads, block_size = args.key.shape[1], args.select_block_size
    ids = _list_memory(args.topk_indices, (args.query.shape[0], kv_heads, args.select_block_count))
    for b, ((start, stop), (key_start, key_stop)) in enumerate(zip(q_spans, kv_spans, strict=True)):
        blocks = (key_stop - key_start) // block_size
        lowest, highest = (int(bound) for bound in ids[start:stop].aminmax())
        trap(lowest < 0 or highest >= blocks, f"ids {lowest} to {highest} of sample {b}, of {blocks} blocks (section 3)")
        key, value = by_kv_head(args.key[key_start:key_stop]), by_kv_head(args.value[key_start:key_stop])
        for rows in row_chunks(stop - start, args.head_num * (key_stop - key_start)):
            packed = slice(start + rows.start, start + rows.stop)
            position = torch.arange(rows.start, rows.stop)[:, None, None]
            width = _width(rows.stop, ids[packed], block_size, key_stop - key_start)
            keys = slice(key_start, key_start + width)
            yield _Chunk(packed, keys, position, ids[packed].long(), key[:, :width], value[:, :width])


def _width(last_row: int, ids: Tensor, block_size: int, keys: int) -> int:
    """The keys to compute with: up to the last row's block where no future one is listed, else all of the sample's.

    The farthest block listed would do, but then the last bits of a row would depend on what other rows list.
    """
    causal = max(-(-last_row // block_size), ids.shape[-1])
    return causal * block_size if int(ids.max()) < causal and causal * block_size < keys else keys


def _list_memory(topk_indices: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The lists as the kernel finds them: [T1, N2, k], whatever shape the tensor says (section 3)."""
    flat, size = topk_indices.contiguous().flatten(), math.prod(shape)
    trap(size > flat.numel(), f"reads past the end of topk_indices {list(topk_indices.shape)} (section 3)")
    return flat[:size].view(shape)


def _backward_slots(chunk: _Chunk, args: SimpleNamespace, variants: Variants, deterministic: bool) -> _Slots:
    block_size, position = args.select_block_size, chunk.position
    target = _tokens(chunk.ids, block_size)
    none = torch.zeros_like(target, dtype=torch.bool)
    if variants.backward_compares_ids:
        return _Slots(target, target, target > position, none)
    if _is_basic(args, deterministic):
        return _Slots(target, target, _masked_by_halves(chunk.ids, position), none)
    # The general kernel takes the tokens before a prefix's end in their order, whatever is listed (section 6.2).
    column = torch.arange(target.shape[-1])
    prefix = position + 1 < target.shape[-1]
    source = torch.where(prefix, torch.where(column <= position, column, 0), target)
    return _Slots(source, target, _masked_by_list(chunk.ids, position, block_size), (prefix & (column > position)) | none)


def _is_basic(args: SimpleNamespace, deterministic: bool) -> bool:
    """Whether the gradient runs on the basic kernel rather than the general one (section 3)."""
    sizes = (args.select_block_count, args.select_block_size) == (16, 64)
    dims = args.key.shape[2] <= 192 and args.value.shape[2] <= 128
    return sizes and dims and args.head_num // args.key.shape[1] <= 16 and not deterministic


def _masked_by_halves(ids: Tensor, position: Tensor) -> Tensor:
    """The basic kernel's mask: the list is two halves of 8 blocks, each on its own (section 6.2)."""
    position = position[..., None]
    found, after = _after_own(ids.unflatten(-1, (2, 8)), position, 64, position + 1 < 1024)
    return torch.where(found, after, position + 1 <= 512).flatten(-2)


def _masked_by_list(ids: Tensor, position: Tensor, block_size: int) -> Tensor:
    """The general kernel's mask: the own block is looked for where it is in 0, 1, 2, ... (section 6.2)."""
    searched = torch.arange(ids.shape[-1]) <= position // block_size
    prefix = position + 1 < ids.shape[-1] * block_size
    found, after = _after_own(ids.where(searched, -1), position, block_size, prefix)
    return found & after


def _after_own(ids: Tensor, position: Tensor, block_size: int, all_later: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the own block is listed [..., 1]; the slots after the query in it, and if `all_later` in the list behind it."""
    place = ((ids == position // block_size) * torch.arange(1, ids.shape[-1] + 1)).amax(-1, keepdim=True) - 1
    slot = torch.arange(ids.shape[-1] * block_size)
    behind = slot > place * block_size + position % block_size
    return place >= 0, behind & (all_later | (slot // block_size == place))


def _tokens(ids: Tensor, block_size: int) -> Tensor:
    """The token of each slot: [R, N2, k] to [R, N2, k * l']. A block listed twice counts twice (section 3)."""
    return (ids[..., None] * block_size + torch.arange(block_size)).flatten(-2)


def _by_head(slots: Tensor) -> Tensor:
    """[R, N2, k * l'] beside [N2, G, R, k * l']."""
    return slots.transpose(0, 1)[:, None]


def _gather(products: Tensor, tokens: Tensor) -> Tensor:
    """[N2, G, R, S] to the slots [N2, G, R, k * l']."""
    return products.gather(-1, _by_head(tokens).expand(-1, products.shape[1], -1, -1))


def _add_up(slots: Tensor, tokens: Tensor, width: int) -> Tensor:
    """The slots [N2, G, R, k * l'] to [N2, G, R, S]."""
    index = _by_head(tokens).expand(-1, slots.shape[1], -1, -1)
    return slots.new_zeros(*slots.shape[:-1], width).scatter_add_(-1, index, slots)


def _mask(logits: Tensor, masked: Tensor) -> Tensor:
    """Replace before scaling: with a scale above 1 a row with nothing left is NaN (section 3)."""
    return logits.masked_fill_(_by_head(masked), -FLT_MAX)
