"""What the operators refuse, by the words a person needs to find the fault, and what they take."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_nsa import ops
from mindspeed_nsa.ops import contract

HALF = torch.bfloat16


def zeros(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype)


def ids(*shape, dtype=torch.int32):
    return torch.arange(16, dtype=dtype).expand(*shape, 16)


COMPRESS = {
    "input": zeros(70, 2, 16),
    "weight": zeros(32, 2),
    "compress_block_size": 32,
    "compress_stride": 16,
    "actual_seq_len": [6, 70],
}
COMPRESS_ATTENTION = {
    "query": zeros(5, 4, 32),
    "key": zeros(125, 2, 32),
    "value": zeros(125, 2, 16),
    "scale_value": 0.2,
    "head_num": 4,
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "select_block_count": 16,
    "actual_seq_qlen": [2, 5],
    "actual_cmp_seq_kvlen": [61, 125],
    "actual_sel_seq_kvlen": [16, 32],
}
SELECT = {
    "query": zeros(3, 4, 192),
    "key": zeros(2112, 2, 192),
    "value": zeros(2112, 2, 128),
    "topk_indices": ids(3, 2),
    "scale_value": 0.1,
    "head_num": 4,
    "select_block_size": 64,
    "select_block_count": 16,
    "actual_seq_qlen": [1, 3],
    "actual_seq_kvlen": [1024, 2112],
}
WINDOW = {
    "query": zeros(6, 4, 24),
    "key": zeros(9, 2, 24),
    "value": zeros(9, 2, 8),
    "scale_value": 0.2,
    "head_num": 4,
    "window_size": 3,
    "actual_seq_qlen": [2, 6],
    "actual_seq_kvlen": [4, 9],
}
OPS = {
    "npu_nsa_compress": COMPRESS,
    "npu_nsa_compress_attention": COMPRESS_ATTENTION,
    "npu_nsa_select_attention": SELECT,
    "sliding_window_attention": WINDOW,
}


def call(name, **changes):
    return getattr(ops, name)(**(OPS[name] | changes))


def refused(name, words, **changes):
    """The call is refused in one line that names the operator, what was given, what is allowed, and where that stands."""
    with pytest.raises(ValueError) as error:
        call(name, **changes)
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert "; allowed: " in message
    assert "section" in message or "page" in message or "document" in message
    for word in words:
        assert word in message


def test_what_the_tables_start_from_is_taken():
    assert call("npu_nsa_compress").shape == (3, 2, 16)
    shapes = [tuple(out.shape) for out in call("npu_nsa_compress_attention")]
    assert shapes == [(5, 4, 16), (5, 2, 16), (5, 4, 8), (5, 4, 8)]
    assert [tuple(out.shape) for out in call("npu_nsa_select_attention")] == [(3, 4, 128), (3, 4, 8), (3, 4, 8)]
    assert call("sliding_window_attention").shape == (6, 4, 8)


# ---- npu_nsa_compress


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": zeros(70, 2, 16, dtype=torch.float32)}, ["input is torch.float32", "torch.bfloat16 or torch.float16"]),
        ({"weight": zeros(32, 2, dtype=torch.float16)}, ["input torch.bfloat16", "weight torch.float16", "one type"]),
        ({"input": zeros(70, 32)}, ["input is [70, 32]", "[T, N, D]"]),
        ({"input": zeros(0, 2, 16)}, ["input is [0, 2, 16]", "not empty"]),
        ({"weight": zeros(32)}, ["weight is [32]", "[compress_block_size, N]"]),
        ({"weight": zeros(16, 2)}, ["weight is [16, 2]", "[32, 2]"]),
        ({"weight": zeros(32, 1)}, ["weight is [32, 1]", "[32, 2]"]),
        ({"weight": zeros(40, 2), "compress_block_size": 40}, ["compress_block_size is 40", "multiple of 16", "128"]),
        ({"weight": zeros(144, 2), "compress_block_size": 144}, ["compress_block_size is 144", "128"]),
        ({"compress_stride": 8}, ["compress_stride is 8", "multiple of 16"]),
        ({"compress_stride": 0}, ["compress_stride is 0", "16"]),
        ({"compress_stride": 48}, ["compress_stride is 48", "compress_block_size 32"]),
        ({"input": zeros(70, 129, 16), "weight": zeros(32, 129)}, ["N = 129", "128"]),
        ({"input": zeros(70, 2, 24)}, ["D = 24", "multiple of 16"]),
        ({"input": zeros(70, 2, 272)}, ["D = 272", "256"]),
        ({"actual_seq_len": [31, 50, 70]}, ["[31, 50, 70]", "no sample of 32 tokens", "empty"]),
    ],
)
def test_compress_refuses(changes, words):
    refused("npu_nsa_compress", words, **changes)


# ---- npu_nsa_compress_attention


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": zeros(5, 4, 32, dtype=torch.float64)}, ["query is torch.float64", "torch.bfloat16 or torch.float16"]),
        ({"value": zeros(125, 2, 16, dtype=torch.int32)}, ["value is torch.int32"]),
        ({"key": zeros(125, 2, 32, dtype=torch.float16)}, ["types differ", "key torch.float16"]),
        ({"query": zeros(5, 128)}, ["query is [5, 128]", "[T1, N1, D1]"]),
        ({"key": zeros(0, 2, 32)}, ["key is [0, 2, 32]", "not empty"]),
        ({"key": zeros(125, 2, 48)}, ["query has D1 = 32", "key 48"]),
        ({"value": zeros(125, 1, 16)}, ["key is [125, 2, 32]", "value [125, 1, 16]"]),
        ({"value": zeros(124, 2, 16)}, ["value [124, 2, 16]", "the same tokens"]),
        ({"value": zeros(125, 2, 48)}, ["D1 = 32, D2 = 48", "D2 <= D1"]),
        ({"query": zeros(5, 4, 800), "key": zeros(125, 2, 800)}, ["D1 = 800", "768"]),
        ({"query": zeros(5, 3, 32), "head_num": 3}, ["N1 = 3", "N2 = 2", "multiple"]),
        ({"head_num": 8}, ["head_num is 8", "N1 = 4"]),
        ({"query": zeros(5, 6, 32), "head_num": 6}, ["N1 / N2 = 3", "divisor of 128"]),
        ({"query": zeros(5, 256, 32), "head_num": 256}, ["N1 / N2 = 128", "below 128"]),
        ({"compress_block_size": 64}, ["compress_block_size is 64", "allowed: 32"]),
        ({"compress_stride": 32}, ["compress_stride is 32", "allowed: 16"]),
        ({"select_block_size": 128}, ["select_block_size is 128", "allowed: 64"]),
        ({"select_block_count": 8}, ["select_block_count is 8", "allowed: 16"]),
        ({"actual_seq_qlen": [2, 4, 5]}, ["actual_seq_qlen 3", "actual_cmp_seq_kvlen 2", "numbers of samples"]),
        ({"actual_sel_seq_kvlen": [32]}, ["actual_sel_seq_kvlen 1", "numbers of samples"]),
        ({"actual_sel_seq_kvlen": [16, 33]}, ["sample 1", "17 blocks", "64 compressed tokens", "ceil(64 / 4) = 16"]),
        (
            {"actual_cmp_seq_kvlen": [60, 125], "actual_sel_seq_kvlen": [15, 32]},
            ["sample 0 has 15 blocks", "60 compressed tokens", "992 tokens"],
        ),
        ({"atten_mask": zeros(3, 64)}, ["atten_mask is torch.bfloat16", "torch.bool or torch.uint8"]),
        ({"atten_mask": zeros(1, 3, 64, dtype=torch.bool)}, ["atten_mask is torch.bool [1, 3, 64]", "2-D"]),
        ({"atten_mask": zeros(3, 65, dtype=torch.bool)}, ["atten_mask is [3, 65]", "exactly [3, 64]"]),
        ({"atten_mask": zeros(5, 64, dtype=torch.bool)}, ["atten_mask is [5, 64]", "exactly [3, 64]"]),
        ({"topk_mask": zeros(3, 17, dtype=torch.uint8)}, ["topk_mask is [3, 17]", "exactly [3, 16]"]),
        ({"topk_mask": zeros(3, 16, dtype=torch.int32)}, ["topk_mask is torch.int32", "torch.bool or torch.uint8"]),
    ],
)
def test_compress_attention_refuses(changes, words):
    refused("npu_nsa_compress_attention", words, **changes)


def test_compress_attention_refuses_a_sample_of_too_many_windows():
    key, value = zeros(14001, 1, 16), zeros(14001, 1, 16)
    lists = {"actual_seq_qlen": [1], "actual_cmp_seq_kvlen": [14001], "actual_sel_seq_kvlen": [3501]}
    changes = {"query": zeros(1, 1, 16), "key": key, "value": value, "head_num": 1, **lists}
    refused("npu_nsa_compress_attention", ["14001 compressed tokens", "14000"], **changes)


def test_compress_attention_takes_both_masks():
    masks = {"atten_mask": zeros(3, 64, dtype=torch.uint8), "topk_mask": zeros(3, 16, dtype=torch.bool)}
    masks["topk_mask"][2, 7] = True
    out = call("npu_nsa_compress_attention", **masks)
    # Packed query 4 is query 2 of the second sample; all scores but the last block's are equal.
    assert out[1][4, 0].tolist() == [7, *range(7), *range(8, 16)]


# ---- npu_nsa_select_attention


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": zeros(2112, 2, 128, dtype=torch.int32)}, ["value is torch.int32", "torch.bfloat16 or torch.float16"]),
        ({"query": zeros(3, 4, 192, dtype=torch.float32)}, ["query is torch.float32"]),
        ({"query": zeros(3, 4, 192, dtype=torch.float16)}, ["types differ", "query torch.float16"]),
        ({"query": zeros(3, 768)}, ["query is [3, 768]", "[T1, N1, D1]"]),
        ({"query": zeros(0, 4, 192)}, ["query is [0, 4, 192]", "not empty"]),
        ({"query": zeros(3, 4, 128), "key": zeros(2112, 2, 128)}, ["D1 = 128, D2 = 128", "D1 = 192, D2 = 128"]),
        ({"value": zeros(2112, 2, 192)}, ["D1 = 192, D2 = 192", "D1 = 192, D2 = 128"]),
        ({"select_block_size": 32}, ["select_block_size is 32", "allowed: 64"]),
        ({"select_block_count": 8}, ["select_block_count is 8", "allowed: 16"]),
        ({"head_num": 2}, ["head_num is 2", "N1 = 4"]),
        ({"query": zeros(3, 5, 192), "head_num": 5}, ["N1 = 5", "N2 = 2"]),
        ({"query": zeros(3, 66, 192), "head_num": 66}, ["N1 / N2 = 33", "at most 32"]),
        ({"topk_indices": ids(3, 2, dtype=torch.int64)}, ["topk_indices is torch.int64", "torch.int32"]),
        ({"topk_indices": ids(3, 4)}, ["topk_indices is [3, 4, 16]", "[3, 2, 16]"]),
        ({"topk_indices": ids(3, 2)[..., :15]}, ["topk_indices is [3, 2, 15]"]),
        ({"topk_indices": ids(3, 2) - 1}, ["topk_indices of sample 0", "between -1 and 14", "0 to 15"]),
        (
            {"topk_indices": ids(3, 2) + torch.tensor([0, 0, 2]).int()[:, None, None]},
            ["sample 1", "between 0 and 17", "0 to 16"],
        ),
        ({"atten_mask": zeros(2048, 2048)}, ["atten_mask is torch.bfloat16", "torch.bool or torch.uint8"]),
        ({"atten_mask": zeros(1, 1, 4, 4, dtype=torch.bool)}, ["atten_mask is torch.bool [1, 1, 4, 4]", "2-D"]),
        ({"actual_seq_qlen": [3]}, ["actual_seq_qlen 1", "actual_seq_kvlen 2", "numbers of samples"]),
        ({"actual_seq_qlen": [0, 3]}, ["sample 0 has 0 query tokens"]),
        ({"actual_seq_kvlen": [960, 2112]}, ["sample 0 has 960 key tokens", "multiple of 64 from 1024"]),
        ({"actual_seq_kvlen": [1030, 2112]}, ["sample 0 has 1030 key tokens", "multiple of 64"]),
    ],
)
def test_select_refuses(changes, words):
    refused("npu_nsa_select_attention", words, **changes)


def test_select_refuses_too_many_heads():
    many = {"query": zeros(3, 130, 192), "key": zeros(2112, 65, 192), "value": zeros(2112, 65, 128)}
    refused("npu_nsa_select_attention", ["N1 = 130", "128"], **many, head_num=130, topk_indices=ids(3, 65))


def test_select_refuses_a_sample_too_long():
    tokens = 128 * 1024 + 64
    lists = {"actual_seq_qlen": [1], "actual_seq_kvlen": [tokens]}
    changes = {"query": zeros(1, 1, 192), "head_num": 1, "topk_indices": ids(1, 1), **lists}
    changes |= {"key": zeros(1, 1, 192).expand(tokens, 1, 192), "value": zeros(1, 1, 128).expand(tokens, 1, 128)}
    refused("npu_nsa_select_attention", [f"{tokens} key tokens", "131072"], **changes)


def test_select_takes_the_last_block_of_a_sample():
    """The page's upper bound, S / 64, is one past the last block."""
    last = ids(3, 2) + torch.tensor([0, 1, 1]).int()[:, None, None]
    assert call("npu_nsa_select_attention", topk_indices=last)[0].shape == (3, 4, 128)


def test_a_mask_switches_causality_whatever_it_holds():
    ones = {"query": torch.ones_like(SELECT["query"]), "key": torch.randn(SELECT["key"].shape).to(HALF)}
    value = torch.randn(SELECT["value"].shape).to(HALF)
    outs = [
        call("npu_nsa_select_attention", **ones, value=value, atten_mask=mask)[0]
        for mask in (None, zeros(2, 2, dtype=torch.bool), torch.ones(2048, 2048, dtype=torch.uint8))
    ]
    assert torch.equal(outs[1], outs[2])
    # The first query of a sample sees its first key alone.
    assert torch.equal(outs[1][0, 0], value[0, 0])
    assert not torch.equal(outs[0][0, 0], value[0, 0])


# ---- sliding_window_attention


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": zeros(6, 4, 24, dtype=torch.float32)}, ["query is torch.float32"]),
        ({"key": zeros(9, 2, 24, dtype=torch.float16)}, ["types differ"]),
        ({"query": zeros(6, 4)}, ["query is [6, 4]", "[T1, N1, D1]"]),
        ({"key": zeros(9, 2, 16)}, ["query has D1 = 24", "key 16"]),
        ({"value": zeros(9, 2, 32)}, ["D1 = 24, D2 = 32", "D2 <= D1"]),
        ({"query": zeros(6, 4, 784), "key": zeros(9, 2, 784)}, ["D1 = 784", "768"]),
        ({"query": zeros(6, 3, 24), "head_num": 3}, ["N1 = 3", "N2 = 2"]),
        ({"head_num": 2}, ["head_num is 2", "N1 = 4"]),
        ({"window_size": 0}, ["window_size is 0", "at least 1"]),
        ({"window_size": -3}, ["window_size is -3"]),
        ({"actual_seq_qlen": [6]}, ["actual_seq_qlen 1", "actual_seq_kvlen 2"]),
    ],
)
def test_window_refuses(changes, words):
    refused("sliding_window_attention", words, **changes)


def test_window_refuses_too_many_heads():
    changes = {"query": zeros(6, 258, 24), "head_num": 258}
    refused("sliding_window_attention", ["N1 = 258", "256"], **changes)


def test_window_refuses_too_many_tokens():
    tokens = (1 << 20) + 1
    long = {name: zeros(1, 1, 16).expand(tokens, 1, 16) for name in ("query", "key", "value")}
    lists = {"actual_seq_qlen": [tokens], "actual_seq_kvlen": [tokens]}
    refused("sliding_window_attention", ["query has 1048577 packed tokens", "1048576"], **long, **lists, head_num=1)


# ---- sequence lists, of every operator

LISTS = [(name, key) for name, arguments in OPS.items() for key in arguments if key.startswith("actual_")]


@pytest.mark.parametrize(("name", "key"), LISTS)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda ends: None, "is missing"),
        (lambda ends: [], "empty"),
        (lambda ends: torch.tensor(ends), "is a tensor"),
        (lambda ends: [ends[1], ends[0], ends[1]], "never fall"),
        (lambda ends: [-1, *ends], "never fall"),
        (lambda ends: [ends[0] + 0.5, ends[1]], "python integers"),
        (lambda ends: [str(end) for end in ends], "python integers"),
        (lambda ends: ends[-1], "python integers"),
    ],
    ids=["none", "empty", "tensor", "falling", "negative", "fraction", "text", "number"],
)
def test_bad_list(name, key, change, word):
    refused(name, [key, word], **{key: change(OPS[name][key])})


@pytest.mark.parametrize(("name", "key"), [pair for pair in LISTS if pair[0] != "npu_nsa_compress"])
def test_too_many_samples(name, key):
    ends = OPS[name][key]
    refused(name, [key, "1025 samples", "at most 1024"], **{key: [1] * 1024 + ends[-1:]})


@pytest.mark.parametrize(("name", "key"), [pair for pair in LISTS if pair[1] != "actual_sel_seq_kvlen"])
@pytest.mark.parametrize("by", [-1, 1])
def test_list_that_does_not_end_with_the_tokens(name, key, by):
    ends = OPS[name][key]
    refused(name, [f"{key} ends with {ends[-1] + by}", f"{ends[-1]}, the tokens of"], **{key: [ends[0], ends[-1] + by]})


def test_numpy_integers_are_taken():
    ends = numpy.array(COMPRESS["actual_seq_len"])
    assert call("npu_nsa_compress", actual_seq_len=ends).shape == (3, 2, 16)
    assert call("npu_nsa_compress", actual_seq_len=list(ends)).shape == (3, 2, 16)


def test_a_leading_zero_is_an_empty_sample():
    assert torch.equal(call("npu_nsa_compress", actual_seq_len=[0, 6, 70]), call("npu_nsa_compress"))


# ---- nothing else by accident


@settings(max_examples=100, deadline=None)
@given(block=st.integers(-16, 160), stride=st.integers(-16, 160))
def test_compress_takes_exactly_the_sizes_of_its_page(block, stride):
    arguments = (zeros(200, 1, 16), zeros(max(block, 0), 1), block, stride, [200])
    allowed = block in range(16, 129, 16) and stride in range(16, block + 1, 16)
    if allowed:
        assert contract.check_compress(*arguments) == [200]
    else:
        with pytest.raises(ValueError, match=r"npu_nsa_compress: (compress_block_size|compress_stride|weight) is"):
            contract.check_compress(*arguments)


@pytest.mark.parametrize("group", range(1, 130))
def test_groups(group):
    """Divisors of 128 below 128 for compress attention, at most 32 for select."""
    query, key = zeros(5, group, 16), zeros(125, 1, 16)
    lists = [COMPRESS_ATTENTION[key] for key in COMPRESS_ATTENTION if key.startswith("actual_")]
    arguments = (query, key, key, group, (32, 16, 64, 16), None, None, *lists)
    if group in (1, 2, 4, 8, 16, 32, 64):
        assert contract.check_compress_attention(*arguments) == tuple(lists)
    else:
        with pytest.raises(ValueError, match=f"N1 / N2 = {group};"):
            contract.check_compress_attention(*arguments)
    query, key, value = zeros(3, group, 192), SELECT["key"][:, :1], SELECT["value"][:, :1]
    arguments = (query, key, value, ids(3, 1), group, 64, 16, None, [1, 3], [1024, 2112])
    if group <= 32:
        assert contract.check_select_attention(*arguments) == ([1, 3], [1024, 2112])
    else:
        with pytest.raises(ValueError, match="at most 32"):
            contract.check_select_attention(*arguments)


def test_only_half_types_are_taken():
    taken = []
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int8,
        torch.bool,
        torch.complex64,
    ):
        changes = {name: WINDOW[name].to(dtype) for name in ("query", "key", "value")}
        try:
            call("sliding_window_attention", **changes)
        except ValueError as error:
            assert f"query is {dtype}" in str(error)
        else:
            taken.append(dtype)
    assert taken == [torch.float16, torch.bfloat16]
    for mixed in itertools.permutations([torch.float16, torch.bfloat16, torch.bfloat16]):
        changes = {name: WINDOW[name].to(dtype) for name, dtype in zip(("query", "key", "value"), mixed, strict=True)}
        refused("sliding_window_attention", ["types differ"], **changes)


@pytest.mark.parametrize("name", OPS)
def test_sequence_lists_and_masks_are_keywords(name):
    """As in torch_npu's schemas: what follows the sizes cannot be given by position."""
    with pytest.raises(TypeError, match="positional"):
        getattr(ops, name)(*OPS[name].values())
