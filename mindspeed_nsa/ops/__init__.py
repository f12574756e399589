"""The operators of Native Sparse Attention, drop-ins for those of torch_npu that also run where there is no chip.

Same arguments, same outputs, same meaning, differentiable, on CPU tensors as on NPU tensors. They hold to the contract of the
chip's operators (`docs/operators.md`) and name the limit that was broken. `reference` says what each computes.
"""

from collections.abc import Sequence

from torch import Tensor

from . import contract, library
from .backends import resolve, use_backend
from .reference import aligned_at_ends

__all__ = [
    "npu_nsa_compress",
    "npu_nsa_compress_attention",
    "npu_nsa_select_attention",
    "sliding_window_attention",
    "use_backend",
]


def npu_nsa_compress(
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Sequence[int] | None = None,
) -> Tensor:
    """Pool overlapping windows of tokens into one token each, by learned weights (paper, equation 7; contract, section 1).

    Args:
        input: keys or values `[T, N, D]`, bfloat16 or float16.
        weight: `[compress_block_size, N]`, the type of `input`.
        compress_block_size: tokens in a window, a multiple of 16 up to 128.
        compress_stride: tokens between the starts of windows, a multiple of 16 up to `compress_block_size`.
        actual_seq_len: prefix sums of the sample lengths, without a leading 0; required.

    Returns:
        `[windows of all samples, N, D]`. Windows do not cross samples; a tail that fills no window is dropped.

    Raises:
        ValueError: an argument breaks a limit of the operator.
    """
    ends = contract.check_compress(input, weight, compress_block_size, compress_stride, actual_seq_len)
    backend = resolve("auto")
    return library.compress(input, weight, compress_block_size, compress_stride, ends, backend)


def npu_nsa_compress_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_value: float,
    head_num: int,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    *,
    topk_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_cmp_seq_kvlen: Sequence[int] | None = None,
    actual_sel_seq_kvlen: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to compressed tokens and pick the blocks that they find important (paper, equations 7 to 12; contract, section 2).

    Args:
        query: `[T1, N1, D1]`, bfloat16 or float16.
        key: compressed keys `[windows, N2, D1]`.
        value: compressed values `[windows, N2, D2]`, D2 <= D1.
        scale_value: factor of the logits, usually `D1 ** -0.5`.
        head_num: N1, the query heads of this card.
        compress_block_size: 32.
        compress_stride: 16.
        select_block_size: 64.
        select_block_count: 16.
        topk_mask: `[longest sample, most blocks]` bool or uint8, 1 where a block is forced into the choice.
        atten_mask: `[longest sample, most windows]` bool or uint8, 1 where a window is masked; a row with nothing left
            sees all windows alike.
        actual_seq_qlen: prefix sums of the query lengths; required.
        actual_cmp_seq_kvlen: prefix sums of the windows; required.
        actual_sel_seq_kvlen: prefix sums of the blocks, ceil(windows / 4) a sample; required.

    Returns:
        attention `[T1, N1, D2]`; block ids `[T1, N2, 16]` int32, best first, equal scores by id; softmax max and
        sum `[T1, N1, 8]` float32, 8 equal copies, in memory `[N1, S_b, 8]` sample after sample.

    Raises:
        ValueError: an argument breaks a limit of the operator.
    """
    sizes = (compress_block_size, compress_stride, select_block_size, select_block_count)
    ends = contract.check_compress_attention(
        *(query, key, value, head_num, sizes, topk_mask, atten_mask),
        *(actual_seq_qlen, actual_cmp_seq_kvlen, actual_sel_seq_kvlen),
    )
    by_masks = (False, 0, 0, True, "ascend")
    lists = (*ends, [0] * len(ends[0]), resolve("auto"))
    return library.compress_attention(query, key, value, topk_mask, atten_mask, scale_value, *sizes, *by_masks, *lists)


def npu_nsa_select_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    scale_value: float,
    head_num: int,
    select_block_size: int,
    select_block_count: int,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the listed blocks of keys (paper, section 3.3.2; contract, section 3).

    Args:
        query: `[T1, N1, 192]`, bfloat16 or float16.
        key: `[T2, N2, 192]`, uncompressed.
        value: `[T2, N2, 128]`.
        topk_indices: `[T1, N2, 16]` int32, block ids counted in each sample from 0; a block listed twice counts twice.
        scale_value: factor of the logits, usually `192 ** -0.5`.
        head_num: N1, the query heads of this card.
        select_block_size: 64.
        select_block_count: 16.
        atten_mask: None: nothing is masked. Any 2-D bool or uint8 tensor: causal by block id and position, whatever it
            contains.
        actual_seq_qlen: prefix sums of the query lengths; required.
        actual_seq_kvlen: prefix sums of the key lengths, each a multiple of 64 from 1024; required.

    Returns:
        attention `[T1, N1, 128]`; softmax max and sum `[T1, N1, 8]` float32, 8 equal copies.

    Raises:
        ValueError: an argument breaks a limit of the operator, or an id points outside its sample.
    """
    q_len, kv_len = contract.check_select_attention(
        *(query, key, value, topk_indices, head_num, select_block_size, select_block_count),
        *(atten_mask, actual_seq_qlen, actual_seq_kvlen),
    )
    ids = library.checked_indices(topk_indices, select_block_size, q_len, kv_len)
    causal_ordered = (atten_mask is not None, False)
    lists = (q_len, kv_len, [0] * len(q_len), resolve("auto"))
    return library.select_attention(query, key, value, ids, scale_value, select_block_size, *causal_ordered, *lists)


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_value: float,
    head_num: int,
    window_size: int,
    *,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
) -> Tensor:
    """Attend to the newest tokens (paper, section 3.3.3; contract, section 4).

    Args:
        query: `[T1, N1, D1]`, bfloat16 or float16.
        key: `[T2, N2, D1]`.
        value: `[T2, N2, D2]`, D2 <= D1.
        scale_value: factor of the logits, usually `D1 ** -0.5`.
        head_num: N1, the query heads of this card.
        window_size: tokens that a query sees, its own included.
        actual_seq_qlen: prefix sums of the query lengths; required.
        actual_seq_kvlen: prefix sums of the key lengths; required. Samples are aligned at their ends.

    Returns:
        attention `[T1, N1, D2]`.

    Raises:
        ValueError: an argument breaks a limit of the operator.
    """
    q_len, kv_len = contract.check_window_attention(query, key, value, head_num, window_size, actual_seq_qlen, actual_seq_kvlen)
    lists = (q_len, kv_len, aligned_at_ends(q_len, kv_len), resolve("auto"))
    return library.window_attention(query, key, value, scale_value, window_size, *lists)[0]
