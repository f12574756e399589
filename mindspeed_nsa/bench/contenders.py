"""Who is timed: each makes, from the same inputs, a function to call and the tensors that it has gradients for.

T: tokens, D1, D2: dims of query/key and of value.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import NativeSparseAttention
from ..config import NSAConfig
from ..ops import library
from ..ops.reference import Selected, Window
from ..samples import Samples

HEADS, KV_HEADS, QK_DIM, V_DIM = 16, 1, 192, 128
SCALE = QK_DIM**-0.5
Run = Callable[[], Tensor]
Built = tuple[Run, list[Tensor]]


class Inputs(NamedTuple):
    """One causal sample, and what the branches hand to one another."""

    query: Tensor  # [T, 16, D1]
    key: Tensor  # [T, 1, D1]
    value: Tensor  # [T, 1, D2]
    gate: Tensor  # [T, 16, 3]
    block: NativeSparseAttention  # on the native kernels
    compressed: tuple[Tensor, Tensor]  # keys and values [windows, 1, D1 or D2]
    topk_indices: Tensor  # [T, 1, 16], ascending
    branches: tuple[Tensor, Tensor, Tensor]  # [T, 16, D2], to be mixed

    @property
    def samples(self) -> Samples:
        """The one sample."""
        return Samples.of(None, self.query.shape[0])


def make_inputs(tokens: int, dtype: torch.dtype) -> Inputs:
    """Random inputs, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator).to(dtype)

    query, key, value, gate = rand(HEADS, QK_DIM), rand(KV_HEADS, QK_DIM), rand(KV_HEADS, V_DIM), rand(HEADS, 3)
    block = NativeSparseAttention(NSAConfig(backend="cpu"), HEADS, KV_HEADS, QK_DIM, V_DIM).to(dtype)
    samples = Samples.of(None, tokens)
    with torch.no_grad():
        pooled = block.compress_key(key, samples, "cpu"), block.compress_value(value, samples, "cpu")
        at = block.settings(samples.whole, "cpu", query.device)
        ids = library.compress_attention(query, *pooled, None, None, *at, "cpu")[1].sort(dim=-1).values
    return Inputs(query, key, value, gate, block, pooled, ids, (rand(HEADS, V_DIM), rand(HEADS, V_DIM), rand(HEADS, V_DIM)))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


# ---- Native Sparse Attention


def nsa(inputs: Inputs) -> Built:
    """The whole block on the native kernels."""
    leaves = _leaves(inputs.query, inputs.key, inputs.value, inputs.gate)
    return lambda: inputs.block(*leaves), [*leaves, *inputs.block.parameters()]


def nsa_on_reference(inputs: Inputs) -> Built:
    """The whole block in plain PyTorch."""
    block = NativeSparseAttention(NSAConfig(backend="reference"), HEADS, KV_HEADS, QK_DIM, V_DIM).to(inputs.query.dtype)
    block.load_state_dict(inputs.block.state_dict())
    leaves = _leaves(inputs.query, inputs.key, inputs.value, inputs.gate)
    return lambda: block(*leaves), [*leaves, *block.parameters()]


def compress(inputs: Inputs) -> Built:
    """Both poolings, keys and values; the result is that of the keys, with the values' sum for its gradient."""
    key, value = _leaves(inputs.key, inputs.value)
    of_key, of_value = inputs.block.compress_key, inputs.block.compress_value

    def run() -> Tensor:
        return torch.cat([of_key(key, inputs.samples, "cpu"), of_value(value, inputs.samples, "cpu")], dim=-1)

    return run, [key, value, *of_key.parameters(), *of_value.parameters()]


def compress_attention(inputs: Inputs) -> Built:
    """Attention over compressed tokens, importance and the choice of blocks."""
    leaves = _leaves(inputs.query, *inputs.compressed)
    at = inputs.block.settings(inputs.samples.whole, "cpu", inputs.query.device)
    return lambda: library.compress_attention(*leaves, None, None, *at, "cpu")[0], leaves


def select_attention(inputs: Inputs) -> Built:
    """Attention over the chosen blocks."""
    leaves, ends = _leaves(inputs.query, inputs.key, inputs.value), [inputs.query.shape[0]]
    at = Selected(SCALE, 64, True, True, ends, ends, [0])
    return lambda: library.select_attention(*leaves, inputs.topk_indices, *at, "cpu")[0], leaves


def window_attention(inputs: Inputs, window_size: int = 512) -> Built:
    """Attention over the newest tokens."""
    leaves, ends = _leaves(inputs.query, inputs.key, inputs.value), [inputs.query.shape[0]]
    return lambda: library.window_attention(*leaves, *Window(SCALE, window_size, ends, ends, [0]), "cpu")[0], leaves


def gated_sum(inputs: Inputs) -> Built:
    """The mix of the three."""
    leaves = _leaves(inputs.gate, *inputs.branches)
    return lambda: library.gated_sum(*leaves, "cpu"), leaves


# ---- the others


def torch_flash(inputs: Inputs) -> Built:
    """PyTorch's flash attention at its best: values padded to the dim of keys, keys and values expanded over the heads."""
    leaves = _leaves(inputs.query, inputs.key, inputs.value)

    def run() -> Tensor:
        query, key = (x.transpose(0, 1)[None] for x in leaves[:2])
        value = F.pad(leaves[2], (0, QK_DIM - V_DIM)).transpose(0, 1)[None]
        heads = -1, HEADS, -1, -1
        out = F.scaled_dot_product_attention(query, key.expand(heads), value.expand(heads), is_causal=True, scale=SCALE)
        return out[0, ..., :V_DIM].transpose(0, 1)

    return run, leaves


def flex_attention(inputs: Inputs) -> Built:
    """Compiled FlexAttention over the chosen blocks, as `select_attention`; PyTorch has no backward of it on a CPU."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as attend

    tokens = inputs.query.shape[0]
    listed = torch.zeros(tokens, -(-tokens // 64), dtype=torch.bool)
    listed.scatter_(1, inputs.topk_indices[:, 0].long().clamp(max=listed.shape[1] - 1), True)

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return listed[query, key // 64] & (key <= query)

    rows = listed.view(-1, 64, listed.shape[1]).any(dim=1)  # tiles of 64 queries
    count, order = rows.sum(dim=-1).int(), (~rows).int().argsort(dim=-1, stable=True).int()
    blocks: Any = BlockMask.from_kv_blocks(
        count[None, None], order[None, None], BLOCK_SIZE=(64, 64), mask_mod=visible, seq_lengths=(tokens, tokens)
    )
    operands = [x.transpose(0, 1)[None] for x in (inputs.query, inputs.key, inputs.value)]
    compiled: Any = torch.compile(attend, dynamic=False)
    return lambda: compiled(*operands, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1), []


def lucidrains(inputs: Inputs) -> Built:
    """The layer of native-sparse-attention-pytorch with the same sizes; it has one head dim, and projections of its own."""
    from native_sparse_attention_pytorch import SparseAttention

    layer = SparseAttention(
        dim=512,
        dim_head=QK_DIM,
        heads=HEADS,
        kv_heads=KV_HEADS,
        sliding_window_size=512,
        compress_block_size=32,
        compress_block_sliding_stride=16,
        selection_block_size=64,
        num_selected_blocks=16,
        causal=True,
        use_triton_kernel=False,
    ).to(inputs.query.dtype)
    tokens = torch.randn(1, inputs.query.shape[0], 512).to(inputs.query.dtype).requires_grad_()
    return lambda: layer(tokens), [tokens, *(x for x in layer.parameters() if x.requires_grad)]


class Contender(NamedTuple):
    """Someone to time.

    Attributes:
        name: as in the tables.
        build: makes the function and its leaves; without leaves there is no backward.
        ours: of the native kernels: measured at every length, never carried from another.
        most: the longest sample that it is tried at.
    """

    name: str
    build: Callable[[Inputs], Built]
    ours: bool = False
    most: int = 1 << 30


def contenders() -> list[Contender]:
    """All that can run here."""
    found = [
        Contender("NSA, whole", nsa, ours=True),
        Contender("compress", compress, ours=True),
        Contender("compress attention, top-k", compress_attention, ours=True),
        Contender("select attention", select_attention, ours=True),
        Contender("window attention", window_attention, ours=True),
        Contender("gated sum", gated_sum, ours=True),
        Contender("torch flash attention", torch_flash),
        Contender("flex_attention, chosen blocks", flex_attention, most=8192),
        Contender("NSA, reference", nsa_on_reference, most=8192),
    ]
    if importlib.util.find_spec("native_sparse_attention_pytorch"):
        found.append(Contender("native-sparse-attention-pytorch", lucidrains, most=2048))
    return found


def why_not() -> list[str]:
    """Who is missing here, and why."""
    if importlib.util.find_spec("native_sparse_attention_pytorch"):
        return []
    return ["native-sparse-attention-pytorch is not installed: pip install 'mindspeed_nsa[bench]'"]


def check(dtype: torch.dtype, tokens: int = 1536) -> None:
    """Hold those that compute the same to each other, before anything is timed.

    Raises:
        RuntimeError: results differ by more than roundings of the type and blocks of nearly equal scores.
    """
    inputs = make_inputs(tokens, dtype)
    pairs: list[tuple[str, Built, Built]] = [
        ("NSA and its reference", nsa(inputs), nsa_on_reference(inputs)),
        ("a window over all tokens and torch flash attention", window_attention(inputs, tokens), torch_flash(inputs)),
        ("select attention and flex_attention", select_attention(inputs), flex_attention(inputs)),
    ]
    for what, (run, leaves), (other, other_leaves) in pairs:
        results = [run()], [other()]
        if leaves and other_leaves:
            for found, of in zip(results, (leaves, other_leaves), strict=True):
                grad = torch.linspace(-1, 1, found[0].numel()).view_as(found[0]).to(dtype)
                found += torch.autograd.grad(found[0], of, grad)
        for a, b in zip(*results, strict=True):
            apart = (a.float() - b.float()).abs() > (8 * torch.finfo(dtype).eps + 1e-4) * b.float().abs().max()
            if apart.float().mean() > 1e-3 or not a.isfinite().all():
                raise RuntimeError(f"{what} differ in {apart.sum()} of {apart.numel()} values: nothing is timed")
