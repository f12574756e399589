"""What the operators and the block compute, said a second time: one query after another, slow, differentiable by autograd.

Written from docs/operators.md, the paper and the design's rules, apart from the code that it checks. At the end stands the
block once more, by dense masks over whole samples, for lengths at which a loop over queries takes too long.

T: packed tokens, N1: query heads, N2: key/value heads, D1, D2: dims of query/key and of value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


class Sizes(NamedTuple):
    window: int  # tokens of a compressed window
    stride: int
    block: int  # tokens of a selectable block
    count: int  # blocks to choose


class Attention(NamedTuple):
    out: Tensor  # [T, N1, D2]
    highest: Tensor  # [T, N1]
    total: Tensor  # [T, N1]
    probability: list[list[Tensor]]  # of each query and head, over the keys it sees


def spans(ends):
    return list(zip([0, *ends], ends, strict=False))


def place(token, ends):
    """The sample of a packed token, and the token's position there."""
    for sample, (start, stop) in enumerate(spans(ends)):
        if start <= token < stop:
            return sample, token - start
    raise IndexError(token)


def prefix_sums(lengths):
    return [sum(lengths[: i + 1]) for i in range(len(lengths))]


def window_starts(length, sizes):
    return [first for first in range(0, length, sizes.stride) if first + sizes.window <= length]


def compress(tokens, weight, sizes, ends):
    pooled = [
        sum(tokens[start + first + j] * weight[j][:, None] for j in range(sizes.window))
        for start, stop in spans(ends)
        for first in window_starts(stop - start, sizes)
    ]
    return torch.stack(pooled) if pooled else tokens.new_zeros(0, *tokens.shape[1:])


# ---- attention


def attend(query, key, value, scale, seen):
    """`seen(t, n)`: for a query and a key/value head, the keys listed as (token, masked)."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for t in range(query.shape[0]):
        listed = [seen(t, n) for n in range(key.shape[1])]
        rows.append(
            [_softmax_row(query[t, h], key, value, h // group, scale, listed[h // group]) for h in range(query.shape[1])]
        )
    out, highest, total = (torch.stack([torch.stack([head[i] for head in row]) for row in rows]) for i in range(3))
    return Attention(out, highest, total, [[head[3] for head in row] for row in rows])


def _softmax_row(query, key, value, n, scale, listed):
    zero = query.new_zeros(())
    if not listed:
        return value.new_zeros(value.shape[-1]), zero, zero, query.new_zeros(0)
    tokens, masked = [token for token, _ in listed], torch.tensor([hidden for _, hidden in listed])
    logits = torch.where(masked, query.new_tensor(LOWEST), scale * (key[tokens, n] @ query))
    highest = logits.detach().max()
    weights = torch.exp(logits - highest)
    probability = weights / weights.sum()
    return probability @ value[tokens, n], highest, weights.sum(), probability


def compress_attention(query, key, value, scale, sizes, topk_mask, atten_mask, q_ends, c_ends):
    """Attention, and the ids [T, N2, count], best first, with both masks as the operator takes them."""

    def seen(t, _):
        sample, position = place(t, q_ends)
        start, stop = spans(c_ends)[sample]
        return [(c, atten_mask is not None and bool(atten_mask[position, c - start])) for c in range(start, stop)]

    attention = attend(query, key, value, scale, seen)
    ids = []
    for t in range(query.shape[0]):
        sample, position = place(t, q_ends)
        start, stop = spans(c_ends)[sample]
        blocks = -(-(stop - start) // (sizes.block // sizes.stride))
        forced = [] if topk_mask is None else [s for s in range(blocks) if topk_mask[position, s]]
        ids.append([best(scores, forced, sizes.count) for scores in _group_scores(attention, t, key.shape[1], blocks, sizes)])
    return attention, torch.tensor(ids)


def _group_scores(attention, t, kv_heads, blocks, sizes, importance="ascend"):
    heads = attention.probability[t]
    group = len(heads) // kv_heads
    of_head = {"ascend": operator_scores, "paper": overlap_scores}[importance]
    for n in range(kv_heads):
        scores = [of_head(probability.detach(), blocks, sizes) for probability in heads[n * group : (n + 1) * group]]
        yield [sum(of_block) for of_block in zip(*scores, strict=True)]


def operator_scores(probability, blocks, sizes):
    """The sum of the aclnn document, blocks counted from 1."""
    per_block, per_window = sizes.block // sizes.stride, sizes.window // sizes.stride
    scores = []
    for block in range(1, blocks + 1):
        terms = [per_block * block - i - j for i in range(per_block) for j in range(per_window)]
        scores.append(sum(float(probability[c]) for c in terms if 0 <= c < len(probability)))
    return scores


def overlap_scores(probability, blocks, sizes):
    """The paper: a window counts for a block by the strides they have in common."""
    scores = []
    for block in range(blocks):
        score = 0.0
        for c in range(len(probability)):
            first, last = c * sizes.stride, c * sizes.stride + sizes.window
            common = min(last, (block + 1) * sizes.block) - max(first, block * sizes.block)
            score += float(probability[c]) * max(common, 0) / sizes.stride
        scores.append(score)
    return scores


def best(scores, forced, count):
    """Forced blocks by id, then the others by score, equal scores by id."""
    return sorted(range(len(scores)), key=lambda s: (s not in forced, 0 if s in forced else -scores[s], s))[:count]


def select_attention(query, key, value, topk_indices, scale, block_size, causal, q_ends, kv_ends):
    def seen(t, n):
        sample, position = place(t, q_ends)
        start, stop = spans(kv_ends)[sample]
        columns = [block * block_size + i for block in topk_indices[t, n].tolist() for i in range(block_size)]
        return [(start + column, causal and column > position) for column in columns if start + column < stop]

    return attend(query, key, value, scale, seen)


def window_attention(query, key, value, scale, window_size, q_ends, kv_ends):
    def seen(t, _):
        sample, position = place(t, q_ends)
        start, stop = spans(kv_ends)[sample]
        q_start, q_stop = spans(q_ends)[sample]
        newest = start + position + (stop - start) - (q_stop - q_start)
        return [(j, False) for j in range(start, stop) if newest - window_size < j <= newest]

    return attend(query, key, value, scale, seen)


# ---- the block


def sizes_of(config):
    return Sizes(config.compress_block_size, config.compress_stride, config.select_block_size, config.select_block_count)


def compression(module, tokens, sizes, ends):
    """The learned pooling of `Compression`, window by window, from its parameters."""
    pooled = []
    for start, stop in spans(ends):
        for first in window_starts(stop - start, sizes):
            window = tokens[start + first : start + first + sizes.window]  # [l, N2, D]
            if module.position is not None:
                window = window + module.position
            if module.kind == "mlp":
                heads = [module.down @ F.gelu(module.up @ window[:, n].flatten()) for n in range(window.shape[1])]
                pooled.append(torch.stack(heads))
            else:
                weight = torch.full(window.shape[:2], 1 / sizes.window) if module.weight is None else module.weight
                pooled.append((weight[..., None] * window).sum(dim=0))
    return torch.stack(pooled) if pooled else tokens.new_zeros(0, *tokens.shape[1:])


def listed_blocks(scores, position, config):
    """The blocks of a query, ascending (design, rule 2)."""
    if position < config.select_block_size * config.select_block_count:
        return list(range(config.select_block_count))
    own = position // config.select_block_size
    forced = [s for s in range(own + 1) if s < config.init_blocks or s > own - config.local_blocks]
    return sorted(best(scores, forced, config.select_block_count))


def block(nsa, query, keys, values, gate, ends):
    """NativeSparseAttention, query by query: the output, and the ids [T, N2, count]."""
    config, sizes = nsa.config, sizes_of(nsa.config)
    key, value = (compression(m, x, sizes, ends) for m, x in ((nsa.compress_key, keys[0]), (nsa.compress_value, values[0])))
    window_ends = prefix_sums([len(window_starts(stop - start, sizes)) for start, stop in spans(ends)])

    def seen(t, _):
        sample, position = place(t, ends)
        start, stop = spans(window_ends)[sample]
        return [(c, False) for c in range(start, stop) if (c - start) * sizes.stride + sizes.window - 1 <= position]

    compressed = attend(query, key, value, nsa.scale, seen)
    ids = []
    for t in range(query.shape[0]):
        sample, position = place(t, ends)
        start, stop = spans(ends)[sample]
        blocks = -(-(stop - start) // sizes.block)
        scores = _group_scores(compressed, t, key.shape[1], blocks, sizes, config.importance)
        ids.append([listed_blocks(of_group, position, config) for of_group in scores])
    ids = torch.tensor(ids)
    selected = select_attention(query, keys[1], values[1], ids, nsa.scale, sizes.block, True, ends, ends)
    window = window_attention(query, keys[2], values[2], nsa.scale, config.window_size, ends, ends)
    gates = torch.sigmoid(gate)
    return sum(gates[..., i, None] * branch.out for i, branch in enumerate((compressed, selected, window))), ids


# ---- the block by dense masks


def dense_attention(query, key, value, scale, visible):
    """Softmax over `visible` [S, K] or [N1, S, K], all heads of a sample at once; a row that sees nothing gets 0.

    Returns the output [S, N1, D2] and the probabilities [N1, S, K].
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
    logits = (scale * query.transpose(0, 1) @ key.mT).masked_fill(~visible, -torch.inf)
    probability = torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0) if logits.shape[-1] else logits
    return (probability @ value).transpose(0, 1), probability


def dense_blocks(probability, kv_heads, length, config):
    """[N1, S, windows] -> whether each block is listed, [N2, S, blocks]."""
    sizes, windows, blocks = sizes_of(config), probability.shape[-1], -(-length // config.select_block_size)
    counts = torch.tensor(
        [
            (operator_scores if config.importance == "ascend" else overlap_scores)(row, blocks, sizes)
            for row in torch.eye(windows, dtype=torch.float64)
        ],
        dtype=probability.dtype,
    ).reshape(windows, blocks)
    scores = probability.unflatten(0, (kv_heads, -1)).sum(dim=1) @ counts
    own, block = torch.arange(length)[:, None] // sizes.block, torch.arange(blocks)
    forced = (block <= own) & ((block < config.init_blocks) | (block > own - config.local_blocks))
    order = torch.argsort(scores.masked_fill(forced, torch.inf), dim=-1, descending=True, stable=True)[..., : sizes.count]
    listed = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, order, True)
    return torch.where(torch.arange(length)[:, None] < sizes.block * sizes.count, block < sizes.count, listed)


def dense_block(nsa, query, keys, values, gate, ends):
    """NativeSparseAttention by masks over [S, S], sample by sample."""
    config, sizes, out = nsa.config, sizes_of(nsa.config), []
    for start, stop in spans(ends):
        length = stop - start
        if length == 0:
            continue
        q, gates = query[start:stop], torch.sigmoid(gate[start:stop])
        k, v = ([x[start:stop] for x in branches] for branches in (keys, values))
        t, j = torch.arange(length)[:, None], torch.arange(length)
        starts = torch.tensor(window_starts(length, sizes), dtype=torch.long)
        pooled_key, pooled_value = (
            compression(m, x, sizes, [length]) for m, x in ((nsa.compress_key, k[0]), (nsa.compress_value, v[0]))
        )
        compressed, probability = dense_attention(q, pooled_key, pooled_value, nsa.scale, starts + sizes.window - 1 <= t)
        listed = dense_blocks(probability.detach(), key_heads := k[0].shape[1], length, config)
        visible = listed.repeat_interleave(sizes.block, dim=-1)[..., :length] & (j <= t)
        selected, _ = dense_attention(q, k[1], v[1], nsa.scale, visible.repeat_interleave(q.shape[1] // key_heads, dim=0))
        window, _ = dense_attention(q, k[2], v[2], nsa.scale, (j <= t) & (t - j < config.window_size))
        out.append(sum(gates[..., i, None] * branch for i, branch in enumerate((compressed, selected, window))))
    return torch.cat(out)
