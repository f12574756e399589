"""The schemas of the torch_npu operators that this project is written against, and what differs in an installed torch_npu."""

from typing import Any

import torch

RELEASE = "2.13.0"  # 2.7.1.post11 has the same

SCHEMAS: dict[str, str] = {
    "npu_nsa_compress": (
        "npu::npu_nsa_compress(Tensor input, Tensor weight, int compress_block_size, int compress_stride, *, "
        "int[]? actual_seq_len=None) -> Tensor"
    ),
    "npu_nsa_compress_grad": (
        "npu::npu_nsa_compress_grad(Tensor grad, Tensor input, Tensor weight, int compress_block_size, "
        "int compress_stride, *, int[]? actual_seq_len=None) -> (Tensor, Tensor)"
    ),
    "npu_nsa_compress_attention": (
        "npu::npu_nsa_compress_attention(Tensor query, Tensor key, Tensor value, float scale_value, int head_num, "
        "int compress_block_size, int compress_stride, int select_block_size, int select_block_count, *, "
        "Tensor? topk_mask=None, Tensor? atten_mask=None, int[]? actual_seq_qlen=None, int[]? actual_cmp_seq_kvlen=None, "
        "int[]? actual_sel_seq_kvlen=None) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "npu_nsa_select_attention": (
        "npu::npu_nsa_select_attention(Tensor query, Tensor key, Tensor value, Tensor topk_indices, float scale_value, "
        "int head_num, int select_block_size, int select_block_count, *, Tensor? atten_mask=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None) -> (Tensor, Tensor, Tensor)"
    ),
    "npu_nsa_select_attention_grad": (
        "npu::npu_nsa_select_attention_grad(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attention_out, "
        "Tensor softmax_max, Tensor softmax_sum, Tensor topk_indices, float scale_value, int head_num, "
        "int select_block_size, int select_block_count, *, Tensor? atten_mask=None, int[]? actual_seq_qlen=None, "
        "int[]? actual_seq_kvlen=None) -> (Tensor, Tensor, Tensor)"
    ),
    "npu_fusion_attention": (
        "npu::npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
        "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
        'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0)'
        " -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
    ),
    "npu_fusion_attention_grad": (
        "npu::npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, "
        "str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
        "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, "
        "float scale_value=1., float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
        "int inner_precise=0, int seed=0, int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
        "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, "
        'str softmax_layout="", Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    ),
}
"""The operators, forward and gradient, as torch prints their schemas in torch_npu `RELEASE`."""


def installed(name: str) -> str | None:
    """The schema of an operator in the torch_npu that is loaded; None where it has no such operator."""
    if f"npu::{name}" not in torch._C._dispatch_get_all_op_names():
        return None
    return str(torch._C._get_schema(f"npu::{name}", ""))


def differences(name: str, installed_schema: str) -> list[str]:
    """What in an installed operator's schema can break calls that are written for `SCHEMAS`.

    New arguments that may be left out, after the others or as keywords, break nothing and are not named.

    Args:
        name: an operator of `SCHEMAS`.
        installed_schema: as torch prints it.

    Returns:
        One phrase a difference, such as `scale is int, was float`.
    """
    before, now = (torch._C.parse_schema(text) for text in (SCHEMAS[name], installed_schema))
    old, new = ({argument.name: argument for argument in schema.arguments} for schema in (before, now))
    found = [f"{key} is gone" for key in old if key not in new]
    found += [f"{key} is new and required" for key in new if key not in old and not new[key].has_default_value()]
    for key in old:
        if key in new:
            found += _changes(old[key], new[key])
    old_places, new_places = ([key for key in keys if not keys[key].kwarg_only] for keys in (old, new))
    if set(old_places) <= set(new_places) and old_places != new_places[: len(old_places)]:
        found.append(f"the order is {', '.join(new_places)}; was {', '.join(old_places)}")
    old_outputs, new_outputs = (", ".join(str(output.type) for output in schema.returns) for schema in (before, now))
    if old_outputs != new_outputs:
        found.append(f"the outputs are ({new_outputs}), were ({old_outputs})")
    return found


def _changes(old: Any, new: Any) -> list[str]:
    """What changed in one argument; each is a torch._C.Argument."""
    found = []
    if str(old.type) != str(new.type):
        found.append(f"{old.name} is {new.type}, was {old.type}")
    if new.kwarg_only and not old.kwarg_only:
        found.append(f"{old.name} is a keyword, was not")
    if old.has_default_value() and not new.has_default_value():
        found.append(f"{old.name} is required, was not")
    elif old.has_default_value() and old.default_value != new.default_value:
        found.append(f"{old.name} is {new.default_value!r} by default, was {old.default_value!r}")
    return found
