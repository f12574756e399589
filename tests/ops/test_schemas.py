import pytest
import torch

from mindspeed_nsa.ops.schemas import SCHEMAS, differences

FUSION = SCHEMAS["npu_fusion_attention"]


def test_the_schemas_are_as_torch_prints_them():
    for name, text in SCHEMAS.items():
        assert str(torch._C.parse_schema(text)) == text
        assert text.startswith(f"npu::{name}(")
        assert differences(name, text) == []


@pytest.mark.parametrize(
    ("name", "before", "after", "found"),
    [
        ("npu_nsa_compress", "=None)", "=None, bool fast=False)", []),
        ("npu_nsa_compress", "int compress_stride, *, ", "int compress_stride, ", []),
        ("npu_fusion_attention", "int offset=0)", "int offset=0, Tensor? extra=None)", []),
        ("npu_nsa_compress", "Tensor weight, ", "", ["weight is gone"]),
        ("npu_nsa_compress", "Tensor weight", "Tensor weights", ["weight is gone", "weights is new and required"]),
        ("npu_nsa_compress", "=None)", "=None, int kind)", ["kind is new and required"]),
        ("npu_nsa_compress", "int[]? actual_seq_len=None", "int[] actual_seq_len",
         ["actual_seq_len is List[int], was Optional[List[int]]", "actual_seq_len is required, was not"]),
        ("npu_nsa_compress", "int compress_stride, *, ", "*, int compress_stride, ", ["compress_stride is a keyword, was not"]),
        ("npu_nsa_compress", "Tensor input, Tensor weight", "Tensor weight, Tensor input",
         ["the order is weight, input, compress_block_size, compress_stride; "
          "was input, weight, compress_block_size, compress_stride"]),
        ("npu_nsa_compress", "-> Tensor", "-> (Tensor, Tensor)", ["the outputs are (Tensor, Tensor), were (Tensor)"]),
        ("npu_fusion_attention", "sparse_mode=0", "sparse_mode=2", ["sparse_mode is 2 by default, was 0"]),
    ],
)  # fmt: skip
def test_what_can_break_a_call_is_named_and_what_cannot_is_not(name, before, after, found):
    assert before in SCHEMAS[name]
    assert differences(name, SCHEMAS[name].replace(before, after)) == found


def test_an_argument_put_between_others_moves_those_after_it():
    moved = FUSION.replace("Tensor? pse=None", "Tensor? rope=None, Tensor? pse=None")
    (found,) = differences("npu_fusion_attention", moved)
    assert found.startswith("the order is query, key, value, head_num, input_layout, rope, pse, ")
