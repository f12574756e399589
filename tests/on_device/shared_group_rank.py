"""One of two ranks, each on an emulated device of its own, that share a key/value head: what it finds is what one device does.

Started by `test_shared_groups.py`. Every rank makes the same inputs, runs the block with all query heads, then with its own.
"""

import os
from collections import Counter

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

from tests import wire

MESSAGES = wire.watch()

from mindspeed_nsa import NativeSparseAttention, NSAConfig  # noqa: E402
from mindspeed_nsa.ops import library  # noqa: E402
from tests.emulated_cann import device  # noqa: E402

HEADS, DIMS, ENDS = 4, (192, 128), [1200, 1300, 2400]
TOKENS = ENDS[-1]
# The same layer as a job, for `mindspeed-nsa plan`.
JOB = ("model.num_layers=1", f"model.num_attention_heads={HEADS}", "model.num_query_groups=1", "model.kv_channels=192")
JOB += ("model.v_head_dim=128", f"model.seq_length={TOKENS}", "training.global_batch_size=1", "training.bf16=true")
JOB += ("parallel.tensor_model_parallel_size=2",)


def run(nsa, tensors, grad):
    """Out, then its gradients, with what both asked of the device."""
    leaves = [x.detach().npu().requires_grad_() for x in tensors]
    grad = grad.npu()
    with device.record() as forward:
        out = nsa(leaves[0], leaves[1:4], leaves[4:7], leaves[7], ENDS)
    with device.record() as backward:
        gradients = torch.autograd.grad(out, [*leaves, *nsa.parameters()], grad)
    return out, gradients, forward, backward


def close(found, expected):
    """To two bfloat16 roundings of terms as large as the largest."""
    found, expected = found.detach().cpu().float(), expected.detach().cpu().float()
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


def compare(rank):
    """Blocks, result and gradients of the own heads are those of one device; gradients of what is shared add up.

    Returns:
        What each asks of the device where all is there that lengths decide: forward and backward of one, then of the other.
    """
    torch.manual_seed(0)
    shapes = [(HEADS, DIMS[0]), *[(1, DIMS[0])] * 3, *[(1, DIMS[1])] * 3, (HEADS, 3)]
    query, *others = (torch.randn(TOKENS, *shape).bfloat16() for shape in shapes)
    tensors, grad = [3 * query, *others], torch.randn(TOKENS, HEADS, DIMS[1]).bfloat16()
    own = slice(2 * rank, 2 * rank + 2)
    whole = NativeSparseAttention(NSAConfig(), HEADS, 1, *DIMS).bfloat16().npu()
    part = NativeSparseAttention(NSAConfig(), HEADS // 2, 1, *DIMS, score_group=dist.group.WORLD).bfloat16().npu()
    part.load_state_dict(whole.state_dict())
    mine = [tensors[0][:, own], *tensors[1:7], tensors[7][:, own]]
    listed.clear()
    out, gradients, *_ = run(whole, tensors, grad)
    found, found_gradients, *_ = run(part, mine, grad[:, own])
    assert torch.equal(*listed)
    close(found, out[:, own])
    for place, (one, other) in enumerate(zip(found_gradients, gradients, strict=True)):
        if place in (0, 7):
            close(one, other[:, own])
        else:
            one = one.float()
            dist.all_reduce(one)
            close(one, other)
    MESSAGES.clear()
    return *run(whole, tensors, grad)[2:], *run(part, mine, grad[:, own])[2:]


def check_calls(alone_forward, alone_backward, forward, backward):
    """One call of the fused operator on all heads, gradients of the own ones; one message, four launches more; no wait."""
    (attention,) = forward.calls("aclnnNsaCompressAttention")
    assert attention["query"][0] == (TOKENS, HEADS, DIMS[0])
    gradients = backward.calls("aclnnFlashAttentionUnpaddingScoreGrad")
    assert {call["query"][0][1] for call in gradients} == {HEADS // 2}
    for alone, log, more in ((alone_forward, forward, {"aten": 4, "collective": 1}), (alone_backward, backward, {})):
        asked, expected = (Counter(one.counts()) for one in (log, alone))
        del asked["view"], expected["view"]
        assert +asked == expected + Counter(more), log.table()


def check_messages():
    """What was sent is what `mindspeed-nsa plan` says."""
    messages = wire.step_messages(wire.Job.read(wire.CONFIG, JOB), 2, wire.ROWS, 0)
    (planned,) = (message for message in messages if message.what == "queries of shared groups")
    ((sent, times),) = MESSAGES.items()
    assert (sent.collective, sent.ranks, sent.payload, times) == planned[2:]


def main():
    rank = int(os.environ["RANK"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    os.environ["NSA_ASCEND_PLAN"] = "A"
    check_calls(*compare(rank))
    check_messages()
    assert not scored, "blocks were scored outside of the operator"
    os.environ["NSA_ASCEND_PLAN"] = "B"
    with device.use_variants(forward_ignores_mask=True):
        compare(rank)
    assert scored
    assert not (traps := device.take_traps()), "\n".join(traps)
    dist.destroy_process_group()


listed, scored = [], []
select_attention, block_scores = library.select_attention, library.block_scores
library.select_attention = lambda *a: listed.append(a[3]) or select_attention(*a)
library.block_scores = lambda *a: scored.append(a) or block_scores(*a)
main()
