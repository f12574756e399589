import pytest
import torch
import torch.nn.functional as F

from mindspeed_nsa import NSAConfig
from mindspeed_nsa.compression import Compression
from mindspeed_nsa.samples import Samples


def compression(kind, position=True, of_keys=False, heads=2, dim=3, window=4, stride=2):
    config = NSAConfig(
        compression=kind,
        intra_block_position=position,
        compress_block_size=window,
        compress_stride=stride,
        select_block_size=8 * window,
        strict=False,
    )
    return Compression(config, heads, dim, of_keys=of_keys)


def pool(module, tokens, ends):
    return module(tokens, Samples(tuple(ends)), "reference")


def test_linear_by_hand():
    module = compression("linear", heads=1, dim=1).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
        module.position.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1) / 10000)
    tokens = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(8, 1, 1)
    # 1..6 is a sample of two windows, 7 and 8 one of none; positions add 0.4321 to each.
    assert pool(module, tokens, [6, 8]).flatten().tolist() == pytest.approx([4321.4321, 6543.4321])


def test_mean_is_the_mean():
    module = compression("mean", position=False).double()
    assert list(module.parameters()) == []
    tokens = torch.randn(6, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(pool(module, tokens, [6]), torch.stack([tokens[:4].mean(0), tokens[2:].mean(0)]))


def test_mlp_reads_a_window_of_one_head():
    module = compression("mlp").double()
    tokens = torch.randn(9, 2, 3, dtype=torch.float64)
    pooled = pool(module, tokens, [1, 9])
    assert pooled.shape == (3, 2, 3)
    window = tokens[3:7, 1] + module.position[:, 1]
    torch.testing.assert_close(pooled[1, 1], module.down @ F.gelu(module.up @ window.flatten()))


@pytest.mark.parametrize("kind", ["linear", "mean", "mlp"])
def test_short_samples_have_no_windows(kind):
    module = compression(kind)
    tokens = torch.randn(6, 2, 3, requires_grad=True)
    pooled = pool(module, tokens, [3, 3, 6])
    assert pooled.shape == (0, 2, 3)
    pooled.sum().backward()
    assert not tokens.grad.any()


@pytest.mark.parametrize("kind", ["linear", "mean", "mlp"])
def test_type_is_that_of_the_tokens(kind):
    """Parameters may be kept in float32 while the job runs in bfloat16."""
    pooled = pool(compression(kind), torch.randn(6, 2, 3).bfloat16(), [6])
    assert (pooled.shape, pooled.dtype) == ((2, 2, 3), torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "position", "of_keys", "shapes"),
    [
        ("linear", True, False, {"weight": (4, 2), "position": (4, 2, 3)}),
        ("linear", True, True, {"weight": (4, 2)}),
        ("linear", False, False, {"weight": (4, 2)}),
        ("mean", True, False, {"position": (4, 2, 3)}),
        ("mean", True, True, {}),
        ("mlp", True, True, {"position": (4, 2, 3), "up": (3, 12), "down": (3, 3)}),
        ("mlp", False, False, {"up": (3, 12), "down": (3, 3)}),
    ],
)
def test_parameters(kind, position, of_keys, shapes):
    module = compression(kind, position, of_keys)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shapes


def test_a_position_of_pooled_keys_moves_no_softmax():
    """Why linear pooling of keys has none: it adds one vector to every compressed key."""
    module = compression("linear", of_keys=False).double()
    tokens = torch.randn(12, 2, 3, dtype=torch.float64)
    with_position = pool(module, tokens, [12])
    module.position = None
    difference = with_position - pool(module, tokens, [12])
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))


def test_initial_weights():
    module = compression("linear", heads=64, window=32, stride=16)
    assert module.weight.mean().item() == pytest.approx(1 / 32, rel=0.02)
    assert module.weight.std().item() == pytest.approx(0.1 / 32, rel=0.1)
    assert module.position.std().item() == pytest.approx(0.02, rel=0.1)
    module = compression("mlp", dim=64, window=32, stride=16)
    assert module.up.std().item() == pytest.approx((32 * 64) ** -0.5, rel=0.05)
    assert module.down.std().item() == pytest.approx(64**-0.5, rel=0.05)
