"""The operators as torch sees them: schemas, fake kernels, autograd, graphs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mindspeed_nsa import ops
from mindspeed_nsa.ops import library

ENDS, COMPRESSED_ENDS, BLOCKS = [7, 20], [2, 7], [2, 5]
COMPRESSED = (0.5, 4, 2, 4, 2, False, 0, 0, True, "ascend", ENDS, COMPRESSED_ENDS, BLOCKS, [0, 0])
BY_POSITION = (*COMPRESSED[:5], True, 1, 1, False, "paper", *COMPRESSED[10:])
SELECTED = (0.5, 4, True, False, ENDS, ENDS, [0, 0])
WINDOW = (0.5, 3, ENDS, ENDS, [0, 0])


def rand(*shape, dtype, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def transposed(tensor):
    """The same values with the heads outermost in memory, as a host that keeps [b, n, s, d] hands them over."""
    return tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(tensor.requires_grad)


def cases(dtype, backend):
    """Each registered operator, backward ones too, with arguments: (name, operator, arguments)."""
    query, key, value = rand(20, 4, 6, dtype=dtype), rand(20, 2, 6, dtype=dtype), rand(20, 2, 5, dtype=dtype)
    small = key[:7].detach().requires_grad_(), value[:7].detach().requires_grad_()
    weight = rand(4, 2, dtype=dtype)
    gated = rand(20, 4, 3, dtype=dtype), *(rand(20, 4, 5, dtype=dtype) for _ in range(3))
    ids = torch.randint(0, 2, (20, 2, 2), dtype=torch.int32)
    atten_mask, topk_mask = torch.rand(13, 5) < 0.3, torch.rand(13, 3) < 0.3
    forward = {
        "compress": (library.compress, (key, weight, 4, 2, ENDS, backend)),
        "compress_attention": (library.compress_attention, (query, *small, topk_mask, atten_mask, *COMPRESSED, backend)),
        "compress_attention by position": (library.compress_attention, (query, *small, None, None, *BY_POSITION, backend)),
        "select_attention": (library.select_attention, (query, key, value, ids, *SELECTED, backend)),
        "window_attention": (library.window_attention, (query, key, value, *WINDOW, backend)),
        "gated_sum": (library.gated_sum, (*gated, backend)),
    }
    yield from ((name, *case) for name, case in forward.items())
    q, k, v, ck, cv = (x.detach() for x in (query, key, value, *small))
    pooled = library.compress(k, weight.detach(), 4, 2, ENDS, backend)
    yield "compress_backward", library.compress_backward, (pooled, k, weight.detach(), 4, 2, ENDS, backend)
    out, _, *saved = library.compress_attention(q, ck, cv, topk_mask, atten_mask, *COMPRESSED, backend)
    arguments = (torch.ones_like(out), q, ck, cv, topk_mask, atten_mask, out, *saved, *COMPRESSED, backend)
    yield "compress_attention_backward", library.compress_attention_backward, arguments
    yield "block_scores", library.block_scores, (q, ck, *saved, 3, 17, *BY_POSITION, backend)
    out, *saved = library.select_attention(q, k, v, ids, *SELECTED, backend)
    arguments = (torch.ones_like(out), q, k, v, ids, out, *saved, *SELECTED, backend)
    yield "select_attention_backward", library.select_attention_backward, arguments
    out, *saved = library.window_attention(q, k, v, *WINDOW, backend)
    yield (
        "window_attention_backward",
        library.window_attention_backward,
        (torch.ones_like(out), q, k, v, out, *saved, *WINDOW, backend),
    )
    gated = [x.detach() for x in gated]
    yield "gated_sum_backward", library.gated_sum_backward, (torch.ones_like(gated[1]), *gated, backend)
    if (backend, dtype) in ((ONLY, x) for x in TYPES[:2]):
        operands = q, ck, cv, k, v, k, v, gated[0]
        out, *saved = library.sparse_attention(*operands, *BY_POSITION, 3, ENDS, backend)
        leaves = [x.requires_grad_() for x in (query, *small, key, value, key, value)]
        yield (
            "sparse_attention",
            library.sparse_attention,
            (*leaves, gated[0].detach().requires_grad_(), *BY_POSITION, 3, ENDS, backend),
        )
        arguments = (torch.ones_like(out), *operands, *saved, *BY_POSITION, 3, ENDS, backend)
        yield "sparse_attention_backward", library.sparse_attention_backward, arguments
    yield "checked_indices", library.checked_indices, (ids, 3, ENDS, ENDS)


ONLY = "cpu"  # has one operator for the whole
TYPES = [torch.float32, torch.bfloat16, torch.float64]
NAMES = [case[0] for case in cases(torch.float32, ONLY)]


def case(name, dtype, backend):
    for found, op, arguments in cases(dtype, backend):
        if found == name:
            return op, arguments
    assert name.startswith("sparse_attention")
    pytest.skip(f"{backend} has no operator for the whole in {dtype}")


def test_every_operator_is_here():
    defined = {name for name, op in vars(library).items() if isinstance(op, torch.library.CustomOpDef)}
    assert {name.split()[0] for name in NAMES} == defined


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(name, dtype, backend):
    op, arguments = case(name, dtype, backend)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_fake_kernels_tell_shapes_types_and_strides(name, backend):
    """Of tensors in other memory orders too: a compiled graph relies on the strides."""
    for dtype in TYPES:
        op, arguments = case(name, dtype, backend)
        for change in (lambda x: x, transposed):
            real = [change(x.detach()) if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in arguments]
            out = op(*real)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op(*(mode.from_tensor(x.detach()) if isinstance(x, torch.Tensor) else x for x in real))
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, fake)), strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_statistics_and_ids_have_no_gradient(backend):
    for name in ("compress_attention", "select_attention", "window_attention"):
        op, arguments = case(name, torch.float32, backend)
        attention, *others = op(*arguments)
        assert attention.requires_grad
        assert not any(other.requires_grad for other in others)


def test_inputs_are_not_changed(backend):
    for _, op, arguments in cases(torch.float32, backend):
        before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        op(*arguments)
        for a, b in zip(before, arguments, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- the public operators in a graph


def half(*shape):
    return torch.randn(shape).to(torch.bfloat16).requires_grad_()


def public_compress():
    def run(tokens, weight):
        return ops.npu_nsa_compress(tokens, weight, 32, 16, actual_seq_len=[6, 70])

    return run, (half(70, 2, 16), half(32, 2))


def public_compress_attention():
    lists = {"actual_seq_qlen": [2, 5], "actual_cmp_seq_kvlen": [61, 125], "actual_sel_seq_kvlen": [16, 32]}

    def run(query, key, value):
        return ops.npu_nsa_compress_attention(query, key, value, 0.2, 4, 32, 16, 64, 16, **lists)[0]

    return run, (half(5, 4, 32), half(125, 2, 32), half(125, 2, 16))


def public_select_attention():
    ids = torch.arange(16, dtype=torch.int32).repeat(2, 1, 1)

    def run(query, key, value):
        lists = {"actual_seq_qlen": [2], "actual_seq_kvlen": [1024]}
        return ops.npu_nsa_select_attention(query, key, value, ids, 0.1, 2, 64, 16, **lists)[0]

    return run, (half(2, 2, 192), half(1024, 1, 192), half(1024, 1, 128))


def public_window():
    def run(query, key, value):
        return ops.sliding_window_attention(query, key, value, 0.2, 4, 3, actual_seq_qlen=[6], actual_seq_kvlen=[9])

    return run, (half(6, 4, 24), half(9, 2, 24), half(9, 2, 8))


@pytest.mark.parametrize("public", [public_compress, public_compress_attention, public_select_attention, public_window])
def test_compiled_equals_eager(public):
    """One graph, backward too. `aot_eager` traces with the fake kernels and runs without a C++ compiler."""
    run, inputs = public()
    out = run(*inputs)
    weight = torch.randn_like(out)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    same = compiled(*inputs)
    assert torch.equal(out, same)
    gradients = (torch.autograd.grad(result, inputs, weight) for result in (out, same))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_ids_are_checked_in_a_graph_too():
    query, key, value = half(1, 1, 192), half(1024, 1, 192), half(1024, 1, 128)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(ids):
        lists = {"actual_seq_qlen": [1], "actual_seq_kvlen": [1024]}
        return ops.npu_nsa_select_attention(query, key, value, ids, 0.1, 1, 64, 16, **lists)[0]

    ids = torch.arange(16, dtype=torch.int32).reshape(1, 1, 16)
    assert run(ids).shape == (1, 1, 128)
    with pytest.raises(ValueError, match="between 1 and 16"):
        run(ids + 1)
