"""The emulated device itself: what torch_npu asks of it, what it counts, how it fails."""

import pytest
import torch

pytestmark = pytest.mark.emulated
torch_npu = pytest.importorskip("torch_npu")
device = pytest.importorskip("tests.emulated_cann.device")

LENGTHS = [1024, 2048]
SELECT = {"actual_seq_qlen": LENGTHS, "actual_seq_kvlen": LENGTHS}


def tensor(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype).npu().requires_grad_()


def select_inputs(group=4):
    ids = torch.arange(16, dtype=torch.int32).expand(2048, 1, 16).contiguous().npu()
    return tensor(2048, group, 192), tensor(2048, 1, 192), tensor(2048, 1, 128), ids


def select(query, key, value, ids, **lists):
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
    sizes = (192**-0.5, query.shape[1], 64, 16)
    return torch_npu.npu_nsa_select_attention(query, key, value, ids, *sizes, atten_mask=mask, **(lists or SELECT))


def backward(out):
    out.backward(torch.ones(out.shape, dtype=out.dtype).npu())


def described(*shape, dtype=torch.bfloat16):
    return shape, dtype


def test_counts_of_a_program_known_by_hand():
    with device.record() as log:
        x = torch.ones(64, 4, 16).bfloat16().npu()
        weight = torch.ones(32, 4, dtype=torch.bfloat16, device="npu")
        pooled = torch_npu.npu_nsa_compress(x * 2, weight, 32, 16, actual_seq_len=[64])
        values = pooled.transpose(0, 1)[1:].exp().cpu()
    assert values.shape == (3, 3, 16)
    names = [(event.kind, event.name) for event in log.events]
    assert names == [
        ("host_to_device", "aten::_to_copy"),
        ("aten", "aten::ones"),
        ("aten", "aten::mul.Tensor"),
        ("ascend", "aclnnNsaCompress"),
        ("view", "aten::transpose.int"),
        ("view", "aten::slice.Tensor"),
        ("aten", "aten::exp"),
        ("device_to_host", "aten::_to_copy"),
    ]
    asked = {"ascend": 1, "aten": 3, "synchronising": 0, "view": 2, "host_to_device": 1, "device_to_host": 1}
    assert log.counts() == asked | dict.fromkeys(
        ["collective", "device_to_device", "stream_syncs", "device_syncs", "event_syncs"], 0
    )


def test_waits_are_seen():
    x = torch.arange(8.0).npu()
    with device.record() as log:
        assert x.sum().item() == 28
        assert x.nonzero().shape == (7, 1)
        assert x[x > 3].shape == (4,)
        assert not torch.equal(x, torch.where(x > 3, x, x[x.int()] + 1))
        torch.npu.synchronize()
    waits = [event.name for event in log.events if event.kind == "synchronising"]
    assert waits == ["aten::_local_scalar_dense", "aten::nonzero", "aten::index.Tensor", "aten::equal"]
    assert (log.counts()["device_to_host"], log.counts()["device_syncs"]) == (1, 1)


def test_fresh_memory_is_nan_and_draws_do_not_touch_the_host():
    assert torch.empty(1000, device="npu").isnan().all().item()
    torch.manual_seed(3)
    plain = torch.randn(4)
    torch.manual_seed(3)
    first, second = torch.randn(4, device="npu"), torch.randn(4, device="npu")
    assert torch.equal(torch.randn(4), plain)
    assert not torch.equal(first.cpu(), second.cpu())


def test_gradients_of_aten_match_the_host():
    a, b = torch.randn(3, 5, 7), torch.randn(7, 2)
    found = [x.npu().requires_grad_() for x in (a, b)]
    expected = [x.clone().requires_grad_() for x in (a, b)]
    for x, y in (found, expected):
        (torch.cat([x @ y, (x @ y[:, 0]).unsqueeze(-1)], -1).softmax(-1) ** 2).sum().backward()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad)


def test_autograd_calls_the_gradient_of_compress():
    x, weight = tensor(64, 4, 16), tensor(32, 4)
    with device.record() as log:
        backward(torch_npu.npu_nsa_compress(x, weight, 32, 16, actual_seq_len=[64]))
    (call,) = log.calls("aclnnNsaCompressGrad")
    assert call == {
        **{"grad": described(3, 4, 16), "input": described(64, 4, 16), "weight": described(32, 4), "actual_seq_len": [64]},
        **{"compress_block_size": 32, "compress_stride": 16, "actual_seq_len_type": 0, "layout": "TND"},
        **{"input_grad": described(64, 4, 16), "weight_grad": described(32, 4)},
    }


def test_autograd_calls_the_gradient_of_select():
    """Contract, section 3: both directions are told to be causal, whatever the mask."""
    query, key, value, ids = select_inputs()
    with device.record() as log:
        backward(select(query, key, value, ids)[0])
    (forward,), (call,) = log.calls("aclnnNsaSelectedAttention"), log.calls("aclnnNsaSelectedAttentionGrad")
    settings = {"scale": 192**-0.5, "head_num": 4, "layout": "TND", "sparse_mode": 2, **SELECT}
    settings |= {"select_block_size": 64, "select_block_count": 16, "topk_indices": described(2048, 1, 16, dtype=torch.int32)}
    for arguments in (forward, call):
        assert settings.items() <= arguments.items()
        assert arguments["softmax_sum"] == described(2048, 4, 8, dtype=torch.float32)
    assert call["atten_mask"] == described(2048, 2048, dtype=torch.bool)
    assert call["grad"] == call["attention"] == described(2048, 4, 128)
    assert (call["query_grad"], call["value_grad"]) == (described(2048, 4, 192), described(2048, 1, 128))


def test_autograd_calls_the_gradient_of_fusion_attention():
    """Contract, section 2.4 for the compressed branch, section 4 for the window."""
    lists = {"actual_seq_qlen": [1024], "actual_cmp_seq_kvlen": [63], "actual_sel_seq_kvlen": [16]}
    query, key, value = tensor(1024, 4, 192), tensor(63, 1, 192), tensor(63, 1, 128)
    visible = torch.arange(63).npu() * 16 + 31 > torch.arange(1024).npu()[:, None]
    visible[:31, 0] = False
    with device.record() as log:
        compressed = torch_npu.npu_nsa_compress_attention(
            *(query, key, value, 192**-0.5, 4, 32, 16, 64, 16), atten_mask=visible, **lists
        )
        backward(compressed[0])
        window = {"atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu(), "scale": 0.5, "sparse_mode": 4}
        window |= {"pre_tockens": 511, "next_tockens": 0, "actual_seq_qlen": [1024], "actual_seq_kvlen": [1024]}
        keys, values = tensor(1024, 1, 192), tensor(1024, 1, 128)
        backward(torch_npu.npu_fusion_attention(query, keys, values, 4, "TND", **window)[0])
    of_compressed, of_window = log.calls("aclnnFlashAttentionUnpaddingScoreGrad")
    assert log.calls("aclnnNsaCompressAttention")[0]["sparse_mode"] == of_compressed["sparse_mode"] == 1
    unlimited = {"pre_tokens": 2147483647, "next_tokens": 2147483647, "keep_prob": 1.0, "head_num": 4, "layout": "TND"}
    assert (unlimited | {"actual_seq_qlen": [1024], "actual_seq_kvlen": [63]}).items() <= of_compressed.items()
    assert of_compressed["atten_mask"] == described(1024, 63, dtype=torch.bool)
    assert of_compressed["softmax_max"] == of_compressed["softmax_sum"] == described(1024, 4, 8, dtype=torch.float32)
    banded = {"pre_tokens": 511, "next_tokens": 0, "sparse_mode": 4, "scale": 0.5, "actual_seq_kvlen": [1024]}
    assert banded.items() <= of_window.items()
    assert banded.items() <= log.calls("aclnnFlashAttentionVarLenScore")[0].items()


def test_a_refusal_of_the_host_arrives_with_its_message():
    with pytest.raises(RuntimeError, match="aclnnNsaSelectedAttention refused: "):
        select(*select_inputs(), actual_seq_qlen=LENGTHS, actual_seq_kvlen=[64, 2048])


def test_a_trap_raises_and_is_remembered():
    query, key, value, ids = select_inputs()
    with pytest.raises(RuntimeError, match="aclnnNsaSelectedAttention trapped: "):
        select(query, key, value, ids + 16)
    assert len(device.take_traps()) == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_reaches_the_kernels(wanted, monkeypatch):
    from tests.emulated_cann.kernels import KERNELS

    seen = []
    monkeypatch.setitem(KERNELS, "aclnnNsaCompress", lambda args, variants, deterministic: seen.append(deterministic))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        torch_npu.npu_nsa_compress(tensor(64, 4, 16), tensor(32, 4), 32, 16, actual_seq_len=[64])
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == [wanted]


def test_variants_reach_the_kernels():
    inputs = [x.detach() for x in select_inputs()]
    causal = select(*inputs)[0].cpu()
    with device.use_variants(forward_ignores_mask=True):
        unmasked = select(*inputs)[0].cpu()
    assert (causal[0, 0] - inputs[2][0, 0].cpu()).abs().max() == 0
    assert (unmasked[0] - causal[0]).abs().max() > 0.1
    with pytest.raises(TypeError, match="no_such_variant"), device.use_variants(no_such_variant=True):
        pass
