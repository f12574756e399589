"""The operators on the CPU, by native kernels: what `reference` computes, from the same arguments.

The number of threads is torch's, and changes no bit. float64, and compressed attention by masks instead of by position, run on
the reference, said once in the log. `docs/cpu.md` says how the kernels work and what they reach.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..reference import Compressed, Selected, Window, copies, from_per_sample, lengths, per_sample, window_count
from . import native

__all__ = [
    "block_scores",
    "compress",
    "compress_attention",
    "compress_attention_backward",
    "compress_backward",
    "gated_sum",
    "gated_sum_backward",
    "select_attention",
    "select_attention_backward",
    "sparse_attention",
    "sparse_attention_backward",
    "window_attention",
    "window_attention_backward",
]

Triple = tuple[Tensor, Tensor, Tensor]
_Run = TypeVar("_Run", bound=Callable[..., Any])
_logger = logging.getLogger(__name__)


def _foreign_types(arguments: Sequence[Any]) -> set[torch.dtype]:
    """The floating point types of tensors that the kernels do not have; tensors of another device are refused."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    elsewhere = {x.device.type for x in tensors} - {"cpu"}
    if elsewhere:
        raise ValueError(f"backend cpu takes tensors on cpu, not on {', '.join(elsewhere)}")
    return {x.dtype for x in tensors if x.is_floating_point()} - native.TYPES.keys()


@cache
def say_once(message: str) -> None:
    """Say that a slower way is taken."""
    _logger.warning("NSA on the CPU: %s", message)


def _in_native_types(run: _Run) -> _Run:
    """Send types that the kernels do not have to the reference, and refuse tensors of another device."""

    @wraps(run)
    def dispatch(*arguments: Any) -> Any:
        foreign = _foreign_types(arguments)
        if not foreign:
            return run(*arguments)
        say_once(f"{', '.join(map(str, foreign))} runs on the reference, which is slow")
        return getattr(reference, run.__name__)(*arguments)

    return dispatch  # type: ignore[return-value]


# ---- compress


@_in_native_types
def compress(input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]) -> Tensor:
    """See `reference.compress`."""
    out = input.new_empty(sum(window_count(n, block_size, stride) for n in lengths(seq_len)), *input.shape[1:])
    sizes = _pooling(input, weight, block_size, stride, seq_len)
    weight = weight.contiguous()
    native.call("compress_forward", *sizes, native.tensor(input), weight.data_ptr(), out.data_ptr())
    return out


@_in_native_types
def compress_backward(
    grad: Tensor, input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """See `reference.compress_backward`."""
    grads = _empty_like(input, weight)
    sizes = _pooling(input, weight, block_size, stride, seq_len)
    windows = sum(window_count(n, block_size, stride) for n in lengths(seq_len))
    _check_shapes(grad, grad=(grad, (windows, *input.shape[1:])))
    weight = weight.contiguous()
    operands = native.tensor(grad), native.tensor(input), weight.data_ptr()
    native.call("compress_backward", *sizes, *operands, *_pointers(grads))
    return grads[0], grads[1]


def _pooling(input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]) -> tuple[Any, ...]:
    _check_shapes(input, weight=(weight, (block_size, input.shape[1])))
    _check_ends("seq_len", seq_len, input.shape[0])
    heads, dim = input.shape[1:]
    common = native.TYPES[input.dtype], torch.get_num_threads(), heads, dim
    return *common, block_size, stride, len(seq_len), native.int64s(seq_len)


# ---- compressed attention


@_in_native_types
def compress_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_mask: Tensor | None, atten_mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.compress_attention`."""
    at = Compressed(*settings)
    if not at.causal:
        return _by_masks("compress_attention", query, key, value, topk_mask, atten_mask, *settings)
    common = _attention(query, key, value, at.scale, at.q_len, at.cmp_len, at.q_offset)
    attention, row_max, row_sum = _empty_outputs(query, value)
    ids = query.new_empty(query.shape[0], key.shape[1], at.select_block_count, dtype=torch.int32)
    operands = common, _compressed(at), *map(native.tensor, (query, key, value))
    native.call("compress_attention_forward", *operands, *_pointers((attention, ids, row_max, row_sum)))
    return attention, ids, per_sample(row_max, at.q_len), per_sample(row_sum, at.q_len)


@_in_native_types
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
) -> Triple:
    """See `reference.compress_attention_backward`."""
    at = Compressed(*settings)
    if not at.causal:
        operands = grad, query, key, value, topk_mask, atten_mask, attention, softmax_max, softmax_sum
        return _by_masks("compress_attention_backward", *operands, *settings)
    common = _attention(query, key, value, at.scale, at.q_len, at.cmp_len, at.q_offset)
    statistics = from_per_sample(softmax_max, at.q_len), from_per_sample(softmax_sum, at.q_len)
    saved = grad, query, key, value, attention, *statistics
    return _backward("compress_attention_backward", (common, _compressed(at)), *saved)


@_in_native_types
def block_scores(
    query: Tensor, key: Tensor, softmax_max: Tensor, softmax_sum: Tensor, first_row: int, last_row: int, *settings: Any
) -> Tensor:
    """See `reference.block_scores`."""
    at = Compressed(*settings)
    common = _attention(query, key, key, at.scale, at.q_len, at.cmp_len, at.q_offset)
    scores = softmax_max.new_empty(last_row - first_row, key.shape[1], max(lengths(at.sel_len)))
    operands = common, _compressed(at), native.tensor(query), native.tensor(key)
    native.call("block_scores", *operands, first_row, last_row, scores.data_ptr())
    return scores


def _compressed(at: Compressed) -> native.Compressed:
    sizes = at.compress_block_size, at.compress_stride, at.select_block_size, at.select_block_count
    forced = at.init_blocks, at.local_blocks, at.own_block
    return native.Compressed(*sizes, *forced, native.IMPORTANCES[at.importance], native.int64s(at.sel_len))


def _by_masks(name: str, *arguments: Any) -> Any:
    say_once("compressed attention by masks runs on the reference, which is slow; by position it would not")
    return getattr(reference, name)(*arguments)


# ---- select attention


@_in_native_types
def select_attention(query: Tensor, key: Tensor, value: Tensor, topk_indices: Tensor, *settings: Any) -> Triple:
    """See `reference.select_attention`."""
    at = Selected(*settings)
    common = _attention(query, key, value, at.scale, at.q_len, at.kv_len, at.q_offset)
    ids = _checked_ids(topk_indices, query, key)
    return _forward("select_forward", (common, _selected(ids, at)), query, key, value)


@_in_native_types
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
) -> Triple:
    """See `reference.select_attention_backward`."""
    at = Selected(*settings)
    common = _attention(query, key, value, at.scale, at.q_len, at.kv_len, at.q_offset)
    ids = _checked_ids(topk_indices, query, key)
    saved = grad, query, key, value, attention, softmax_max[..., 0], softmax_sum[..., 0]
    return _backward("select_backward", (common, _selected(ids, at)), *saved)


def _checked_ids(topk_indices: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if topk_indices.shape[:2] != (query.shape[0], key.shape[1]):
        raise ValueError(f"topk_indices is {list(topk_indices.shape)}; allowed: [{query.shape[0]}, {key.shape[1]}, k]")
    if topk_indices.numel() and topk_indices.min() < 0:
        raise ValueError(f"topk_indices holds {topk_indices.min()}; allowed: 0 and above")
    return topk_indices.to(torch.int32).contiguous()


def _selected(ids: Tensor, at: Selected) -> native.Selected:
    return native.Selected(at.block_size, ids.shape[-1], at.causal, at.ordered, ids.data_ptr())


# ---- window attention


@_in_native_types
def window_attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Triple:
    """See `reference.window_attention`."""
    at = Window(*settings)
    common = _attention(query, key, value, at.scale, at.q_len, at.kv_len, at.q_offset)
    return _forward("window_forward", (common, at.window_size), query, key, value)


@_in_native_types
def window_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    *settings: Any,
) -> Triple:
    """See `reference.window_attention_backward`."""
    at = Window(*settings)
    common = _attention(query, key, value, at.scale, at.q_len, at.kv_len, at.q_offset)
    saved = grad, query, key, value, attention, softmax_max[..., 0], softmax_sum[..., 0]
    return _backward("window_backward", (common, at.window_size), *saved)


# ---- the gates


@_in_native_types
def gated_sum(gate: Tensor, compress: Tensor, select: Tensor, window: Tensor) -> Tensor:
    """See `reference.gated_sum`."""
    (out,) = _empty_like(compress)
    gate, branches = gate.contiguous(), [native.tensor(x) for x in (compress, select, window)]
    sizes = _gated(gate, compress, select, window)
    native.call("gated_sum_forward", *sizes, gate.data_ptr(), (native.Tensor * 3)(*branches), out.data_ptr())
    return out


@_in_native_types
def gated_sum_backward(
    grad: Tensor, gate: Tensor, compress: Tensor, select: Tensor, window: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.gated_sum_backward`."""
    sizes = _gated(gate, compress, select, window)
    _check_shapes(compress, grad=(grad, compress.shape))
    grad_gate, *grads = _empty_like(gate, compress, select, window)
    gate, branches = gate.contiguous(), [native.tensor(x) for x in (compress, select, window)]
    operands = native.tensor(grad), gate.data_ptr(), (native.Tensor * 3)(*branches)
    native.call("gated_sum_backward", *sizes, *operands, grad_gate.data_ptr(), native.pointers(grads))
    return grad_gate, grads[0], grads[1], grads[2]


def _gated(gate: Tensor, compress: Tensor, select: Tensor, window: Tensor) -> tuple[Any, ...]:
    _check_shapes(compress, select=(select, compress.shape), window=(window, compress.shape))
    _check_shapes(gate, gate=(gate, (*compress.shape[:2], 3)))
    types = native.TYPES[compress.dtype], native.TYPES[gate.dtype]
    return *types, torch.get_num_threads(), *compress.shape


# ---- the whole


def attends_whole(*types: torch.dtype) -> bool:
    """Whether `sparse_attention` takes tensors of such types."""
    return set(types) <= native.TYPES.keys()


def sparse_attention(
    query: Tensor,
    compress_key: Tensor,
    compress_value: Tensor,
    select_key: Tensor,
    select_value: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    gate: Tensor,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The three attentions, one after another, and their gated sum, to the bit, with each query read once.

    Args:
        query: [T1, N1, D1].
        compress_key: compressed keys [windows, N2, D1]; `compress_value` [windows, N2, D2].
        select_key: [T2, N2, D1]; `select_value` [T2, N2, D2]; those of the window likewise.
        gate: logits [T1, N1, 3].
        settings: those of `reference.Compressed`, the window size, and the prefix sums of the key lengths.

    Returns:
        The sum [T1, N1, D2]; ids [T1, N2, select_block_count], best first; the three attentions [T1, N1, D2]; softmax max and
        sum of each, as the operators for them return them.
    """
    keys, values = (compress_key, select_key, window_key), (compress_value, select_value, window_value)
    foreign = _foreign_types((query, *keys, *values, gate))
    if foreign:
        raise ValueError(f"sparse_attention has {', '.join(map(str, foreign))}; allowed: {', '.join(map(str, native.TYPES))}")
    at, window_size, kv_len = _whole(settings)
    if not at.causal:
        raise ValueError("sparse_attention is causal by position; masks are for compress_attention")
    ends = at.cmp_len, kv_len, kv_len
    commons = [
        _attention(query, *each[:2], at.scale, at.q_len, each[2], at.q_offset) for each in zip(keys, values, ends, strict=True)
    ]
    dim = compress_value.shape[-1]
    of_select, of_window = (*select_value.shape[:2], dim), (*window_value.shape[:2], dim)
    _check_shapes(query, select_value=(select_value, of_select), window_value=(window_value, of_window))
    _check_shapes(gate, gate=(gate, (*query.shape[:2], 3)))
    attentions, row_maxes, row_sums = zip(*(_empty_outputs(query, value) for value in values), strict=True)
    out, gate = torch.empty_like(attentions[0]), gate.contiguous()
    ids = query.new_empty(query.shape[0], compress_key.shape[1], at.select_block_count, dtype=torch.int32)
    views = [[native.tensor(x) for x in tensors] for tensors in (keys, values)]
    native.call(
        *("sparse_attention_forward", commons[0], commons[1].kv_end, _compressed(at), window_size, native.tensor(query)),
        *((native.Tensor * 3)(*each) for each in views),
        *(native.TYPES[gate.dtype], *_pointers((gate, out, ids))),
        *map(native.pointers, (attentions, row_maxes, row_sums)),
    )
    statistics = [each for pair in zip(row_maxes, row_sums, strict=True) for each in pair]
    of_compress = (per_sample(each, at.q_len) for each in statistics[:2])
    return out, ids, *attentions, *of_compress, *map(copies, statistics[2:])


def sparse_attention_backward(
    grad: Tensor,
    query: Tensor,
    compress_key: Tensor,
    compress_value: Tensor,
    select_key: Tensor,
    select_value: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    gate: Tensor,
    topk_indices: Tensor,
    compress: Tensor,
    select: Tensor,
    window: Tensor,
    *statistics_and_settings: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `sparse_attention` for its eight tensors, from what it returned: the operators', one after another."""
    statistics, (at, window_size, kv_len) = statistics_and_settings[:6], _whole(statistics_and_settings[6:])
    lists = at.q_len, kv_len, at.q_offset
    grad_gate, *grads = gated_sum_backward(grad, gate, compress, select, window)
    operands = query, window_key, window_value, window, *statistics[4:]
    grad_query, *of_window = window_attention_backward(grads.pop(), *operands, at.scale, window_size, *lists)
    operands = query, select_key, select_value, topk_indices, select, *statistics[2:4]
    more, *of_select = select_attention_backward(grads.pop(), *operands, at.scale, at.select_block_size, True, False, *lists)
    grad_query += more
    operands = query, compress_key, compress_value, None, None, compress, *statistics[:2]
    more, *of_compress = compress_attention_backward(grads.pop(), *operands, *at)
    grad_query += more
    return grad_query, *of_compress, *of_select, *of_window, grad_gate


def _whole(settings: Sequence[Any]) -> tuple[Compressed, int, Sequence[int]]:
    """Settings of the compressed branch, the window size, and the prefix sums of the key lengths."""
    return Compressed(*settings[:-2]), settings[-2], settings[-1]


# ---- what they share


def _forward(function: str, settings: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor) -> Triple:
    attention, row_max, row_sum = outputs = _empty_outputs(query, value)
    native.call(function, *settings, *map(native.tensor, (query, key, value)), *_pointers(outputs))
    return attention, copies(row_max), copies(row_sum)


def _backward(
    function: str,
    settings: tuple[Any, ...],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
) -> Triple:
    """Gradients for query, key and value, from statistics [T, N1]."""
    expected = (*query.shape[:2], value.shape[-1])
    _check_shapes(query, grad=(grad, expected), attention=(attention, expected))
    statistics = row_max.contiguous(), row_sum.contiguous()
    grads = _empty_like(query, key, value)
    operands = *map(native.tensor, (grad, query, key, value, attention)), *_pointers(statistics)
    native.call(function, *settings, *operands, *_pointers(grads))
    return grads[0], grads[1], grads[2]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    q_offset: Sequence[int],
) -> native.Attention:
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads on {kv_heads} key/value heads; allowed: a multiple")
    keys = key.shape[0], kv_heads
    _check_shapes(query, key=(key, (*keys, query.shape[-1])), value=(value, (*keys, value.shape[-1])))
    _check_ends("q_len", q_len, query.shape[0])
    _check_ends("kv_len", kv_len, key.shape[0])
    if len(q_len) != len(kv_len) or len(q_offset) != len(q_len):
        raise ValueError(f"{len(q_len)} samples of queries, {len(kv_len)} of keys, {len(q_offset)} offsets; allowed: as many")
    return native.Attention(
        *(native.TYPES[query.dtype], torch.get_num_threads(), heads, kv_heads, query.shape[-1], value.shape[-1], scale),
        *(len(q_len), *map(native.int64s, (q_len, kv_len, q_offset))),
    )


def _check_shapes(like: Tensor, **expected: tuple[Tensor, Sequence[int]]) -> None:
    """What is read by pointers must be there: each tensor of its shape, and of the type of `like`."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != like.dtype:
            given = f"{list(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} is {given}; allowed: {list(shape)} of {like.dtype}")


def _check_ends(name: str, ends: Sequence[int], tokens: int) -> None:
    if not ends or ends[-1] != tokens or any(length < 0 for length in lengths(ends)):
        raise ValueError(f"{name} {list(ends)} must be prefix sums that rise to the {tokens} given")


def _empty_outputs(query: Tensor, value: Tensor) -> Triple:
    row_max = query.new_empty(query.shape[:2], dtype=torch.float32)
    return query.new_empty(*query.shape[:2], value.shape[-1]), row_max, torch.empty_like(row_max)


def _empty_like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]
