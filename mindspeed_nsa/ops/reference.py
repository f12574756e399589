"""Plain PyTorch: what the operators compute, forward and backward, in any float type. Every other backend is tested against it.

The three attentions differ only in what a query sees, so there is one attention here and three kinds of sight. Half types are
computed in float32 and rounded once, at the end; float64 stays float64. Work is done in chunks of queries: no temporary grows
as tokens times tokens.

b: sample, t: query of a sample, c: compressed window, s: selectable block.
T: packed tokens, N1: query heads, N2: key/value heads, G: N1 / N2, D1, D2: dims of query/key and of value, R: rows of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What a listed but masked logit is replaced by: float32's lowest, in every type (contract, section 2.1).
LOWEST = torch.finfo(torch.float32).min
_CHUNK_ELEMENTS = 1 << 19


class Sight(NamedTuple):
    """Which of a sample's keys the rows of a chunk see."""

    start: int  # the first key that any row may see
    stop: int
    bias: Tensor  # [N2 or 1, R, stop - start]: 0 seen, LOWEST listed but masked, -inf not listed
    listed: Tensor | None = None  # [N2, R, stop - start], how often each key is listed; None: at most once


Look = Callable[[int, int, int], Sight]  # (b, first row, last row + 1) -> Sight


# ---- compress


def window_count(length: int, block_size: int, stride: int) -> int:
    """Windows that fit into a sample of `length` tokens (contract, section 1)."""
    return (length - block_size) // stride + 1 if length >= block_size else 0


def compress(input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]) -> Tensor:
    """`out[c] = sum_j input[c * stride + j] * weight[j]`, sample by sample: [T, N, D], [block_size, N] -> [windows, N, D]."""
    pooled = []
    for start, stop in _samples(seq_len):
        windows = window_count(stop - start, block_size, stride)
        sums = _work(input.new_zeros(windows, *input.shape[1:]))
        for j in range(block_size if windows else 0):
            sums += _work(_tokens_at(input, start, j, windows, stride)) * _work(weight[j])[:, None]
        pooled.append(sums)
    return torch.cat(pooled).to(input.dtype)


def compress_backward(
    grad: Tensor, input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of `compress` for its input and weight."""
    grad_input, grad_weight = (_work(x.new_zeros(x.shape)) for x in (input, weight))
    row = 0
    for start, stop in _samples(seq_len):
        windows = window_count(stop - start, block_size, stride)
        grad_rows = _work(grad[row : row + windows])
        row += windows
        for j in range(block_size if windows else 0):
            tokens = _work(_tokens_at(input, start, j, windows, stride))
            grad_weight[j] += (grad_rows * tokens).sum(dim=(0, 2))
            _tokens_at(grad_input, start, j, windows, stride).add_(grad_rows * _work(weight[j])[:, None])
    return grad_input.to(input.dtype), grad_weight.to(weight.dtype)


def _tokens_at(tokens: Tensor, start: int, offset: int, windows: int, stride: int) -> Tensor:
    first = start + offset
    return tokens[first : first + (windows - 1) * stride + 1 : stride]


# ---- compressed attention


class Compressed(NamedTuple):
    """Settings of attention over compressed windows."""

    scale: float
    compress_block_size: int
    compress_stride: int
    select_block_size: int
    select_block_count: int  # 0: choose none
    causal: bool  # rules by position stand in for the two masks
    init_blocks: int  # with `causal`: blocks forced at the start of a sample
    local_blocks: int  # with `causal`: blocks forced up to the query's own
    own_block: bool  # with `causal`: whether the query's own block may be chosen
    importance: str  # "ascend" or "paper"
    q_len: Sequence[int]
    cmp_len: Sequence[int]
    sel_len: Sequence[int]
    q_offset: Sequence[int]  # with `causal`: the position in its sample of each sample's first query


def compress_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_mask: Tensor | None, atten_mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over compressed windows, and the blocks each query finds important.

    With `causal` a query sees the windows that end at or before it, and gets 0 where there are none; the first `init_blocks`
    and the `local_blocks` up to its own are forced; without `own_block` only blocks before its own are chosen. A query before
    token `select_block_size * select_block_count` of its sample lists the blocks 0, 1, ...: there is no choice yet, as no more
    exist. Queries may be a later part of their sample: `q_offset` says where it starts.

    Args:
        query: [T, N1, D1].
        key: [windows, N2, D1].
        value: [windows, N2, D2].
        topk_mask: [most queries of a sample, most blocks], true where a block is forced.
        atten_mask: [most queries of a sample, most windows], true where a window is masked.
        settings: as in `Compressed`.

    Returns:
        attention [T, N1, D2]; block ids [T, N2, select_block_count] int32, best first; softmax max and sum [T, N1, 8], 8 equal
        copies in float32 (float64 for float64), in memory [N1, S_b, 8] sample after sample (contract, section 2).
    """
    at = Compressed(*settings)
    look = _look_at_windows(query.device, atten_mask, at)
    attention, row_max, row_sum = _attend(query, key, value, at.scale, at.q_len, at.cmp_len, look)
    ids = _choose(query, key, row_max, row_sum, topk_mask, look, at)
    return attention, ids, per_sample(row_max, at.q_len), per_sample(row_sum, at.q_len)


def compress_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_mask: Tensor | None,
    atten_mask: Tensor | None,
    attention: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value. The choice of blocks has none."""
    at = Compressed(*settings)
    row_max, row_sum = from_per_sample(softmax_max, at.q_len), from_per_sample(softmax_sum, at.q_len)
    look = _look_at_windows(query.device, atten_mask, at)
    return _attend_backward(grad, query, key, value, attention, row_max, row_sum, at.scale, at.q_len, at.cmp_len, look)


def block_scores(
    query: Tensor, key: Tensor, softmax_max: Tensor, softmax_sum: Tensor, first_row: int, last_row: int, *settings: Any
) -> Tensor:
    """Importance of every block for the queries `first_row` to `last_row` (exclusive), by the causal rule.

    Returns:
        [rows, N2, most blocks of a sample] float32, summed over the query heads of each key/value head (contract, section 2.2;
        paper, equations 9 and 10). Blocks that a sample does not have score 0.
    """
    at = Compressed(*settings)
    row_max, row_sum = from_per_sample(softmax_max, at.q_len), from_per_sample(softmax_sum, at.q_len)
    look = _look_at_windows(query.device, None, at)
    all_scores = row_max.new_zeros(last_row - first_row, key.shape[1], max(lengths(at.sel_len)))
    for rows, scores in _scores(query, key, row_max, row_sum, (first_row, last_row), look, at):
        all_scores[rows.start - first_row : rows.stop - first_row, :, : scores.shape[-1]] = scores
    return all_scores


def chosen_blocks(query: Tensor, key: Tensor, softmax_max: Tensor, softmax_sum: Tensor, at: Compressed) -> Tensor:
    """The block ids of `compress_attention`, by the causal rule, from its softmax statistics: [T, N2, select_block_count]."""
    row_max, row_sum = from_per_sample(softmax_max, at.q_len), from_per_sample(softmax_sum, at.q_len)
    return _choose(query, key, row_max, row_sum, None, _look_at_windows(query.device, None, at), at)


def _choose(
    query: Tensor, key: Tensor, row_max: Tensor, row_sum: Tensor, topk_mask: Tensor | None, look: Look, at: Compressed
) -> Tensor:
    ids = torch.arange(at.select_block_count, dtype=torch.int32, device=query.device).repeat(query.shape[0], key.shape[1], 1)
    for (start, stop), offset in zip(_samples(at.q_len), at.q_offset, strict=True) if at.select_block_count else []:
        first = start + early_rows(offset, at) if at.causal else start
        for rows, scores in _scores(query, key, row_max, row_sum, (first, stop), look, at):
            row = torch.arange(rows.start - start, rows.stop - start, device=query.device)
            if at.causal:
                ids[rows] = choose(scores, row + offset, at)
                continue
            if topk_mask is not None:
                scores = force(scores, topk_mask[row, : scores.shape[-1]].bool())
            ids[rows] = top_blocks(scores, at.select_block_count)
    return ids


def early_rows(offset: int, at: Compressed) -> int:
    """How many queries list the blocks 0, 1, ... unseen, of those that start at `offset` of their sample."""
    return max(at.select_block_size * at.select_block_count - offset, 0)


def choose(scores: Tensor, position: Tensor, at: Compressed) -> Tensor:
    """The blocks of queries at `position` [R] of their sample, by scores [R, N2, blocks]: [R, N2, count] int32, best first."""
    scores = force(scores, forced_blocks(position, scores.shape[-1], at))
    if not at.own_block:
        newer = torch.arange(scores.shape[-1], device=scores.device) >= (position // at.select_block_size)[:, None]
        scores = scores.masked_fill(newer[:, None], -torch.inf)
    return top_blocks(scores, at.select_block_count)


def forced_blocks(position: Tensor, blocks: int, at: Compressed) -> Tensor:
    """Whether each of `blocks` is forced for a query at `position` [R] of its sample: [R, blocks]."""
    own = (position // at.select_block_size)[:, None]
    block = torch.arange(blocks, device=position.device)
    return (block <= own) & ((block < at.init_blocks) | (block > own - at.local_blocks))


def force(scores: Tensor, forced: Tensor) -> Tensor:
    """Scores [R, N2, blocks] that put the blocks marked in [R, blocks] before all others."""
    return scores.masked_fill(forced[:, None], torch.inf)


def top_blocks(scores: Tensor, count: int) -> Tensor:
    """The `count` best blocks of scores [R, N2, blocks], equal ones by id: [R, N2, count] int32."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].int()


def _look_at_windows(device: torch.device, atten_mask: Tensor | None, at: Compressed) -> Look:
    windows_of = lengths(at.cmp_len)

    def look(b: int, first: int, last: int) -> Sight:
        if not at.causal:
            masked = None if atten_mask is None else atten_mask[first:last, : windows_of[b]].bool()
            bias = torch.zeros(last - first, windows_of[b], device=device) if masked is None else _bias(masked, LOWEST)
            return Sight(0, windows_of[b], bias[None])
        first, last = first + at.q_offset[b], last + at.q_offset[b]
        windows = min(windows_of[b], window_count(last, at.compress_block_size, at.compress_stride))
        end = torch.arange(windows, device=device) * at.compress_stride + at.compress_block_size - 1
        future = end > torch.arange(first, last, device=device)[:, None]
        return Sight(0, windows, _bias(future, -torch.inf)[None])

    return look


def _scores(
    query: Tensor, key: Tensor, row_max: Tensor, row_sum: Tensor, span: tuple[int, int], look: Look, at: Compressed
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk of the queries in `span`: the rows, and their scores [R, N2, blocks of the sample]."""
    per_window = at.compress_block_size // at.compress_stride
    per_block = at.select_block_size // at.compress_stride
    reach = per_block + per_window - 1  # windows that overlap a block
    overlap = row_max.new_tensor([min(j + 1, per_window, reach - j) for j in range(reach)])
    # The chip's operator scores by P shifted one window towards the future (contract, section 2.2).
    before = per_window - 1 - (at.importance == "ascend")
    for chunk in _chunks(query, key, at.q_len, at.cmp_len, look, span):
        probability = _probability(chunk, query, row_max, row_sum, at.scale)
        probability = probability.unflatten(1, (-1, chunk.size)).sum(dim=1)  # [N2, R, K]
        after = per_block * (lengths(at.sel_len)[chunk.b] - 1) + reach - before - probability.shape[-1]
        windows = F.pad(probability, (before, after)).unfold(-1, reach, per_block)  # [N2, R, blocks, reach]
        yield chunk.rows, (windows @ overlap).transpose(0, 1)


# ---- select attention


class Selected(NamedTuple):
    """Settings of attention over listed blocks."""

    scale: float
    block_size: int
    causal: bool  # mask by block id and position, counted from the start of each sample
    ordered: bool  # ids ascend, without repeats; queries before token block_size * k of a sample list 0, 1, ..., k - 1
    q_len: Sequence[int]
    kv_len: Sequence[int]
    q_offset: Sequence[int]  # the position in its sample of each sample's first query


def select_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_indices: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the listed blocks; a block listed twice counts twice (contract, section 3).

    Args:
        query: [T1, N1, D1].
        key: [T2, N2, D1].
        value: [T2, N2, D2].
        topk_indices: [T1, N2, k], block ids of the sample from 0. Past its end they are allowed where causality masks them.
        settings: as in `Selected`.

    Returns:
        attention [T1, N1, D2]; softmax max and sum [T1, N1, 8], 8 equal copies.
    """
    at = Selected(*settings)
    look = _look_at_blocks(topk_indices, at)
    attention, row_max, row_sum = _attend(query, key, value, at.scale, at.q_len, at.kv_len, look)
    return attention, copies(row_max), copies(row_sum)


def select_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    attention: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value."""
    at = Selected(*settings)
    look = _look_at_blocks(topk_indices, at)
    row_max, row_sum = softmax_max[..., 0], softmax_sum[..., 0]
    return _attend_backward(grad, query, key, value, attention, row_max, row_sum, at.scale, at.q_len, at.kv_len, look)


def _look_at_blocks(topk_indices: Tensor, at: Selected) -> Look:
    starts, keys_of = [0, *at.q_len], lengths(at.kv_len)

    def look(b: int, first: int, last: int) -> Sight:
        ids = topk_indices[starts[b] + first : starts[b] + last].transpose(0, 1).long()  # [N2, R, k]
        first, last = first + at.q_offset[b], last + at.q_offset[b]
        row = torch.arange(first, last, device=ids.device)[:, None]
        blocks = int(ids.max()) + 1
        stop = min(blocks * at.block_size, keys_of[b])
        if at.causal and bool((ids.amin(dim=-1, keepdim=True) <= row // at.block_size).all()):
            stop = min(stop, last)  # every row sees a key of its own, so masked ones weigh exactly 0
        listed = torch.zeros(*ids.shape[:2], blocks, device=ids.device)
        listed.scatter_add_(-1, ids, torch.ones(ids.shape, device=ids.device))
        bias = _bias(listed == 0, -torch.inf).repeat_interleave(at.block_size, dim=-1)[..., :stop]
        if at.causal and stop > first:  # what lies before the first row is future to none
            future = torch.arange(first, stop, device=ids.device) > row
            bias[..., first:] = torch.minimum(bias[..., first:], _bias(future, LOWEST))
        repeated = bool((listed > 1).any())
        return Sight(0, stop, bias, listed.repeat_interleave(at.block_size, dim=-1)[..., :stop] if repeated else None)

    return look


# ---- window attention


class Window(NamedTuple):
    """Settings of attention over the newest tokens."""

    scale: float
    window_size: int  # tokens, the query's own included
    q_len: Sequence[int]
    kv_len: Sequence[int]
    q_offset: Sequence[int]  # the position in its sample of each sample's first query


def window_attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over the `window_size` newest tokens.

    Args:
        query: [T1, N1, D1].
        key: [T2, N2, D1].
        value: [T2, N2, D2].
        settings: as in `Window`.

    Returns:
        attention [T1, N1, D2]; softmax max and sum [T1, N1, 8], 8 equal copies.
    """
    at = Window(*settings)
    look = _look_at_neighbours(query.device, at)
    attention, row_max, row_sum = _attend(query, key, value, at.scale, at.q_len, at.kv_len, look, at.window_size)
    return attention, copies(row_max), copies(row_sum)


def window_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value."""
    at = Window(*settings)
    saved = attention, softmax_max[..., 0], softmax_sum[..., 0]
    look = _look_at_neighbours(query.device, at)
    return _attend_backward(grad, query, key, value, *saved, at.scale, at.q_len, at.kv_len, look, at.window_size)


def _look_at_neighbours(device: torch.device, at: Window) -> Look:
    keys_of = lengths(at.kv_len)

    def look(b: int, first: int, last: int) -> Sight:
        first, last = first + at.q_offset[b], last + at.q_offset[b]
        stop = min(max(last, 0), keys_of[b])
        start = min(max(first - at.window_size + 1, 0), stop)
        age = torch.arange(first, last, device=device)[:, None] - torch.arange(start, stop, device=device)
        return Sight(start, stop, _bias((age < 0) | (age >= at.window_size), -torch.inf)[None])

    return look


# ---- the gates


def gated_sum(gate: Tensor, compress: Tensor, select: Tensor, window: Tensor) -> Tensor:
    """Sum of the branches [T, N1, D2], each times the sigmoid of its gate [T, N1, 3], rounded once (paper, equation 5)."""
    opened = _opened(gate, compress).split(1, dim=-1)
    first, second, third = (g * branch for g, branch in zip(opened, (compress, select, window), strict=True))
    return (first + second + third).to(compress.dtype).contiguous()


def gated_sum_backward(
    grad: Tensor, gate: Tensor, compress: Tensor, select: Tensor, window: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_sum` for the gate and for each branch."""
    grad, opened, branches = _work(grad), _opened(gate, compress), (compress, select, window)
    grad_opened = torch.stack([(grad * branch).sum(dim=-1) for branch in branches], dim=-1)
    first, second, third = ((grad * g).to(compress.dtype).contiguous() for g in opened.split(1, dim=-1))
    return (grad_opened * opened * (1 - opened)).to(gate.dtype), first, second, third


def _opened(gate: Tensor, branch: Tensor) -> Tensor:
    """Between 0 and 1, in the type that sums of branches are kept in."""
    return gate.to(torch.promote_types(branch.dtype, torch.float32)).sigmoid()


# ---- the attention of all three


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    look: Look,
    reach: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over what `look` shows: attention [T, N1, D2], max and sum [T, N1] of the softmax.

    A row that is shown nothing gets 0, with max and sum 0. A row whose keys are all masked sees them all alike, as on the chip.
    """
    attention = query.new_zeros(*query.shape[:2], value.shape[-1])
    row_max, row_sum = (_work(query.new_zeros(query.shape[:2])) for _ in range(2))
    for chunk in _chunks(query, key, q_len, kv_len, look, reach=reach):
        logits = _logits(chunk, query, scale)
        highest = logits.amax(dim=-1, keepdim=True)
        highest.masked_fill_(highest == -torch.inf, 0.0)
        weights = _count(chunk, logits.sub_(highest).exp_())
        total = weights.sum(dim=-1, keepdim=True)
        chunk_out = weights @ chunk.of(value) / total.masked_fill(total == 0, 1.0)
        attention[chunk.rows] = chunk.to_rows(chunk_out).to(attention.dtype)
        row_max[chunk.rows] = chunk.to_rows(highest)[..., 0]
        row_sum[chunk.rows] = chunk.to_rows(total)[..., 0]
    return attention, row_max, row_sum


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    look: Look,
    reach: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = query.new_zeros(query.shape)
    grad_key, grad_value = (_work(x.new_zeros(x.shape)) for x in (key, value))
    for chunk in _chunks(query, key, q_len, kv_len, look, reach=reach):
        probability = _probability(chunk, query, row_max, row_sum, scale)  # [N2, G * R, K]
        grad_rows, rows = chunk.by_head(grad), chunk.by_head(query)
        delta = (grad_rows * chunk.by_head(attention)).sum(dim=-1, keepdim=True)
        grad_logits = (grad_rows @ chunk.of(value).mT).sub_(delta).mul_(probability)
        constant = chunk.by_head(row_max[..., None]) == LOWEST
        if constant.any():  # every key of the row is masked: its logits are constants
            grad_logits.masked_fill_(constant, 0.0)
        grad_query[chunk.rows] = chunk.to_rows(grad_logits @ chunk.of(key) * scale).to(query.dtype)
        grad_key[chunk.keys] += (grad_logits.mT @ rows * scale).transpose(0, 1)
        grad_value[chunk.keys] += (probability.mT @ grad_rows).transpose(0, 1)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Chunk(NamedTuple):
    """Some queries of one sample, and the keys they see."""

    b: int
    rows: slice  # of the packed queries
    keys: slice  # of the packed keys
    sight: Sight
    key: Tensor  # [N2, K, D1]

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def of(self, packed: Tensor) -> Tensor:
        """The chunk's keys or values: [T, N2, D] -> [N2, K, D]."""
        return _work(packed[self.keys].transpose(0, 1))

    def by_head(self, packed: Tensor) -> Tensor:
        """The chunk's rows, query heads beside their key/value head: [T, N1, D] -> [N2, G * R, D]."""
        rows = _work(packed[self.rows].transpose(0, 1))
        return rows.reshape(self.key.shape[0], -1, packed.shape[-1])

    def to_rows(self, by_head: Tensor) -> Tensor:
        """Undo `by_head`: [N2, G * R, D] -> [R, N1, D]."""
        return by_head.reshape(-1, self.size, by_head.shape[-1]).transpose(0, 1)


def _chunks(
    query: Tensor,
    key: Tensor,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    look: Look,
    span: tuple[int, int] | None = None,
    reach: int | None = None,
) -> Iterator[_Chunk]:
    """Cut the queries in `span` (default: all) so that a chunk's logits stay small; rows that see no key are left out.

    `reach` is how far back a query can see, where that is less than a sample.
    """
    span_start, span_stop = span or (0, query.shape[0])
    for b, ((start, stop), (key_start, key_stop)) in enumerate(zip(_samples(q_len), _samples(kv_len), strict=True)):
        width = key_stop - key_start if reach is None else min(key_stop - key_start, 2 * reach)
        size = max(_CHUNK_ELEMENTS // (query.shape[1] * max(width, 1)), 16)
        if reach is not None:
            size = min(size, max(reach, 64))
        for first in range(max(start, span_start), min(stop, span_stop), size):
            last = min(first + size, stop, span_stop)
            sight = look(b, first - start, last - start)
            if sight.stop > sight.start:
                keys = slice(key_start + sight.start, key_start + sight.stop)
                yield _Chunk(b, slice(first, last), keys, sight, _work(key[keys].transpose(0, 1)))


def _logits(chunk: _Chunk, query: Tensor, scale: float) -> Tensor:
    """Scaled and masked: [N2, G * R, K]."""
    logits = (chunk.by_head(query) * scale) @ chunk.key.mT
    bias = chunk.sight.bias[:, None]  # replaces what it masks: a logit may have overflowed
    return torch.where(bias == 0, logits.unflatten(1, (-1, chunk.size)), bias).flatten(1, 2)


def _probability(chunk: _Chunk, query: Tensor, row_max: Tensor, row_sum: Tensor, scale: float) -> Tensor:
    """Softmax from its saved max and sum: [N2, G * R, K]."""
    highest, total = chunk.by_head(row_max[..., None]), chunk.by_head(row_sum[..., None])
    weights = _count(chunk, _logits(chunk, query, scale).sub_(highest).exp_())
    return weights.div_(total.masked_fill(total == 0, 1.0))


def _count(chunk: _Chunk, weights: Tensor) -> Tensor:
    if chunk.sight.listed is not None:
        weights.unflatten(1, (-1, chunk.size)).mul_(chunk.sight.listed[:, None])
    return weights


def _bias(masked: Tensor, fill: float) -> Tensor:
    return torch.zeros(masked.shape, device=masked.device).masked_fill_(masked, fill)


def _samples(ends: Sequence[int]) -> list[tuple[int, int]]:
    """Prefix sums to (start, stop) of each sample."""
    return list(zip([0, *ends[:-1]], ends, strict=True))


def lengths(ends: Sequence[int]) -> list[int]:
    """Prefix sums without a leading 0 to the length of each sample."""
    return [stop - start for start, stop in _samples(ends)]


def aligned_at_ends(q_len: Sequence[int], kv_len: Sequence[int]) -> list[int]:
    """The `q_offset` that puts the last query of each sample at its last key."""
    return [keys - queries for queries, keys in zip(lengths(q_len), lengths(kv_len), strict=True)]


def _work(tensor: Tensor) -> Tensor:
    """In the type that sums are kept in: float64 for float64, else float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def copies(row: Tensor) -> Tensor:
    """[T, N1] -> [T, N1, 8], as the operators return softmax statistics: a view, the 8 are one in memory."""
    return row[..., None].expand(-1, -1, 8)


def per_sample(row: Tensor, ends: Sequence[int]) -> Tensor:
    """[T, N1] -> 8 copies in the order of `npu_fusion_attention`: [N1, S_b, 8] sample after sample, said to be [T, N1, 8]."""
    return copies(torch.cat([row[start:stop].T.flatten() for start, stop in _samples(ends)]).view(row.shape))


def from_per_sample(statistic: Tensor, ends: Sequence[int]) -> Tensor:
    """Undo `per_sample`: [T, N1]."""
    heads = statistic.shape[1]
    return torch.cat([statistic[start:stop].reshape(heads, -1, 8)[..., 0].T for start, stop in _samples(ends)])
