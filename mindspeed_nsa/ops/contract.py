"""What the Ascend operators accept, checked before any backend runs.

Each refusal says what was given, what is allowed, and where the limit comes from: the operator's torch_npu page, the CANN
(aclnn) document of the kernel, or the kernel's host code. Sections are those of `docs/operators.md`, which lists the sources.
"""

import operator
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .reference import lengths, window_count

_HALF = (torch.bfloat16, torch.float16)
_MOST_SAMPLES = 1024
_MOST_TOKENS = 128 * 1024
_MOST_PACKED_TOKENS = 1 << 20
_MOST_WINDOWS = 14000
SELECT_DIMS = (192, 128)  # of query and key, of value


def check_compress(
    input: Tensor, weight: Tensor, block_size: int, stride: int, actual_seq_len: Sequence[int] | None
) -> list[int]:
    """Refuse what `npu_nsa_compress` does not take; return the prefix sums (section 1)."""
    op = "npu_nsa_compress"
    _check_half(op, "the torch_npu page of npu_nsa_compress, section 1", input=input, weight=weight)
    _check_rank(op, input=(input, "[T, N, D]"), weight=(weight, "[compress_block_size, N]"))
    head_num, dim = input.shape[1:]
    if tuple(weight.shape) != (block_size, head_num):
        _refuse(
            op,
            f"weight is {_shape(weight)}",
            f"[compress_block_size, N] = [{block_size}, {head_num}]",
            "torch_npu page, section 1",
        )
    if block_size % 16 or not 16 <= block_size <= 128:
        _refuse(op, f"compress_block_size is {block_size}", "a multiple of 16 from 16 to 128", "torch_npu page, section 1")
    if stride % 16 or not 16 <= stride <= block_size:
        _refuse(
            op,
            f"compress_stride is {stride}",
            f"a multiple of 16 from 16 to compress_block_size {block_size}",
            "torch_npu page, section 1",
        )
    if not 1 <= head_num <= 128:
        _refuse(op, f"input has N = {head_num} heads", "1 to 128", "torch_npu page, section 1")
    if dim % 16 or not 16 <= dim <= 256:
        _refuse(op, f"input has D = {dim}", "a multiple of 16 from 16 to 256", "torch_npu page, section 1")
    ends = _prefix_sums(op, "actual_seq_len", actual_seq_len, input.shape[0], "input")
    if all(window_count(length, block_size, stride) == 0 for length in lengths(ends)):
        _refuse(
            op,
            f"actual_seq_len {_brief(ends)} has no sample of {block_size} tokens, so the output would be empty",
            "at least one sample as long as compress_block_size",
            "aclnnNsaCompress forbids an empty output, section 1",
        )
    return ends


def check_compress_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    sizes: tuple[int, int, int, int],
    topk_mask: Tensor | None,
    atten_mask: Tensor | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_cmp_seq_kvlen: Sequence[int] | None,
    actual_sel_seq_kvlen: Sequence[int] | None,
) -> tuple[list[int], list[int], list[int]]:
    """Refuse what `npu_nsa_compress_attention` does not take; return the three prefix sums (section 2)."""
    op = "npu_nsa_compress_attention"
    _check_attention(op, query, key, value, head_num, ("[T1, N1, D1]", "[windows, N2, D1]", "[windows, N2, D2]"))
    group = query.shape[1] // key.shape[1]
    if not takes_group(group):
        _refuse(op, f"N1 / N2 = {group}", "a divisor of 128 below 128", "kernel host code, section 2")
    if query.shape[2] > 768 or value.shape[2] > key.shape[2]:
        _refuse(op, f"D1 = {query.shape[2]}, D2 = {value.shape[2]}", "D2 <= D1 <= 768", "kernel host code, section 2")
    names = ("compress_block_size", "compress_stride", "select_block_size", "select_block_count")
    for name, given, allowed in zip(names, sizes, (32, 16, 64, 16), strict=True):
        if given != allowed:
            _refuse(op, f"{name} is {given}", str(allowed), "torch_npu page, section 2")
    q_len = _prefix_sums(op, "actual_seq_qlen", actual_seq_qlen, query.shape[0], "query")
    cmp_len = _prefix_sums(op, "actual_cmp_seq_kvlen", actual_cmp_seq_kvlen, key.shape[0], "key")
    sel_len = _prefix_sums(op, "actual_sel_seq_kvlen", actual_sel_seq_kvlen)
    _check_samples(op, actual_seq_qlen=q_len, actual_cmp_seq_kvlen=cmp_len, actual_sel_seq_kvlen=sel_len)
    _check_blocks_of_windows(op, lengths(cmp_len), lengths(sel_len), sizes)
    longest = max(lengths(q_len))
    _check_mask(op, "atten_mask", atten_mask, (longest, max(lengths(cmp_len))), "the kernel assumes this stride, section 2")
    _check_mask(op, "topk_mask", topk_mask, (longest, max(lengths(sel_len))), "the kernel assumes this stride, section 2")
    return q_len, cmp_len, sel_len


def takes_group(group: int) -> bool:
    """Whether `npu_nsa_compress_attention` takes so many query heads a key/value head (section 2)."""
    return group < 128 and 128 % group == 0


def _check_blocks_of_windows(op: str, windows: list[int], blocks: list[int], sizes: tuple[int, int, int, int]) -> None:
    _, stride, select_block_size, select_block_count = sizes
    per_block = select_block_size // stride
    for b, (windows_b, blocks_b) in enumerate(zip(windows, blocks, strict=True)):
        if windows_b > _MOST_WINDOWS:
            _refuse(
                op,
                f"sample {b} has {windows_b} compressed tokens",
                f"at most {_MOST_WINDOWS}",
                "aclnn document, section 2",
            )
        if blocks_b != -(-windows_b // per_block):
            _refuse(
                op,
                f"actual_sel_seq_kvlen gives sample {b} {blocks_b} blocks for {windows_b} compressed tokens",
                f"ceil({windows_b} / {per_block}) = {-(-windows_b // per_block)}",
                "kernel host code, section 2",
            )
        if blocks_b < select_block_count:
            _refuse(
                op,
                f"sample {b} has {blocks_b} blocks ({windows_b} compressed tokens)",
                f"at least select_block_count = {select_block_count} in every sample, which takes 992 tokens",
                "kernel host code, section 2",
            )


def check_select_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    head_num: int,
    select_block_size: int,
    select_block_count: int,
    atten_mask: Tensor | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Refuse what `npu_nsa_select_attention` does not take; return the two prefix sums (section 3)."""
    op = "npu_nsa_select_attention"
    _check_attention(op, query, key, value, head_num, ("[T1, N1, D1]", "[T2, N2, D1]", "[T2, N2, D2]"))
    if (query.shape[2], value.shape[2]) != SELECT_DIMS:
        _refuse(op, f"D1 = {query.shape[2]}, D2 = {value.shape[2]}", "D1 = 192, D2 = 128", "torch_npu page, section 3")
    for name, given, allowed in (
        ("select_block_size", select_block_size, 64),
        ("select_block_count", select_block_count, 16),
    ):
        if given != allowed:
            _refuse(op, f"{name} is {given}", str(allowed), "torch_npu page, section 3")
    if query.shape[1] // key.shape[1] > 32:
        _refuse(
            op,
            f"N1 / N2 = {query.shape[1] // key.shape[1]}",
            "at most 32",
            "torch_npu page of torch_npu 2.13, section 3",
        )
    if query.shape[1] > 128:
        _refuse(op, f"query has N1 = {query.shape[1]} heads", "1 to 128", "aclnn document, section 3")
    if topk_indices.dtype != torch.int32:
        _refuse(op, f"topk_indices is {topk_indices.dtype}", "torch.int32", "torch_npu page, section 3")
    expected = (query.shape[0], key.shape[1], select_block_count)
    if tuple(topk_indices.shape) != expected:
        _refuse(
            op,
            f"topk_indices is {_shape(topk_indices)}",
            f"[T1, N2, select_block_count] = {list(expected)}",
            "torch_npu page, section 3",
        )
    if atten_mask is not None:
        _check_mask(op, "atten_mask", atten_mask, None, "presence switches causal masking, section 6")
    q_len = _prefix_sums(op, "actual_seq_qlen", actual_seq_qlen, query.shape[0], "query")
    kv_len = _prefix_sums(op, "actual_seq_kvlen", actual_seq_kvlen, key.shape[0], "key")
    _check_samples(op, actual_seq_qlen=q_len, actual_seq_kvlen=kv_len)
    _check_select_lengths(op, lengths(q_len), lengths(kv_len), select_block_size, select_block_count)
    return q_len, kv_len


def _check_select_lengths(op: str, queries: list[int], keys: list[int], block_size: int, block_count: int) -> None:
    least = block_size * block_count
    for b, (queries_b, keys_b) in enumerate(zip(queries, keys, strict=True)):
        if not 1 <= queries_b <= _MOST_TOKENS:
            _refuse(op, f"sample {b} has {queries_b} query tokens", f"1 to {_MOST_TOKENS}", "aclnn document, section 3")
        if keys_b < least or keys_b % block_size or keys_b > _MOST_TOKENS:
            _refuse(
                op,
                f"sample {b} has {keys_b} key tokens",
                f"a multiple of {block_size} from {least} to {_MOST_TOKENS}",
                "torch_npu page of torch_npu 2.13 and aclnn document, section 3",
            )


def check_topk_indices(topk_indices: Tensor, block_size: int, q_len: Sequence[int], kv_len: Sequence[int]) -> None:
    """Refuse ids outside a sample, which the kernel would turn into addresses unchecked (section 3)."""
    start = 0
    for b, (stop, keys) in enumerate(zip(q_len, lengths(kv_len), strict=True)):
        ids = topk_indices[start:stop]
        lowest, highest, blocks = int(ids.min()), int(ids.max()), keys // block_size
        start = stop
        if lowest < 0 or highest >= blocks:
            _refuse(
                "npu_nsa_select_attention",
                f"topk_indices of sample {b} lie between {lowest} and {highest}",
                f"0 to {blocks - 1}, the blocks of its {keys} key tokens",
                "the kernel reads wherever an id points, section 3",
            )


def check_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    window_size: int,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Refuse what `npu_fusion_attention` cannot do as a causal window; return the two prefix sums (section 4)."""
    op = "sliding_window_attention"
    _check_attention(op, query, key, value, head_num, ("[T1, N1, D1]", "[T2, N2, D1]", "[T2, N2, D2]"))
    if value.shape[2] > key.shape[2] or key.shape[2] > 768:
        _refuse(
            op,
            f"D1 = {key.shape[2]}, D2 = {value.shape[2]}",
            "D2 <= D1 <= 768",
            "page of npu_fusion_attention, section 4",
        )
    if query.shape[1] > 256:
        _refuse(op, f"query has N1 = {query.shape[1]} heads", "1 to 256", "page of npu_fusion_attention, section 4")
    if window_size < 1:
        _refuse(op, f"window_size is {window_size}", "at least 1, the query's own token", "section 4")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[0] > _MOST_PACKED_TOKENS:
            source = "page of npu_fusion_attention, section 4"
            _refuse(op, f"{name} has {tensor.shape[0]} packed tokens", f"at most {_MOST_PACKED_TOKENS}", source)
    q_len = _prefix_sums(op, "actual_seq_qlen", actual_seq_qlen, query.shape[0], "query")
    kv_len = _prefix_sums(op, "actual_seq_kvlen", actual_seq_kvlen, key.shape[0], "key")
    _check_samples(op, actual_seq_qlen=q_len, actual_seq_kvlen=kv_len)
    return q_len, kv_len


def _check_attention(op: str, query: Tensor, key: Tensor, value: Tensor, head_num: int, shapes: tuple[str, str, str]) -> None:
    _check_half(op, "torch_npu page, constraint on query, key and value", query=query, key=key, value=value)
    _check_rank(op, query=(query, shapes[0]), key=(key, shapes[1]), value=(value, shapes[2]))
    if query.shape[2] != key.shape[2]:
        _refuse(op, f"query has D1 = {query.shape[2]}, key {key.shape[2]}", "the same D1", "torch_npu page")
    if key.shape[:2] != value.shape[:2]:
        _refuse(op, f"key is {_shape(key)}, value {_shape(value)}", "the same tokens and heads", "torch_npu page")
    if query.shape[1] % key.shape[1]:
        _refuse(
            op,
            f"query has N1 = {query.shape[1]} heads, key N2 = {key.shape[1]}",
            "N1 a multiple of N2",
            "aclnn document",
        )
    if head_num != query.shape[1]:
        _refuse(
            op,
            f"head_num is {head_num}",
            f"the query's own N1 = {query.shape[1]} (this card's heads)",
            "torch_npu page",
        )


def _check_half(op: str, source: str, **tensors: Tensor) -> None:
    names, given = ", ".join(tensors), {name: tensor.dtype for name, tensor in tensors.items()}
    for name, dtype in given.items():
        if dtype not in _HALF:
            _refuse(op, f"{name} is {dtype}", f"torch.bfloat16 or torch.float16, one for {names}", source)
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        _refuse(op, f"types differ: {listed}", f"one type for {names}", source)


def _check_rank(op: str, **tensors: tuple[Tensor, str]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor.dim() != shape.count(",") + 1 or 0 in tensor.shape:
            _refuse(op, f"{name} is {_shape(tensor)}", f"{shape}, not empty", "torch_npu page")


def _check_mask(op: str, name: str, mask: Tensor | None, shape: tuple[int, int] | None, source: str) -> None:
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.uint8) or mask.dim() != 2:
        _refuse(op, f"{name} is {mask.dtype} {_shape(mask)}", "2-D torch.bool or torch.uint8", source)
    if shape is not None and tuple(mask.shape) != shape:
        _refuse(op, f"{name} is {_shape(mask)}", f"exactly {list(shape)}", source)


def _check_samples(op: str, **lists: list[int]) -> None:
    counts = {name: len(ends) for name, ends in lists.items()}
    for name, count in counts.items():
        if count > _MOST_SAMPLES:
            _refuse(op, f"{name} has {count} samples", f"at most {_MOST_SAMPLES}", "aclnn document")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        _refuse(op, f"numbers of samples differ: {listed}", "one entry a sample in each", "torch_npu page")


def _prefix_sums(op: str, name: str, given: Sequence[int] | None, tokens: int | None = None, tensor: str = "") -> list[int]:
    source = "torch_npu page"
    try:
        ends = [] if given is None or isinstance(given, Tensor) else [operator.index(end) for end in given]
    except TypeError:
        ends = []
    if not ends:
        kind = "a tensor" if isinstance(given, Tensor) else "missing or empty" if not given else repr(given)
        _refuse(op, f"{name} is {kind}", "a list of prefix sums, python integers", source)
    if any(length < 0 for length in lengths(ends)):
        _refuse(op, f"{name} is {_brief(ends)}", "prefix sums, which never fall", source)
    if tokens is not None and ends[-1] != tokens:
        _refuse(op, f"{name} ends with {ends[-1]}", f"{tokens}, the tokens of {tensor}", source)
    return ends


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _brief(ends: Sequence[int]) -> str:
    return str(list(ends)) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:4]))}, ..., {ends[-1]}]"


def _refuse(op: str, given: str, allowed: str, source: str) -> NoReturn:
    raise ValueError(f"{op}: {given}; allowed: {allowed} ({source})")
