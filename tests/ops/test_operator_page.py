import pytest
import torch

from mindspeed_nsa import ops


def operator_page_example(dtype):
    """The example of the operator's page, as printed there but for `dtype` and the missing chip."""
    return {
        "query": torch.randn(256, 16, 192).to(dtype),
        "key": torch.randn(3072, 4, 192).to(dtype),
        "value": torch.randn(3072, 4, 128).to(dtype).int(),
        "topk_indices": torch.randn(256, 4, 16).int(),
        "scale_value": 1.0,
        "head_num": 16,
        "select_block_size": 64,
        "select_block_count": 16,
        "atten_mask": torch.randn(512, 2048).bool(),
        "actual_seq_qlen": [128, 256],
        "actual_seq_kvlen": [2048, 3072],
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_example_of_the_operator_page(dtype):
    example = operator_page_example(dtype)
    with pytest.raises(ValueError, match=r"value is torch.int32; allowed: torch.bfloat16 or torch.float16"):
        ops.npu_nsa_select_attention(**example)
    example["value"] = torch.randn(3072, 4, 128).to(dtype)
    with pytest.raises(ValueError, match=r"topk_indices of sample 0 lie between -\d and \d; allowed: 0 to 31"):
        ops.npu_nsa_select_attention(**example)
    example["topk_indices"] = torch.randint(0, 16, (256, 4, 16), dtype=torch.int32)
    attention, row_max, row_sum = ops.npu_nsa_select_attention(**example)
    assert (attention.shape, attention.dtype) == ((256, 16, 128), dtype)
    assert row_max.shape == row_sum.shape == (256, 16, 8)
    assert row_max.dtype == row_sum.dtype == torch.float32
    assert attention.isfinite().all()
