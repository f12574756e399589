"""The operators as torch sees them: registered with torch.library, with shapes for FakeTensor and with autograd.

These take any dims and lengths. The contract of the chip is checked one level up, by the functions of the same name in
`mindspeed_nsa.ops`. What each computes is said in `reference`; arguments are positional. `backend` is a resolved
name: an argument, so that backward runs where forward ran.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import load
from .contract import check_topk_indices
from .reference import Compressed, copies, lengths, window_count


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Register `mindspeed_nsa::name`, whose last argument names the backend that computes it."""

    def run(*arguments: Any) -> Any:
        *operands, backend = arguments
        return getattr(load(backend, operands[0].device.type), name)(*operands)

    op = torch.library.custom_op(f"mindspeed_nsa::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _differentiate(op: Any, backward: Any, tensors: int, differentiable: int, saved_outputs: tuple[int, ...]) -> None:
    """Wire `backward(grad, *saved tensors, *settings)` to `op`.

    Args:
        op: its first `tensors` arguments are tensors, of which the first `differentiable` get gradients.
        backward: takes the gradient of the first output, the tensors, the outputs numbered in `saved_outputs`, the settings.
        tensors: the number of tensor arguments.
        differentiable: the number of those that get gradients.
        saved_outputs: the outputs that backward reads.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs that have none
        ctx.save_for_backward(*inputs[:tensors], *(outputs[i] for i in saved_outputs))
        ctx.settings = inputs[tensors:]

    def run(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients = (None,) * differentiable if grad is None else backward(grad, *ctx.saved_tensors, *ctx.settings)
        return *gradients, *(None for _ in range(tensors - differentiable + len(ctx.settings)))

    op.register_autograd(run, setup_context=save)


def _attention_like(query: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    row = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    row_max, row_sum = copies(row), copies(torch.empty_like(row))
    if backend == "ascend":  # the chip's operators write the copies
        row_max, row_sum = row_max.contiguous(), row_sum.contiguous()
    return query.new_empty(*query.shape[:2], value.shape[-1]), row_max, row_sum


def _like_inputs(count: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda grad, *arguments: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[:count])


def _fake_compress(input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: list[int], backend: str) -> Tensor:
    return input.new_empty(sum(window_count(length, block_size, stride) for length in lengths(seq_len)), *input.shape[1:])


compress = _define(
    "compress",
    "(Tensor input, Tensor weight, int block_size, int stride, SymInt[] seq_len, str backend) -> Tensor",
    _fake_compress,
)
compress_backward = _define(
    "compress_backward",
    "(Tensor grad, Tensor input, Tensor weight, int block_size, int stride, SymInt[] seq_len, str backend) -> (Tensor, Tensor)",
    _like_inputs(2),
)
_differentiate(compress, compress_backward, tensors=2, differentiable=2, saved_outputs=())


def _fake_compress_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_mask: Tensor | None, atten_mask: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    attention, row_max, row_sum = _attention_like(query, value, settings[-1])
    count = Compressed(*settings[:-1]).select_block_count
    ids = query.new_empty(query.shape[0], key.shape[1], count, dtype=torch.int32)
    return attention, ids, row_max, row_sum


def _fake_block_scores(
    query: Tensor, key: Tensor, row_max: Tensor, row_sum: Tensor, first_row: int, last_row: int, *settings: Any
) -> Tensor:
    return row_max.new_empty(last_row - first_row, key.shape[1], max(lengths(Compressed(*settings[:-1]).sel_len)))


# In the order of `reference.Compressed`, `Selected` and `Window`.
_COMPRESSED = (
    "float scale, int compress_block_size, int compress_stride, int select_block_size, int select_block_count, bool causal,"
    " int init_blocks, int local_blocks, bool own_block, str importance, SymInt[] q_len, SymInt[] cmp_len, SymInt[] sel_len,"
    " SymInt[] q_offset"
)
_SELECTED = "float scale, int block_size, bool causal, bool ordered, SymInt[] q_len, SymInt[] kv_len, SymInt[] q_offset"
_WINDOW = "float scale, int window_size, SymInt[] q_len, SymInt[] kv_len, SymInt[] q_offset"
_SAVED = "Tensor attention, Tensor softmax_max, Tensor softmax_sum"

compress_attention = _define(
    "compress_attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor? topk_mask, Tensor? atten_mask, {_COMPRESSED}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_compress_attention,
)
compress_attention_backward = _define(
    "compress_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? topk_mask, Tensor? atten_mask,"
    f" {_SAVED}, {_COMPRESSED}, str backend) -> (Tensor, Tensor, Tensor)",
    _like_inputs(3),
)
_differentiate(compress_attention, compress_attention_backward, tensors=5, differentiable=3, saved_outputs=(0, 2, 3))

block_scores = _define(
    "block_scores",
    "(Tensor query, Tensor key, Tensor softmax_max, Tensor softmax_sum, int first_row, int last_row,"
    f" {_COMPRESSED}, str backend) -> Tensor",
    _fake_block_scores,
)

select_attention = _define(
    "select_attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor topk_indices, {_SELECTED}, str backend) -> (Tensor, Tensor, Tensor)",
    lambda query, key, value, *settings: _attention_like(query, value, settings[-1]),
)
select_attention_backward = _define(
    "select_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor topk_indices,"
    f" {_SAVED}, {_SELECTED}, str backend) -> (Tensor, Tensor, Tensor)",
    _like_inputs(3),
)
_differentiate(select_attention, select_attention_backward, tensors=4, differentiable=3, saved_outputs=(0, 1, 2))

window_attention = _define(
    "window_attention",
    f"(Tensor query, Tensor key, Tensor value, {_WINDOW}, str backend) -> (Tensor, Tensor, Tensor)",
    lambda query, key, value, *settings: _attention_like(query, value, settings[-1]),
)
window_attention_backward = _define(
    "window_attention_backward",
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, {_SAVED}, {_WINDOW}, str backend) -> (Tensor, Tensor, Tensor)",
    _like_inputs(3),
)
_differentiate(window_attention, window_attention_backward, tensors=3, differentiable=3, saved_outputs=(0, 1, 2))


gated_sum = _define(
    "gated_sum",
    "(Tensor gate, Tensor compress, Tensor select, Tensor window, str backend) -> Tensor",
    lambda gate, compress, *_: torch.empty_like(compress, memory_format=torch.contiguous_format),
)
gated_sum_backward = _define(
    "gated_sum_backward",
    "(Tensor grad, Tensor gate, Tensor compress, Tensor select, Tensor window, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _like_inputs(4),
)
_differentiate(gated_sum, gated_sum_backward, tensors=4, differentiable=4, saved_outputs=())


def _fake_sparse_attention(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    branches = [_attention_like(query, value, others[-1]) for _ in range(3)]
    attentions, statistics = [each[0] for each in branches], [x for each in branches for x in each[1:]]
    count = Compressed(*others[5:-3]).select_block_count
    ids = query.new_empty(query.shape[0], key.shape[1], count, dtype=torch.int32)
    return torch.empty_like(attentions[0]), ids, *attentions, *statistics


# Keys and values of the branches, and the gates. Only some backends have it: `backends.attends_whole`.
_BRANCHES = (
    "Tensor query, Tensor compress_key, Tensor compress_value, Tensor select_key, Tensor select_value, Tensor window_key,"
    " Tensor window_value, Tensor gate"
)
_WHOLE = f"{_COMPRESSED}, int window_size, SymInt[] kv_len, str backend"

sparse_attention = _define(
    "sparse_attention",
    f"({_BRANCHES}, {_WHOLE}) -> ({', '.join(['Tensor'] * 11)})",
    _fake_sparse_attention,
)
sparse_attention_backward = _define(
    "sparse_attention_backward",
    f"(Tensor grad, {_BRANCHES}, Tensor topk_indices, Tensor compress, Tensor select, Tensor window, Tensor compress_max,"
    " Tensor compress_sum, Tensor select_max, Tensor select_sum, Tensor window_max, Tensor window_sum,"
    f" {_WHOLE}) -> ({', '.join(['Tensor'] * 8)})",
    _like_inputs(8),
)
_differentiate(sparse_attention, sparse_attention_backward, tensors=8, differentiable=8, saved_outputs=tuple(range(1, 11)))


def _checked_indices(topk_indices: Tensor, block_size: int, q_len: list[int], kv_len: list[int]) -> Tensor:
    check_topk_indices(topk_indices, block_size, q_len, kv_len)
    return topk_indices.clone()


# The values of the ids are data: checking them in an operator whose result is used keeps the check in a compiled graph.
checked_indices = torch.library.custom_op(
    "mindspeed_nsa::checked_indices",
    _checked_indices,
    mutates_args=(),
    schema="(Tensor topk_indices, int block_size, SymInt[] q_len, SymInt[] kv_len) -> Tensor",
)
checked_indices.register_fake(lambda topk_indices, *_: torch.empty_like(topk_indices))
