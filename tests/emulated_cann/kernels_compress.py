"""npu_nsa_compress with its gradient, and npu_nsa_compress_attention, whose gradient is fusion attention's."""

from types import SimpleNamespace

import torch
from torch import Tensor

from .kernels_common import (
    FLT_MAX,
    HALF,
    by_group,
    by_kv_head,
    matmul,
    per_sample,
    require,
    require_equal_counts,
    require_heads,
    require_one_type,
    row_chunks,
    samples,
    softmax,
    to_rows,
    trap,
)
from .variants import Variants


def nsa_compress(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Sums over windows, weighted by place and head (section 1)."""
    _check_compress(args)
    require(args.output.numel() > 0, "the output must not be empty (section 1)")
    output = torch.zeros(args.output.shape)
    weight, stride = args.weight.float(), args.compress_stride
    for rows, first, windows in _windows(args):
        for offset in range(args.compress_block_size):
            output[rows] += _strided(args.input, first + offset, windows, stride) * weight[offset][:, None]
    args.output.copy_(output)


def nsa_compress_grad(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Overlapping windows add up in the input's gradient, samples and dims in the weight's (section 1)."""
    _check_compress(args)
    require_one_type(HALF, grad=args.grad, input=args.input)
    input_grad, weight_grad = torch.zeros(args.input.shape), torch.zeros(args.weight.shape)
    weight, stride = args.weight.float(), args.compress_stride
    for rows, first, windows in _windows(args):
        grad = args.grad[rows].float()
        for offset in range(args.compress_block_size):
            _strided(input_grad, first + offset, windows, stride).add_(grad * weight[offset][:, None])
            weight_grad[offset] += (grad * _strided(args.input, first + offset, windows, stride)).sum((0, 2))
    args.input_grad.copy_(input_grad)
    args.weight_grad.copy_(weight_grad)


def _check_compress(args: SimpleNamespace) -> None:
    block_size, stride = args.compress_block_size, args.compress_stride
    require(args.layout == "TND", f"layout must be TND, not {args.layout} (section 1)")
    require(args.actual_seq_len_type == 0, "actual_seq_len_type must be 0, prefix sums (section 1)")
    require_one_type(HALF, input=args.input, weight=args.weight)
    require(args.input.dim() == 3 and args.input.numel() > 0, "input must be [T, N, D], not empty (section 1)")
    heads, dim = args.input.shape[1:]
    require(tuple(args.weight.shape) == (block_size, heads), f"weight must be [{block_size}, {heads}] (section 1)")
    require(block_size % 16 == 0 and 16 <= block_size <= 128, "compress_block_size: multiples of 16 to 128 (section 1)")
    require(stride % 16 == 0 and 16 <= stride <= block_size, "compress_stride: multiples of 16 to the block size (section 1)")
    require(heads <= 128, f"{heads} heads are more than 128 (section 1)")
    require(dim % 16 == 0 and dim <= 256, f"D = {dim} must be a multiple of 16 to 256 (section 1)")


def _windows(args: SimpleNamespace) -> list[tuple[slice, int, int]]:
    """Of each sample that has any: its rows of the output, its first token, its number of windows (section 1)."""
    found, row = [], 0
    for start, stop in samples("actual_seq_len", args.actual_seq_len, args.input.shape[0]):
        windows = max((stop - start - args.compress_block_size) // args.compress_stride + 1, 0)
        if windows:
            found.append((slice(row, row + windows), start, windows))
        row += windows
    return found


def _strided(packed: Tensor, first: int, count: int, stride: int) -> Tensor:
    return packed[first : first + (count - 1) * stride + 1 : stride]


def nsa_compress_attention(args: SimpleNamespace, variants: Variants, deterministic: bool) -> None:
    """Attention over the compressed tokens, and the choice of blocks (section 2)."""
    q_spans, cmp_spans = _check_compress_attention(args)
    kv_heads, widest = args.key.shape[1], max(stop - start for start, stop in cmp_spans)
    per_block = args.select_block_size // args.compress_stride
    for (start, stop), cmp_span in zip(q_spans, cmp_spans, strict=True):
        key, value = by_kv_head(args.key[slice(*cmp_span)]), by_kv_head(args.value[slice(*cmp_span)])
        width = key.shape[1]
        statistics = [per_sample(statistic, start, stop) for statistic in (args.softmax_max, args.softmax_sum)]
        for rows in row_chunks(stop - start, args.head_num * width):
            packed = slice(start + rows.start, start + rows.stop)
            logits = matmul(by_group(args.query[packed], kv_heads), key.mT) * args.scale
            if args.atten_mask is not None and args.sparse_mode == 1:
                # Scaled first, then replaced: a row with nothing left weighs all windows alike (section 2.1).
                logits.masked_fill_(_mask_memory(args.atten_mask, rows, width, widest), -FLT_MAX)
            probability, row_max, row_sum = softmax(logits)
            args.attention[packed] = to_rows(matmul(probability, value)).to(args.attention.dtype)
            for statistic, row in zip(statistics, (row_max, row_sum), strict=True):
                statistic[:, rows] = row[..., None]
            scores = _importance(probability.sum(1), per_block, args.compress_block_size // args.compress_stride)
            if args.topk_mask is not None:
                forced = _mask_memory(args.topk_mask, rows, scores.shape[-1], -(-widest // per_block))
                scores.masked_fill_(forced, FLT_MAX)  # section 2.3
            args.topk_indices[packed] = _top(scores, args.select_block_count, variants).transpose(0, 1).int()


def _check_compress_attention(args: SimpleNamespace) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    require_heads(args)
    require_one_type(HALF, query=args.query, key=args.key, value=args.value)
    require(args.sparse_mode in (0, 1), f"sparse_mode {args.sparse_mode} must be 0 or 1 (section 2)")
    group = args.query.shape[1] // args.key.shape[1]
    require(group < 128 and 128 % group == 0, f"{group} query heads a key/value head: must divide 128, be less (section 2)")
    _check_sizes(args)
    for name in ("atten_mask", "topk_mask"):
        mask = getattr(args, name)
        fits = mask is None or (mask.dim() == 2 and mask.dtype in (torch.bool, torch.uint8))
        require(fits, f"{name} must be 2-D, bool or uint8 (section 2)")
    q_spans = samples("actual_seq_qlen", args.actual_seq_qlen, args.query.shape[0])
    cmp_spans = samples("actual_cmp_seq_kvlen", args.actual_cmp_seq_kvlen, args.key.shape[0])
    sel_ends = args.actual_sel_seq_kvlen or []
    sel_spans = samples("actual_sel_seq_kvlen", sel_ends, max(sel_ends, default=0))
    require_equal_counts(actual_seq_qlen=q_spans, actual_cmp_seq_kvlen=cmp_spans, actual_sel_seq_kvlen=sel_spans)
    require(len(q_spans) <= 4096, f"{len(q_spans)} samples are more than 4096 (section 2)")
    _check_lengths(args, cmp_spans, sel_spans)
    return q_spans, cmp_spans


def _check_sizes(args: SimpleNamespace) -> None:
    window, stride, block, count = (
        *(args.compress_block_size, args.compress_stride),
        *(args.select_block_size, args.select_block_count),
    )
    require(window % 16 == 0 and 16 <= window <= 128, f"compress_block_size {window}: multiples of 16 to 128 (section 2)")
    require(stride in (16, 32, 48, 64), f"compress_stride {stride}: 16, 32, 48 or 64 (section 2)")
    require(block % 16 == 0 and 16 <= block <= 128, f"select_block_size {block}: multiples of 16 to 128 (section 2)")
    require(
        stride <= window <= block, "sizes must not fall: compress_stride, compress_block_size, select_block_size (section 2)"
    )
    require(block % stride == 0, f"select_block_size {block} must be a multiple of compress_stride {stride} (section 2)")
    require(1 <= count <= 32, f"select_block_count {count}: 1 to 32 (section 2)")


def _check_lengths(args: SimpleNamespace, cmp_spans: list[tuple[int, int]], sel_spans: list[tuple[int, int]]) -> None:
    count, per_block = args.select_block_count, args.select_block_size // args.compress_stride
    for b, (windows, blocks) in enumerate(zip(cmp_spans, sel_spans, strict=True)):
        width, listed = windows[1] - windows[0], blocks[1] - blocks[0]
        require(width <= 14000, f"sample {b} has {width} compressed tokens, more than 14000 (section 2)")
        require(listed >= count, f"sample {b} has {listed} blocks, fewer than select_block_count {count} (section 2)")
        # The list is only checked; the kernel counts the blocks itself (section 2).
        trap(-(-width // per_block) < count, f"sample {b} has too few compressed tokens for its {listed} blocks (section 2)")


def _mask_memory(mask: Tensor, rows: slice, columns: int, stride: int) -> Tensor:
    """Rows of a mask as the kernel finds them, by a row stride that it assumes (section 2)."""
    flat = mask.contiguous().flatten()
    trap((rows.stop - 1) * stride + columns > flat.numel(), f"reads past the end of a mask {list(mask.shape)} (section 2)")
    found = flat.as_strided((rows.stop - rows.start, columns), (stride, 1), flat.storage_offset() + rows.start * stride)
    trap(found.dtype == torch.uint8 and bool((found > 1).any()), "a mask holds more than 0 and 1 (section 9, question 9)")
    return found.bool()


def _importance(probability: Tensor, m: int, n: int) -> Tensor:
    """Scores of the blocks from probabilities summed over a group: [N2, R, C] to [N2, R, Sel] (section 2.2)."""
    width = probability.shape[-1]
    score = probability.new_zeros(*probability.shape[:-1], -(-width // m))
    for j in range(m + n - 1):
        window = m * (torch.arange(score.shape[-1]) + 1) - j
        inside = (window >= 0) & (window < width)
        score[..., inside] += min(j + 1, n, m + n - 1 - j) * probability[..., window[inside]]
    return score


def _top(scores: Tensor, count: int, variants: Variants) -> Tensor:
    """Best first, equal scores by id (section 2.3)."""
    if not variants.ties_reversed:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    from_the_end = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return scores.shape[-1] - 1 - from_the_end
