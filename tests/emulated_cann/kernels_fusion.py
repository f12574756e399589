"""npu_fusion_attention with its gradient, which compress attention's gradient is too (sections 2.4, 4)."""

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
    per_sample,
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

_EVERYTHING = 1 << 40


class _Chunk(NamedTuple):
    """Some rows of a sample, and the keys that any of them sees."""

    rows: slice  # of the packed queries
    sample: tuple[int, int]  # the packed queries of the whole sample
    of_sample: slice  # the rows, counted in their sample
    keys: slice  # of the packed keys
    masked: Tensor  # [R, S]
    key: Tensor  # [N2, S, D1]
    value: Tensor  # [N2, S, D2]


def flash_attention(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Attention of packed samples (section 4)."""
    for chunk in _chunks(args, _check(args, variants)):
        query = by_group(args.query[chunk.rows], chunk.key.shape[0])
        logits = (matmul(query, chunk.key.mT) * args.scale).masked_fill_(chunk.masked, -FLT_MAX)
        probability, row_max, row_sum = softmax(logits)
        args.attention[chunk.rows] = to_rows(matmul(probability, chunk.value)).to(args.attention.dtype)
        per_sample(args.softmax_max, *chunk.sample)[:, chunk.of_sample] = row_max[..., None]
        per_sample(args.softmax_sum, *chunk.sample)[:, chunk.of_sample] = row_sum[..., None]


def flash_attention_grad(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """The gradient, from the attention and the softmax statistics that it is given (sections 2.4, 4)."""
    spans = _check(args, variants)
    require_one_type((*HALF, torch.float32), query=args.query, grad=args.grad, attention=args.attention)
    require_statistics(args)
    key_grad, value_grad = torch.zeros(args.key.shape), torch.zeros(args.value.shape)
    for chunk in _chunks(args, spans):
        query, grad, attention = (
            by_group(packed[chunk.rows], chunk.key.shape[0]) for packed in (args.query, args.grad, args.attention)
        )
        row_max, row_sum = (
            per_sample(statistic.contiguous(), *chunk.sample)[:, chunk.of_sample, :1].unflatten(0, query.shape[:2])
            for statistic in (args.softmax_max, args.softmax_sum)
        )
        logits = (matmul(query, chunk.key.mT) * args.scale).masked_fill_(chunk.masked, -FLT_MAX)
        probability = logits.sub_(row_max).exp_().div_(row_sum)
        delta = (grad * attention).sum(-1, keepdim=True)
        logits_grad = probability * (matmul(grad, chunk.value.mT) - delta) * args.scale
        args.query_grad[chunk.rows] = to_rows(matmul(logits_grad, chunk.key)).to(args.query_grad.dtype)
        key_grad[chunk.keys] += sum_of_products(logits_grad, query)
        value_grad[chunk.keys] += sum_of_products(probability, grad)
    args.key_grad.copy_(key_grad)
    args.value_grad.copy_(value_grad)


def batched_attention(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Attention of a batch of sequences of one length, SBH: packed samples by another name."""
    packed = _packed(args, ("attention",))
    flash_attention(packed, variants, deterministic)
    _unpack(args, packed, ("attention",))


def batched_attention_grad(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Its gradient."""
    gradients = ("query_grad", "key_grad", "value_grad")
    packed = _packed(args, ("grad", "attention", *gradients))
    flash_attention_grad(packed, variants, deterministic)
    _unpack(args, packed, gradients)


def _packed(args: SimpleNamespace, others: tuple[str, ...]) -> SimpleNamespace:
    """The arguments of the operator for packed samples: [S, B, N * D] becomes [B * S, N, D], and the statistics, which are
    [B, N, S, 8] here, lie in memory as they do there."""
    require(args.layout == "SBH", f"layout {args.layout} of equal sequences is not emulated, only SBH")
    length, batch, width = args.query.shape
    dim = width // args.head_num
    kv_heads = args.key.shape[2] // dim
    heads = {"key": kv_heads, "value": kv_heads, "key_grad": kv_heads, "value_grad": kv_heads}
    packed = SimpleNamespace(**vars(args))
    for name in ("query", "key", "value", *others):
        tensor = getattr(args, name).transpose(0, 1).flatten(0, 1).unflatten(1, (heads.get(name, args.head_num), -1))
        setattr(packed, name, tensor.clone(memory_format=torch.contiguous_format))
    for name in ("softmax_max", "softmax_sum"):
        setattr(packed, name, getattr(args, name).view(batch * length, args.head_num, 8))
    packed.layout = "TND"
    packed.actual_seq_qlen = [length * (b + 1) for b in range(batch)]
    packed.actual_seq_kvlen = [args.key.shape[0] * (b + 1) for b in range(batch)]
    return packed


def _unpack(args: SimpleNamespace, packed: SimpleNamespace, names: tuple[str, ...]) -> None:
    for name in names:
        out = getattr(args, name)
        out.copy_(getattr(packed, name).flatten(1).unflatten(0, (out.shape[1], out.shape[0])).transpose(0, 1))


def _check(args: SimpleNamespace, variants: Variants) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Refuse what the operator does not take, or this emulation; return the spans of queries and of keys (section 4)."""
    require_heads(args)
    require_one_type((*HALF, torch.float32), query=args.query, key=args.key, value=args.value)
    dims = (args.key.shape[2], args.value.shape[2])
    require(dims[0] == dims[1] or not variants.refuses_unequal_dims, f"head dims {dims} must be equal (section 9, question 5)")
    require(args.head_num <= 256, f"{args.head_num} query heads are more than 256 (section 4)")
    require(args.query.shape[0] <= 1 << 20, f"{args.query.shape[0]} queries are more than 1M (section 4)")
    require(args.sparse_mode in range(5), f"sparse_mode {args.sparse_mode} is not emulated, 0 to 4 are")
    require(args.keep_prob == 1, f"keep_prob {args.keep_prob}: dropout is not emulated")
    for name in ("pse", "drop_mask", "padding_mask"):
        given = getattr(args, name)
        require(given is None or given.numel() == 0, f"{name} is not emulated")
    mask = args.atten_mask
    fits = mask is None or (mask.dim() == 2 and mask.dtype in (torch.bool, torch.uint8))
    require(fits, "atten_mask must be 2-D, bool or uint8")
    q_spans = samples("actual_seq_qlen", args.actual_seq_qlen, args.query.shape[0])
    kv_spans = samples("actual_seq_kvlen", args.actual_seq_kvlen, args.key.shape[0])
    require_equal_counts(actual_seq_qlen=q_spans, actual_seq_kvlen=kv_spans)
    require(len(q_spans) <= 2048, f"{len(q_spans)} samples are more than 2K (section 4)")
    _check_mask(args, q_spans, kv_spans)
    return list(zip(q_spans, kv_spans, strict=True))


def _check_mask(args: SimpleNamespace, q_spans: list[tuple[int, int]], kv_spans: list[tuple[int, int]]) -> None:
    if args.atten_mask is None:
        return
    if args.sparse_mode in (0, 1):
        full = tuple(max(stop - start for start, stop in spans) for spans in (q_spans, kv_spans))
        given = tuple(args.atten_mask.shape)
        require(given == full, f"atten_mask {list(given)} must be {list(full)}, of the longest samples (section 4)")
    else:
        trap(not is_causal_triangle(args.atten_mask), "atten_mask must be the 2048 x 2048 upper triangle (section 4)")


def _chunks(args: SimpleNamespace, spans: list[tuple[tuple[int, int], tuple[int, int]]]) -> Iterator[_Chunk]:
    for b, ((start, stop), (key_start, key_stop)) in enumerate(spans):
        queries, keys = stop - start, key_stop - key_start
        trap(queries > 0 and keys == 0, f"sample {b} has queries and no keys: no document says what they get")
        for rows in row_chunks(queries, args.head_num * max(keys, 1)):
            masked = _masked(args, rows, queries, keys)
            # Varlen forbids rows with everything masked, and says nothing of what they get (sections 2.4, 9.4).
            trap(bool(masked.all(-1).any()), f"a row of sample {b} has every key masked (section 2.4; section 9, question 4)")
            seen = (~masked).any(0).nonzero()
            first, last = int(seen[0]), int(seen[-1]) + 1
            packed, of_keys = slice(start + rows.start, start + rows.stop), slice(key_start + first, key_start + last)
            key, value = by_kv_head(args.key[of_keys]), by_kv_head(args.value[of_keys])
            yield _Chunk(packed, (start, stop), rows, of_keys, masked[:, first:last], key, value)


def _masked(args: SimpleNamespace, rows: slice, queries: int, keys: int) -> Tensor:
    """[R, S]; without a mask there is none of any kind, band or causal (section 4)."""
    column, row = torch.arange(keys), torch.arange(rows.start, rows.stop)[:, None]
    if args.atten_mask is None:
        return torch.zeros(row.shape[0], keys, dtype=torch.bool)
    if args.sparse_mode == 1:
        return args.atten_mask[rows, :keys] != 0
    to_end = keys - queries  # aligns the last query with the last key
    before, after = {
        0: (args.pre_tokens, args.next_tokens),
        2: (_EVERYTHING, 0),
        3: (_EVERYTHING, to_end),
        4: (args.pre_tokens - to_end, args.next_tokens + to_end),
    }[args.sparse_mode]
    outside = (column < row - before) | (column > row + after)
    return outside | (args.atten_mask[rows, :keys] != 0) if args.sparse_mode == 0 else outside
