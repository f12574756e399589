"""What a layer asks of the device: which calls with which arguments, and how much beside them."""

import pytest
import torch

from mindspeed_nsa import NativeSparseAttention, NSAConfig
from mindspeed_nsa.ops import ascend
from mindspeed_nsa.ops.ascend import operators

pytestmark = pytest.mark.emulated
torch_npu = pytest.importorskip("torch_npu")
device = pytest.importorskip("tests.emulated_cann.device")

WIDE = (192, 128)
OPERATORS = [
    "aclnnNsaCompress",
    "aclnnNsaCompress",
    "aclnnNsaCompressAttention",
    "aclnnNsaSelectedAttention",
    "aclnnFlashAttentionVarLenScore",
]
GRADIENTS = [
    "aclnnFlashAttentionUnpaddingScoreGrad",
    "aclnnFlashAttentionUnpaddingScoreGrad",
    "aclnnNsaCompressGrad",
    "aclnnNsaCompressGrad",
    "aclnnNsaSelectedAttentionGrad",
]


class Layer:
    """A block in the middle of a run: everything that lengths alone decide is there."""

    def __init__(self, ends, heads, kv_heads, dims):
        self.ends, tokens = ends, ends[-1]
        self.nsa = NativeSparseAttention(NSAConfig(), heads, kv_heads, *dims).bfloat16().npu()
        shapes = [(heads, dims[0]), *[(kv_heads, dims[0])] * 3, *[(kv_heads, dims[1])] * 3, (heads, 3)]
        self.tensors = [torch.randn(tokens, *shape).bfloat16().npu().requires_grad_() for shape in shapes]
        self.grad = torch.randn(tokens, heads, dims[1]).bfloat16().npu()
        self.forward().backward(self.grad)
        for tensor in (*self.tensors, *self.nsa.parameters()):
            tensor.grad = None

    def forward(self):
        query, *keys_values, gate = self.tensors
        return self.nsa(query, keys_values[:3], keys_values[3:], gate, self.ends)

    def logs(self):
        with device.record() as forward:
            out = self.forward()
        with device.record() as backward:
            out.backward(self.grad)
        return forward, backward


def operators_of(log):
    return sorted(event.name for event in log.events if event.kind == "ascend")


def beside(log):
    counts = log.counts()
    assert {kind: counts[kind] for kind in counts if kind not in ("ascend", "aten", "view") and counts[kind]} == {}, log.table()
    return counts["aten"], counts["view"]


@pytest.mark.parametrize("dims", [WIDE, (128, 128), (64, 64)], ids=str)
def test_a_layer_makes_few_other_calls_and_waits_for_nothing(dims):
    """At most 40 aten operators forward and 60 backward, views counted; no copy between host and device, no wait."""
    forward, backward = Layer([2048], 4, 1, dims).logs()
    assert operators_of(forward) == sorted(OPERATORS)
    assert operators_of(backward) == GRADIENTS
    assert sum(beside(forward)) <= 40, forward.table()
    assert sum(beside(backward)) <= 60, backward.table()


def test_packed_samples_make_more_calls_but_wait_for_nothing():
    """Short and ragged samples: one dense attention, and the rows of both ways taken apart and put together."""
    forward, backward = Layer([100, 1400, 2448], 4, 1, WIDE).logs()
    assert operators_of(forward) == sorted([*OPERATORS, "aclnnFlashAttentionVarLenScore"])
    assert operators_of(backward) == sorted([*GRADIENTS, "aclnnFlashAttentionUnpaddingScoreGrad"])
    assert beside(forward)[0] <= 40, forward.table()
    assert beside(backward)[0] <= 60, backward.table()


def test_a_second_layer_makes_nothing_that_lengths_decide():
    """Neither masks nor lists of rows: on the device they are the first layer's."""
    layer = Layer([1100, 2300], 2, 1, WIDE)
    forward, backward = layer.logs()
    names = {event.name for log in (forward, backward) for event in log.events}
    assert not {name for name in names if name.startswith(("aten::arange", "aten::triu", "aten::ones", "aten::cumsum"))}
    first, second = layer.logs(), layer.logs()
    assert [log.table() for log in first] == [log.table() for log in second]


def test_masks_are_shared_and_of_the_size_that_the_kernel_assumes():
    """One byte a query and window, and a query and block, for the longest sample: once for all layers."""
    layers = [Layer([1100, 2300], 2, 1, WIDE) for _ in range(2)]
    logs = [layer.logs()[0] for layer in layers]
    masks = [log.calls("aclnnNsaCompressAttention")[0] for log in logs]
    assert {str(call["atten_mask"]) for call in masks} == {str(((1200, 74), torch.bool))}
    assert {str(call["topk_mask"]) for call in masks} == {str(((1200, 19), torch.bool))}
    assert ascend.masks.cache_info().currsize <= 4
    hits = ascend.masks.cache_info().hits
    layers[0].logs()
    assert ascend.masks.cache_info().hits == hits + 2


# ---- the gradient calls are those of torch_npu's own derivatives

ENDS, WINDOWS, BLOCKS, SCALE = [1024, 2112], [63, 130], [16, 33], 0.07


def draw(*shape):
    return torch.randn(*shape).bfloat16().npu().requires_grad_()


def compress():
    inputs = draw(2112, 1, 192), draw(32, 1)
    out = torch_npu.npu_nsa_compress(*inputs, 32, 16, actual_seq_len=ENDS)
    return inputs, out, lambda grad: operators.compress_grad(grad, *inputs, 32, 16, ENDS)


def compress_attention():
    inputs = draw(2112, 2, 192), draw(130, 1, 192), draw(130, 1, 128)
    mask, forced = ascend.masks(1088, 67, 17, 1, 2, inputs[0].device)
    lists = {"actual_seq_qlen": ENDS, "actual_cmp_seq_kvlen": WINDOWS, "actual_sel_seq_kvlen": BLOCKS}
    out, _, *statistics = operators.compress_attention(*inputs, SCALE, ascend.SIZES, topk_mask=forced, atten_mask=mask, **lists)
    saved = out, *statistics, SCALE, ENDS, WINDOWS
    return inputs, out, lambda grad: operators.fusion_attention_grad(grad, *inputs, *saved, atten_mask=mask, sparse_mode=1)


def select_attention():
    inputs = draw(2112, 2, 192), draw(2112, 1, 192), draw(2112, 1, 128)
    ids = torch.arange(16, dtype=torch.int32).repeat(2112, 1, 1).npu()
    out, *statistics = operators.select_attention(*inputs, ids, SCALE, ENDS, ENDS, True)
    saved = ids, out, *statistics, SCALE, ENDS, ENDS, True
    return inputs, out, lambda grad: operators.select_attention_grad(grad, *inputs, *saved)


def window_attention():
    inputs = draw(2112, 2, 192), draw(2112, 1, 192), draw(2112, 1, 128)
    how = {"atten_mask": operators.triangle(inputs[0].device), "sparse_mode": 4, "reach": 511}
    out, *statistics = operators.fusion_attention(*inputs, SCALE, ENDS, ENDS, **how)
    saved = out, *statistics, SCALE, ENDS, ENDS
    return inputs, out, lambda grad: operators.fusion_attention_grad(grad, *inputs, *saved, **how)


@pytest.mark.parametrize("operator", [compress, compress_attention, select_attention, window_attention])
def test_backward_calls_what_torch_npu_s_autograd_calls(operator):
    """The same operator, with the same arguments, to the same gradients.

    `softmax_in` apart: nothing was saved in it, and torch_npu hands over that nothing as an empty tensor or as None.
    """
    inputs, out, backward = operator()
    grad = draw(*out.shape).detach()
    with device.record() as theirs:
        expected = torch.autograd.grad(out, inputs, grad)
    with torch.no_grad(), device.record() as ours:
        found = backward(grad)
    called, wanted = ([event for event in log.events if event.kind == "ascend"] for log in (ours, theirs))
    assert [event.name for event in called] == [event.name for event in wanted]
    nothing = {"softmax_in": None}
    assert [event.arguments | nothing for event in called] == [event.arguments | nothing for event in wanted]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
