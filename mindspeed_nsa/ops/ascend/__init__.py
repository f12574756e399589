"""The operators on Ascend, through torch_npu: what `reference` computes, from the same arguments.

What the chip's operators do not take goes another exact way, said once in the log: samples with fewer blocks than a list attend
densely, ones that end within a block are padded, small dims are widened, blocks are chosen outside of the operator where that
cannot. How the selected branch stays causal is a plan that `probe` finds out. "Section" means one of the contract,
`docs/operators.md`.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch_npu
from torch import Tensor

from .. import reference
from ..contract import SELECT_DIMS, takes_group
from ..reference import (
    Compressed,
    Selected,
    Window,
    aligned_at_ends,
    block_scores,
    gated_sum,
    gated_sum_backward,
    lengths,
    window_count,
)
from . import operators
from .packing import SIZES, Blocks, Windows, blocks_of, masks, say_once, windows_of
from .probe import PLANS, Plan, probe

__all__ = [
    "block_scores",
    "compress",
    "compress_attention",
    "compress_attention_backward",
    "compress_backward",
    "gated_sum",
    "gated_sum_backward",
    "operator_chooses",
    "plan",
    "select_attention",
    "select_attention_backward",
    "window_attention",
    "window_attention_backward",
]

_MOST_TOKENS = 128 * 1024  # of a sample
_MOST_PACKED_TOKENS = 1 << 20
_MOST_SAMPLES = 1024
_MOST_HEADS = 128
_logger = logging.getLogger(__name__)


# ---- the plan


def plan(group: int = 1) -> Plan:
    """How the selected branch stays causal on this process's device, for `group` query heads a key/value head (section 6).

    The first call probes the device and logs what it found; `NSA_ASCEND_PLAN` decides without.

    Raises:
        ValueError: NSA_ASCEND_PLAN names no plan.
        RuntimeError: no plan holds on this device.
    """
    # Groups that an operator does not take are split or led around it: what counts is the kernel that theirs run.
    heads = group // operators.parts_of(group)
    probed = next(allowed for allowed in (1, 2, 4, 8, 16, 32) if allowed >= heads)
    return _plan(probed, torch.are_deterministic_algorithms_enabled(), os.environ.get("NSA_ASCEND_PLAN"))


@cache
def _plan(group: int, deterministic: bool, asked: str | None) -> Plan:
    versions = f"torch_npu {torch_npu.__version__}, CANN {torch_npu.npu.utils.get_cann_version() or 'of unknown version'}"
    if asked is not None:
        if asked not in PLANS:
            raise ValueError(f"NSA_ASCEND_PLAN is {asked!r}; allowed: {', '.join(PLANS)}")
        _logger.warning("NSA on Ascend: plan %s, because NSA_ASCEND_PLAN says so; not probed (%s)", asked, versions)
        return PLANS[asked]
    report = probe(torch.device("npu", torch_npu.npu.current_device()), group)
    if report.plan is None:
        raise RuntimeError(f"NSA on Ascend: no plan keeps attention causal: {report.reason} ({versions})")
    _logger.warning("NSA on Ascend: plan %s for %d heads a group: %s (%s)", report.plan.name, group, report.reason, versions)
    return report.plan


def _plan_of(query: Tensor, key: Tensor) -> Plan:
    return plan(query.shape[1] // key.shape[1])


# ---- compress


def compress(input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]) -> Tensor:
    """See `reference.compress`."""
    _check_half(input)
    if not any(window_count(length, block_size, stride) for length in lengths(seq_len)):
        return input.new_empty(0, *input.shape[1:])  # the operator refuses to return nothing
    return operators.compress(input, weight, block_size, stride, seq_len)


def compress_backward(
    grad: Tensor, input: Tensor, weight: Tensor, block_size: int, stride: int, seq_len: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """See `reference.compress_backward`."""
    if not grad.shape[0]:
        return input.new_zeros(input.shape), weight.new_zeros(weight.shape)
    return operators.compress_grad(grad, input, weight, block_size, stride, seq_len)


# ---- compressed attention


def compress_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_mask: Tensor | None, atten_mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.compress_attention`."""
    at = Compressed(*settings)
    if not at.causal:
        return _by_masks(query, key, value, topk_mask, atten_mask, at)
    _check_compressed(query, key, at)
    if not key.shape[0]:
        return _without_windows(query, key, value, at)
    go, masked, forced = _windows(query, at)
    padded = _take(key, go.fill), _take(value, go.fill)
    group = query.shape[1] // key.shape[1]
    if at.select_block_count and operator_chooses(group, at.own_block, at.importance):
        attention, ids, row_max, row_sum = operators.compress_attention(
            *(query, *padded, at.scale, SIZES),
            topk_mask=forced,
            atten_mask=masked,
            actual_seq_qlen=go.q_len,
            actual_cmp_seq_kvlen=go.cmp_len,
            actual_sel_seq_kvlen=go.sel_len,
        )
        ids = torch.where(go.early, go.first_blocks, ids)
    else:
        how: dict[str, Any] = {"atten_mask": masked, "sparse_mode": 1, "pads_value": _plan_of(query, key).pads_value}
        attention, row_max, row_sum = operators.fusion_attention(query, *padded, at.scale, go.q_len, go.cmp_len, **how)
        ids = reference.chosen_blocks(query, key, row_max, row_sum, at)
    return attention.index_fill_(0, go.blind, 0), ids, row_max, row_sum


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
    """See `reference.compress_attention_backward`."""
    at = Compressed(*settings)
    saved = attention, softmax_max, softmax_sum
    if not at.causal:
        operands = grad, query, key, value, *saved
        return operators.fusion_attention_grad(*operands, at.scale, at.q_len, at.cmp_len, atten_mask=atten_mask, sparse_mode=1)
    if not key.shape[0]:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    go, masked, _ = _windows(query, at)
    grad_query, grad_key, grad_value = operators.fusion_attention_grad(
        *(grad.index_fill(0, go.blind, 0), query, _take(key, go.fill), _take(value, go.fill), *saved),
        *(at.scale, go.q_len, go.cmp_len),
        atten_mask=masked,
        sparse_mode=1,
        pads_value=_plan_of(query, key).pads_value,
    )
    return grad_query, _take(grad_key, go.places), _take(grad_value, go.places)


def _by_masks(
    query: Tensor, key: Tensor, value: Tensor, topk_mask: Tensor | None, atten_mask: Tensor | None, at: Compressed
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator as it is."""
    return operators.compress_attention(
        *(query, key, value, at.scale),
        (at.compress_block_size, at.compress_stride, at.select_block_size, at.select_block_count),
        topk_mask=topk_mask,
        atten_mask=atten_mask,
        actual_seq_qlen=at.q_len,
        actual_cmp_seq_kvlen=at.cmp_len,
        actual_sel_seq_kvlen=at.sel_len,
    )


def _without_windows(query: Tensor, key: Tensor, value: Tensor, at: Compressed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attention = query.new_zeros(*query.shape[:2], value.shape[-1])
    ids = torch.arange(at.select_block_count, dtype=torch.int32, device=query.device)
    statistic = query.new_zeros(*query.shape[:2], 8, dtype=torch.float32)
    return attention, ids.repeat(query.shape[0], key.shape[1], 1), statistic, statistic.clone()


def _windows(query: Tensor, at: Compressed) -> tuple[Windows, Tensor, Tensor]:
    go = windows_of(tuple(at.q_len), query.device)
    most = (max(lengths(ends)) for ends in (go.q_len, go.cmp_len, go.sel_len))
    return go, *masks(*most, at.init_blocks, at.local_blocks, query.device)


def operator_chooses(group: int, own_block: bool, importance: str) -> bool:
    """Whether npu_nsa_compress_attention chooses the right blocks on this device; if not, says why once.

    Args:
        group: query heads a key/value head.
        own_block: see `reference.Compressed`; `importance` likewise.
        importance: see above.
    """
    if not own_block:
        why = "it cannot leave out the query's own block"
    elif importance != "ascend":
        why = f"importance is {importance}"
    elif not takes_group(group):
        why = f"it takes no {group} query heads a key/value head"
    elif not plan(group).chooses:
        why = "its choice differs here, as the probe found"
    else:
        return True
    say_once(f"blocks are chosen in PyTorch, slower than by npu_nsa_compress_attention: {why}")
    return False


def _check_compressed(query: Tensor, key: Tensor, at: Compressed) -> None:
    _check_half(query)
    _check_whole(at.q_offset)
    sizes = at.compress_block_size, at.compress_stride, at.select_block_size, at.select_block_count or SIZES[3]
    if sizes != SIZES:
        names = "compress_block_size, compress_stride, select_block_size, select_block_count"
        raise ValueError(f"{names} are {sizes}; the Ascend operators take {SIZES}")
    samples = [length for length in lengths(at.q_len) if length]
    if max(samples) > _MOST_TOKENS or len(samples) > _MOST_SAMPLES or sum(samples) > _MOST_PACKED_TOKENS:
        raise ValueError(
            f"{len(samples)} packed samples, the longest of {max(samples)} tokens, {sum(samples)} in all; the Ascend operators "
            f"take up to {_MOST_SAMPLES} samples of up to {_MOST_TOKENS} tokens, {_MOST_PACKED_TOKENS} in all"
        )
    if query.shape[1] > _MOST_HEADS:
        raise ValueError(f"{query.shape[1]} query heads; the Ascend operators take up to {_MOST_HEADS} a card")
    if at.own_block and _plan_of(query, key).name == "B":
        raise ValueError(
            "select_own_block: true cannot run on this device, whose select operator stays causal by plan B alone; "
            "allowed: auto or false, which leave the query's own block to the window"
        )


# ---- select attention


def select_attention(
    query: Tensor, key: Tensor, value: Tensor, topk_indices: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.select_attention`. Lists that are not `ordered` go to the operator as they are."""
    at = Selected(*settings)
    _check_whole(at.q_offset)
    if not at.ordered:
        return operators.select_attention(query, key, value, topk_indices, at.scale, at.q_len, at.kv_len, at.causal)
    _check_select(key, value)
    here = _plan_of(query, key)
    go = blocks_of(tuple(at.q_len), here.name == "B", query.device)
    parts = []
    if go.q_len:
        operands = _take(query, go.rows), _take(key, go.fill), _take(value, go.fill), _take(topk_indices, go.rows)
        parts.append((go.rows, operators.select_attention(*operands, at.scale, go.q_len, go.kv_len, here.name == "A")))
    if go.dense_len:
        densely = _take_all((query, key, value), go.dense)
        parts.append((go.dense, operators.fusion_attention(*densely, **_densely(query, at, go, here))))
    tokens = query.shape[0]
    attention, row_max, row_sum = (_joined(tokens, [(rows, part[i]) for rows, part in parts]) for i in range(3))
    return attention, row_max, row_sum


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
    """See `reference.select_attention_backward`."""
    at = Selected(*settings)
    by_row = grad, attention, softmax_max, softmax_sum
    if not at.ordered:
        operands = grad, query, key, value, topk_indices, *by_row[1:]
        return operators.select_attention_grad(*operands, at.scale, at.q_len, at.kv_len, at.causal)
    here = _plan_of(query, key)
    go = blocks_of(tuple(at.q_len), here.name == "B", query.device)
    parts = []
    if go.q_len:
        masked = here.name == "A"
        chosen = by_row if masked else _without_early(*by_row, go.dense)
        grad_rows, out, row_max, row_sum = _take_all(chosen, go.rows)
        rows = _take(query, go.rows), _take(key, go.fill), _take(value, go.fill), _take(topk_indices, go.rows)
        lists = go.q_len, go.kv_len
        grads = operators.select_attention_grad(grad_rows, *rows, out, row_max, row_sum, at.scale, *lists, masked)
        parts.append((go.rows, (grads[0], _take(grads[1], go.places), _take(grads[2], go.places))))
    if go.dense_len:
        densely = _take_all((grad, query, key, value, attention, softmax_max, softmax_sum), go.dense)
        parts.append((go.dense, operators.fusion_attention_grad(*densely, **_densely(query, at, go, here))))
    # By plan A a token is in one part alone.
    whole = _joined if here.name == "A" else _summed
    grad_query, grad_key, grad_value = (whole(query.shape[0], [(rows, part[i]) for rows, part in parts]) for i in range(3))
    return grad_query, grad_key, grad_value


def _check_select(key: Tensor, value: Tensor) -> None:
    if key.shape[-1] > SELECT_DIMS[0] or value.shape[-1] > SELECT_DIMS[1]:
        raise ValueError(
            f"head dims {key.shape[-1]} (query, key) and {value.shape[-1]} (value); the Ascend operators take up to "
            f"{SELECT_DIMS[0]} and {SELECT_DIMS[1]}"
        )


def _densely(query: Tensor, at: Selected, go: Blocks, here: Plan) -> dict[str, Any]:
    return {
        "scale": at.scale,
        "q_len": go.dense_len,
        "kv_len": go.dense_len,
        "atten_mask": operators.triangle(query.device),
        "sparse_mode": 2,
        "pads_value": here.pads_value,
    }


def _without_early(
    grad: Tensor, attention: Tensor, row_max: Tensor, row_sum: Tensor, early: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, but early rows weigh nothing and get no gradient."""
    assert early is not None
    # Their statistics are those of dense attention: a max above all logits makes every probability 0.
    return grad.index_fill(0, early, 0), attention, row_max.index_fill(0, early, 1e30), row_sum.index_fill(0, early, 1)


# ---- window attention


def window_attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.window_attention`."""
    at = Window(*settings)
    _check_half(query)
    if any(queries > keys for queries, keys in zip(lengths(at.q_len), lengths(at.kv_len), strict=True)):
        raise ValueError(
            "a sample has more queries than keys; npu_fusion_attention has no causal window for those that see none"
        )
    if list(at.q_offset) != aligned_at_ends(at.q_len, at.kv_len):
        raise ValueError(
            f"q_offset is {list(at.q_offset)}; npu_fusion_attention takes windows whose last query is at the last key of its "
            f"sample: {aligned_at_ends(at.q_len, at.kv_len)}"
        )
    return operators.fusion_attention(query, key, value, at.scale, at.q_len, at.kv_len, **_banded(query, key, at))


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
    """See `reference.window_attention_backward`."""
    at = Window(*settings)
    operands = grad, query, key, value, attention, softmax_max, softmax_sum
    return operators.fusion_attention_grad(*operands, at.scale, at.q_len, at.kv_len, **_banded(query, key, at))


def _banded(query: Tensor, key: Tensor, at: Window) -> dict[str, Any]:
    return {
        "atten_mask": operators.triangle(query.device),
        "sparse_mode": 4,
        "reach": at.window_size - 1,
        "pads_value": _plan_of(query, key).pads_value,
    }


# ---- rows


def _check_whole(q_offset: Sequence[int]) -> None:
    if any(q_offset):
        raise ValueError(f"q_offset is {list(q_offset)}; the Ascend operators take queries from the start of their sample: 0")


def _check_half(tensor: Tensor) -> None:
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the Ascend operators take bfloat16 or float16, not {tensor.dtype}; train with bf16: true")
    if tensor.device.type != "npu":
        raise ValueError(f"backend ascend takes tensors on npu, not on {tensor.device.type}")


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _take_all(tensors: tuple[Tensor, ...], rows: Tensor | None) -> Any:
    return tuple(_take(tensor, rows) for tensor in tensors)


def _joined(tokens: int, parts: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """The rows of all parts; where two have a row, the later one's."""
    (rows, first), *others = parts
    whole = first if rows is None else first.new_empty(tokens, *first.shape[1:]).index_copy_(0, rows, first)
    for rows, part in others:
        assert rows is not None
        whole.index_copy_(0, rows, part)
    return whole


def _summed(tokens: int, parts: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """The sum of all parts, each at its rows."""
    (rows, first), *others = parts
    whole = first if rows is None else first.new_zeros(tokens, *first.shape[1:]).index_copy_(0, rows, first)
    for rows, part in others:
        assert rows is not None
        whole.index_add_(0, rows, part)
    return whole
