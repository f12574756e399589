"""What the emulated operators share: how they refuse, where samples lie, how rows become heads.

The operators are written from the contract (`docs/operators.md`) alone and share no code with the project, which they judge.
They compute in float32 and round once, at the end, where the kernels also round probabilities before these weigh values
(section 2.1). Sections in comments are the contract's.

R: rows of a chunk, N1: query heads, N2: key/value heads, G: N1 / N2, S: keys, D: a head dim.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

FLT_MAX = torch.finfo(torch.float32).max
HALF = (torch.bfloat16, torch.float16)
_CHUNK_ELEMENTS = 1 << 21


class Refused(Exception):
    """The operator's host code answers with an error and computes nothing."""


class Trap(Exception):
    """A chip would read or write the wrong memory here, or compute what no document promises, without a word."""


def require(holds: bool, message: str) -> None:
    """Refuse unless `holds`; `message` says what is allowed."""
    if not holds:
        raise Refused(message)


def trap(wrong: bool, message: str) -> None:
    """Spring the trap if `wrong`."""
    if wrong:
        raise Trap(message)


def require_one_type(types: Sequence[torch.dtype], **tensors: Tensor) -> None:
    """All tensors of one type, of those allowed (section 0.1)."""
    given = {tensor.dtype for tensor in tensors.values()}
    require(len(given) == 1 and given <= set(types), f"{', '.join(tensors)} must have one type of {types}, not {given}")


def require_heads(args: SimpleNamespace) -> None:
    """What every attention asks of the shapes of query, key and value (sections 2, 3, 4)."""
    query, key, value = args.query, args.key, args.value
    require(args.layout == "TND", f"layout {args.layout} is not emulated, only TND")
    require(query.dim() == key.dim() == value.dim() == 3, "query, key and value must be 3-D")
    require(0 not in (*query.shape, *key.shape, *value.shape), "query, key and value must not be empty")
    require(args.head_num == query.shape[1], f"head_num {args.head_num} must be query's {query.shape[1]} heads")
    require(query.shape[1] % key.shape[1] == 0, "the query heads must be a multiple of the key/value heads")
    require(key.shape[:2] == value.shape[:2], "key and value must have the same tokens and heads")
    require(query.shape[2] == key.shape[2] >= value.shape[2], "query and key must have one dim, at least value's")
    require(key.shape[2] <= 768, f"a head dim of {key.shape[2]} is above 768")


def samples(name: str, ends: Sequence[int] | None, tokens: int) -> list[tuple[int, int]]:
    """Prefix sums to (start, stop) of each sample; where they fall the sample is empty (section 0.1)."""
    require(bool(ends), f"{name} is missing")
    assert ends
    trap(max(ends) > tokens, f"{name} ends at {max(ends)}, past the {tokens} tokens of its tensor")
    return [(start, max(start, stop)) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def require_equal_counts(**spans: list[tuple[int, int]]) -> None:
    """One entry a sample in each list (sections 2, 3, 4)."""
    require(len({len(entries) for entries in spans.values()}) == 1, f"{', '.join(spans)} must have one entry a sample")


def row_chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Cut the rows of a sample so that a chunk's logits stay small."""
    size = max(_CHUNK_ELEMENTS // elements_per_row, 1)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def by_group(rows: Tensor, kv_heads: int) -> Tensor:
    """[R, N1, D] to float32 [N2, G, R, D]: query head h is with key/value head h // G (section 2.1)."""
    return rows.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def to_rows(grouped: Tensor) -> Tensor:
    """Undo `by_group`: [N2, G, R, D] to [R, N1, D]."""
    return grouped.permute(2, 0, 1, 3).flatten(1, 2)


def by_kv_head(packed: Tensor) -> Tensor:
    """[S, N2, D] to float32 [N2, S, D]."""
    return packed.float().transpose(0, 1).contiguous()


def matmul(grouped: Tensor, matrix: Tensor) -> Tensor:
    """[N2, G, R, A] times [N2, A, B]."""
    return (grouped.flatten(1, 2) @ matrix).unflatten(1, grouped.shape[1:3])


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Over the rows of all heads of a group: [N2, G, R, A] and [N2, G, R, B] to [A, N2, B]."""
    return (left.flatten(1, 2).mT @ right.flatten(1, 2)).transpose(0, 1)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [N2, G, R, S], and the rows' max and sum [N1, R]; the sum is no logarithm (section 2)."""
    row_max = logits.amax(-1, keepdim=True)
    weights = (logits - row_max).exp_()
    row_sum = weights.sum(-1, keepdim=True)
    return weights.div_(row_sum), row_max[..., 0].flatten(0, 1), row_sum[..., 0].flatten(0, 1)


def per_sample(statistic: Tensor, start: int, stop: int) -> Tensor:
    """A sample's [N1, S_b, 8] in a statistic that says it is [T, N1, 8] (section 2)."""
    heads = statistic.shape[1]
    return statistic.view(-1)[start * heads * 8 : stop * heads * 8].view(heads, stop - start, 8)


def require_statistics(args: SimpleNamespace) -> None:
    """What the gradients ask of the softmax statistics (section 3)."""
    shape = (*args.query.shape[:2], 8)
    for name in ("softmax_max", "softmax_sum"):
        given = getattr(args, name)
        require(given.dtype == torch.float32 and tuple(given.shape) == shape, f"{name} must be float32 {list(shape)}")


def is_causal_triangle(mask: Tensor) -> bool:
    """Whether a mask is the compressed causal one: 2048 x 2048, 1 above the diagonal (section 4)."""
    return tuple(mask.shape) == (2048, 2048) and torch.equal(mask != 0, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
