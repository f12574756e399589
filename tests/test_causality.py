"""To the bit: no token feels a later one, no sample feels another, in outputs and in gradients."""

import oracle
import pytest
import torch
from blocks import CHIP, SMALL, inputs_of, leaves, make, only

PERTURBED = ("query", "key", "value", "gate", "all")
LAST_KEPT = [0, 1, 3, 7, 30, 39, 40, 63, 64, 73, 81]


def perturbed(inputs, what, first, last, amount):
    """Copies of the inputs in which tokens `first` to `last` (exclusive) are others."""

    def change(tensor, name):
        tensor = tensor.detach().clone()
        if what in (name, "all"):
            tensor[first:last] = tensor[first:last] * -amount + amount
        return tensor.requires_grad_()

    query, keys, values, gate = inputs
    keys, values = tuple(change(x, "key") for x in keys), tuple(change(x, "value") for x in values)
    return change(query, "query"), keys, values, change(gate, "gate")


def outputs_and_gradients(nsa, inputs, ends, rows):
    """All outputs, and the gradients of a loss over the outputs of `rows`."""
    out = nsa(*inputs, ends)
    weight = torch.linspace(-1, 2, out[rows].numel(), dtype=out.dtype).view_as(out[rows])
    tensors = leaves(nsa, *inputs)
    gradients = torch.autograd.grad((out[rows] * weight).sum(), tensors, allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, gradients, strict=True)]


def assert_causal(nsa, inputs, ends, kept, what, amount, stop):
    """Tokens `kept` to `stop` (exclusive) change: nothing before may, in outputs or in gradients."""
    rows = slice(0, kept)
    out, gradients = outputs_and_gradients(nsa, inputs, ends, rows)
    other, other_gradients = outputs_and_gradients(nsa, perturbed(inputs, what, kept, stop, amount), ends, rows)
    assert torch.equal(out[:kept], other[:kept])
    parameters = len(list(nsa.parameters()))
    for a, b in zip(gradients[:-parameters], other_gradients[:-parameters], strict=True):
        assert torch.equal(a[:kept], b[:kept])
        assert not a[kept:].any()
        assert not b[kept:].any()
    for a, b in zip(gradients[-parameters:], other_gradients[-parameters:], strict=True):
        assert torch.equal(a, b)
    return out, other


@pytest.mark.parametrize("compression", ["linear", "mlp"])
@pytest.mark.parametrize("what", PERTURBED)
def test_causal(what, compression, backend):
    """Small sizes, packed samples, every edge: of a window, a block, the budget, a sample."""
    nsa = make(SMALL | {"backend": backend, "compression": compression}, dtype=torch.float32)
    inputs, ends = inputs_of(nsa, 90, torch.float32), [1, 41, 82, 90]
    for t in LAST_KEPT:
        out, other = assert_causal(nsa, inputs, ends, t + 1, what, 1.0, t + 2)
        # A softmax over one key, at the first token of a sample, feels neither query nor key, but for rounding.
        same = torch.allclose(out[t + 1], other[t + 1], rtol=1e-5, atol=1e-6)
        assert same == (what in ("query", "key") and t + 1 in (1, 41, 82))


@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_causal_to_huge_values(what, backend):
    nsa = make(SMALL | {"backend": backend}, dtype=torch.float32)
    inputs, ends = inputs_of(nsa, 90, torch.float32), [1, 41, 82, 90]
    for t in LAST_KEPT:
        assert_causal(nsa, inputs, ends, t + 1, what, 1e30, 90)


def test_causal_to_a_key_whose_logits_overflow(backend):
    """All inputs are finite; the logit of a masked key is not."""
    nsa = make(SMALL | {"backend": backend}, dtype=torch.float32)
    inputs, ends = inputs_of(nsa, 90, torch.float32), [90]
    changed = perturbed(inputs, "key", 41, 42, 3e37)
    changed = (changed[0].detach() * 1e3, *changed[1:])
    kept = (inputs[0].detach() * 1e3, *inputs[1:])
    assert torch.equal(nsa(*kept, ends)[:41], nsa(*changed, ends)[:41])


@pytest.mark.parametrize("branch", range(3), ids=["compress", "select", "window"])
def test_each_branch_is_causal(branch):
    nsa = make(SMALL, dtype=torch.float32)
    query, keys, values, gate = inputs_of(nsa, 90, torch.float32)
    inputs, ends = (query, keys, values, only(branch, gate)), [1, 41, 82, 90]
    for t in LAST_KEPT:
        for what in ("query", "key", "value"):
            assert_causal(nsa, inputs, ends, t + 1, what, 1.0, 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_at_the_sizes_of_the_chip(dtype, backend):
    nsa = make(CHIP | {"backend": backend}, dtype=dtype)
    inputs, ends = inputs_of(nsa, 1300, dtype), [1230, 1300]
    for t in (30, 31, 63, 64, 1023, 1024, 1086, 1087, 1200):
        assert_causal(nsa, inputs, ends, t + 1, "all", 1.0, t + 2)


def test_samples_do_not_mix(backend):
    """Changing one sample changes no bit of another, nor of its gradients."""
    nsa = make(SMALL | {"backend": backend}, dtype=torch.float32)
    ends = [1, 41, 43, 90]
    inputs = inputs_of(nsa, 90, torch.float32)
    for start, stop in oracle.spans(ends):
        others = torch.tensor([t for t in range(90) if not start <= t < stop])
        out, gradients = outputs_and_gradients(nsa, inputs, ends, others)
        other, other_gradients = outputs_and_gradients(nsa, perturbed(inputs, "all", start, stop, 3.0), ends, others)
        assert torch.equal(out[others], other[others])
        assert not torch.equal(out[start:stop], other[start:stop])
        for a, b in zip(gradients[:8], other_gradients[:8], strict=True):
            assert torch.equal(a[others], b[others])
            assert not b[start:stop].any()


def test_packed_samples_are_those_alone():
    nsa = make(SMALL)
    inputs, ends = inputs_of(nsa, 90), [1, 41, 43, 90]
    packed = nsa(*inputs, ends)
    for start, stop in oracle.spans(ends):
        cut = [x[start:stop] if isinstance(x, torch.Tensor) else [y[start:stop] for y in x] for x in inputs]
        torch.testing.assert_close(packed[start:stop], nsa(*cut), rtol=1e-12, atol=1e-12)


def test_same_bits_each_time(backend):
    nsa = make(SMALL | {"backend": backend}, dtype=torch.float32)
    inputs = inputs_of(nsa, 90, torch.float32)
    (out, gradients), (again, gradients_again) = (outputs_and_gradients(nsa, inputs, [90], slice(None)) for _ in range(2))
    assert torch.equal(out, again)
    assert all(map(torch.equal, gradients, gradients_again))
