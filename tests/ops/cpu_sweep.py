"""Random calls of the native CPU kernels, held to the reference in float64 of the same inputs; also a command for processes of
their own, with `NSA_CPU_ISA` set or another build of the library: `python tests/ops/cpu_sweep.py [cases] [seed] [library]`.

How far apart results may be is derived, value by value. With u the rounding of the type (half its eps): a result is rounded
once, off by u of itself; the terms of sums in bfloat16, probabilities and gradients of logits, are rounded before they are
multiplied, off by u of the sum of their magnitudes; sums are kept in float32, off by WORK of that sum, more where logits are
large: a probability is off by what its logit is off.

T1, T2: packed queries and keys, N1, N2: heads of queries and of keys, D1, D2: dims of query/key and of value, P: probabilities.
"""

import random
import sys
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from mindspeed_nsa.ops import cpu, reference
from mindspeed_nsa.ops.reference import Compressed, Selected, Window

TYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "heads first", "padded", "strided")
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 200, 257)
DIMS = ((192, 128), (64, 64), (128, 128), (48, 32), (16, 16), (5, 7), (33, 1), (1, 33), (65, 130), (200, 96))
# Window, stride, block, count.
SIZES = ((32, 16, 64, 3), (32, 16, 64, 16), (4, 2, 8, 4), (6, 2, 8, 5), (8, 8, 16, 2), (16, 16, 64, 2), (3, 1, 5, 3))
WORK = 2e-5


class Case(NamedTuple):
    dtype: torch.dtype
    group: int
    kv_heads: int
    dims: tuple[int, int]
    sizes: tuple[int, int, int, int]
    window_size: int
    lengths: list[int]  # of the samples' queries
    offsets: list[int]  # where they start in their sample
    extra: list[int]  # tokens of the sample after the last query
    scale: float
    importance: str
    forced: tuple[int, int, bool]  # init_blocks, local_blocks, own_block
    layout: str
    seed: int

    @property
    def q_len(self):
        return list(accumulate(self.lengths))

    @property
    def samples(self):
        """The lengths of the samples, in keys."""
        return [sum(parts) for parts in zip(self.lengths, self.offsets, self.extra, strict=True)]

    @property
    def kv_len(self):
        return list(accumulate(self.samples))

    def compressed(self):
        block, stride = self.sizes[:2]
        windows = accumulate(reference.window_count(length, block, stride) for length in self.samples)
        blocks = accumulate(-(-length // self.sizes[2]) for length in self.samples)
        lists = self.q_len, list(windows), list(blocks), self.offsets
        return Compressed(self.scale, *self.sizes, True, *self.forced, self.importance, *lists)


def draw(rng: random.Random, **fixed) -> Case:
    """A case; `rng` may be hypothesis's, which then looks for the smallest that fails."""
    samples = rng.randint(1, 4)
    apart = rng.random() < 0.4
    group = rng.choice((1, 2, 3, 4, 5, 7, 8, 16, 17, 32))
    kv_heads = rng.choice((1, 2, 3)) if group < 8 else 1
    lengths = [length for length in LENGTHS if length * group * kv_heads <= 2100]  # the reference is slow
    case = Case(
        dtype=rng.choice(TYPES),
        group=group,
        kv_heads=kv_heads,
        dims=rng.choice(DIMS),
        sizes=rng.choice(SIZES),
        window_size=rng.choice((1, 2, 17, 64, 100, 512)),
        lengths=[rng.choice(lengths) for _ in range(samples)],
        offsets=[rng.choice((0, 1, 16, 63, 64, 150)) if apart else 0 for _ in range(samples)],
        extra=[rng.choice((0, 1, 70)) if apart else 0 for _ in range(samples)],
        scale=rng.choice((0.05, 0.2, 1.0, -0.3)),
        importance=rng.choice(("ascend", "paper")),
        forced=rng.choice(((1, 2, True), (1, 2, False), (0, 1, True), (2, 3, True))),
        layout=rng.choice(LAYOUTS),
        seed=rng.randint(0, 1 << 30),
    )
    return case._replace(**fixed)


def tensor(generator, case, *shape):
    x = torch.randn(shape, generator=generator, dtype=torch.float32).to(case.dtype)
    if case.layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if case.layout == "padded":
        return torch.nn.functional.pad(x, (0, 3))[..., : shape[-1]]
    if case.layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x


# ---- what is compared


def close(name, found, expected, of_sum, of_rounded=0.0, work=WORK):
    """`found` in its type; `expected` in float64, and the magnitudes of its terms: as summed, and as rounded before."""
    u = torch.finfo(found.dtype).eps / 2
    of_rounded = of_rounded if found.dtype == torch.bfloat16 else 0.0
    allowed = 1.01 * u * (expected.abs() + of_rounded) + work * of_sum + torch.finfo(found.dtype).smallest_normal * u
    off = (found.double() - expected).abs() / allowed.clamp(min=1e-30)
    off = torch.where(found.isfinite(), off, torch.inf)
    if off.numel() and off.max() > 1:
        where = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        raise AssertionError(
            f"{name}{list(where)} is {found[where].item()}, must be {expected[where].item()}: "
            f"{off.max().item():.3g} times the allowed distance; {(off > 1).sum().item()} of {off.numel()} are off"
        )


def check(case: Case) -> None:
    """Every operator, forward and backward."""
    generator, (grad, query, key, value) = operands_of(case)
    check_compress(case, generator, key)
    check_attention("window", case, grad, query, key, value, (), Window(*_window(case)))
    ids = check_compressed(case, generator, grad, query)
    ordered = Selected(case.scale, case.sizes[2], True, True, case.q_len, case.kv_len, case.offsets)
    check_attention("select", case, grad, query, key, value, (ids.sort(dim=-1).values,), ordered)
    listed = random_ids(case, generator)
    for causal in (True, False):
        check_attention(
            "select, any ids", case, grad, query, key, value, (listed,), ordered._replace(causal=causal, ordered=False)
        )
    check_gated_sum(case, generator, grad)
    check_whole(case, generator, (grad, query, key, value))


def operands_of(case):
    """What the rest is drawn with, and the gradient, query, key and value."""
    generator = torch.Generator().manual_seed(case.seed)
    heads, (qk_dim, v_dim), tokens = case.group * case.kv_heads, case.dims, case.q_len[-1]
    query = tensor(generator, case, tokens, heads, qk_dim)
    key, value = (tensor(generator, case, case.kv_len[-1], case.kv_heads, dim) for dim in case.dims)
    return generator, (tensor(generator, case, tokens, heads, v_dim), query, key, value)


def _window(case):
    return case.scale, case.window_size, case.q_len, case.kv_len, case.offsets


def random_ids(case, generator):
    """Of blocks that the samples have, some twice."""
    blocks = torch.tensor([-(-length // case.sizes[2]) for length in case.samples]).repeat_interleave(
        torch.tensor(case.lengths)
    )
    shape = (case.q_len[-1], case.kv_heads, case.sizes[3])
    return (torch.rand(shape, generator=generator) * blocks[:, None, None]).int()


def check_compress(case, generator, tokens):
    block_size, stride = case.sizes[:2]
    weight = tensor(generator, case, block_size, case.kv_heads, 1)[..., 0]
    pooled = cpu.compress(tokens, weight, block_size, stride, case.kv_len)
    at = block_size, stride, case.kv_len

    def exact(run, *tensors):
        return run(*(x.double() for x in tensors), *at)

    magnitude = exact(reference.compress, tokens.abs(), weight.abs())
    close("compress", pooled, exact(reference.compress, tokens, weight), magnitude)
    grad = tensor(generator, case, *pooled.shape) if pooled.numel() else pooled
    found = cpu.compress_backward(grad, tokens, weight, *at)
    wanted = exact(reference.compress_backward, grad, tokens, weight)
    magnitudes = exact(reference.compress_backward, grad.abs(), tokens.abs(), weight.abs())
    for name, *results in zip(("grad_input", "grad_weight"), found, wanted, magnitudes, strict=True):
        close(f"compress {name}", *results)


def check_attention(name, case, grad, query, key, value, ids, at):
    """Select or window attention."""
    kind = name.split(",")[0]
    forward, backward = f"{kind}_attention", f"{kind}_attention_backward"

    def seen(value):
        return getattr(reference, forward)(query.double(), key.double(), value, *ids, *at)

    found = getattr(cpu, forward)(query, key, value, *ids, *at)
    work = work_of(case, query, key)
    check_softmax(name, work, found, seen(value.double()), seen(value.double().abs())[0])
    gradients = getattr(cpu, backward)(grad, query, key, value, *ids, *found, *at)
    saved = found[0].double(), *seen(value.double())[1:]
    wanted = getattr(reference, backward)(*(x.double() for x in (grad, query, key, value)), *ids, *saved, *at)
    check_gradients(name, case, work, gradients, wanted, seen(one_hot(key))[0], grad, query, key, value, found[0])


def check_compressed(case, generator, grad, query):
    at = case.compressed()
    key, value = (tensor(generator, case, at.cmp_len[-1], case.kv_heads, dim) for dim in case.dims)

    def seen(value):
        return reference.compress_attention(query.double(), key.double(), value, None, None, *at)

    attention, ids, *statistics = cpu.compress_attention(query, key, value, None, None, *at)
    expected, _, *exact = seen(value.double())
    work = work_of(case, query, key)
    check_softmax("compressed", work, (attention, *statistics), (expected, *exact), seen(value.double().abs())[0])
    gradients = cpu.compress_attention_backward(grad, query, key, value, None, None, attention, *statistics, *at)
    operands = *(x.double() for x in (grad, query, key, value)), None, None
    wanted = reference.compress_attention_backward(*operands, attention.double(), *exact, *at)
    check_gradients("compressed", case, work, gradients, wanted, seen(one_hot(key))[0], grad, query, key, value, attention)
    scores = reference.block_scores(query.double(), key.double(), *exact, 0, query.shape[0], *at)
    first, last = query.shape[0] // 3, query.shape[0]
    found = cpu.block_scores(query, key, *statistics, first, last, *at)
    close("block_scores", found, scores[first:last], scores[first:last] + case.group * 1e-3, work=work)
    check_ids(case, at, ids, scores)
    none = cpu.compress_attention(query, key, value, None, None, *at._replace(select_block_count=0))
    assert torch.equal(none[0], attention), "attention depends on whether blocks are chosen"
    return ids


def work_of(case, query, key):
    """What float32 may be off by, of a sum of probabilities: more with larger logits."""
    longest = [x.double().norm(dim=-1).max() if x.numel() else torch.zeros(()) for x in (query, key)]
    return WORK * (1 + abs(case.scale) * (longest[0] * longest[1]).item() / 10)


def check_softmax(name, work, found, expected, magnitude):
    attention, row_max, row_sum = found
    close(f"{name} attention", attention, expected[0], magnitude, magnitude, work)
    close(f"{name} softmax_max", row_max, expected[1], torch.ones_like(expected[1]), work=work)
    close(f"{name} softmax_sum", row_sum, expected[2], expected[2], work=work)


def one_hot(key):
    """Values that make attention return its probabilities: [T2, N2, T2]."""
    return torch.eye(key.shape[0], dtype=torch.float64)[:, None].expand(-1, key.shape[1], -1)


def check_gradients(name, case, work, found, wanted, probability, *operands):
    grad, query, key, value, attention = (x.double() for x in operands)
    grad, query, attention, probability = (x.unflatten(1, (-1, case.group)) for x in (grad, query, attention, probability))

    def of_logits(grad, attention, value):
        delta = (grad * attention).sum(dim=-1, keepdim=True)
        return probability * (torch.einsum("tngd,snd->tngs", grad, value) - delta)

    rounded = of_logits(grad, attention, value).abs()  # [T1, N2, G, T2]
    summed = of_logits(grad.abs(), -attention.abs(), value.abs())
    for which, logits in (("rounded", rounded), ("summed", summed)):
        magnitudes = (
            abs(case.scale) * torch.einsum("tngs,snd->tngd", logits, key.abs()).flatten(1, 2),
            abs(case.scale) * torch.einsum("tngs,tngd->snd", logits, query.abs()),
            torch.einsum("tngs,tngd->snd", probability, grad.abs()),
        )
        if which == "rounded":
            of_rounded = magnitudes
    for i, of in enumerate(("query", "key", "value")):
        close(f"{name} grad_{of}", found[i], wanted[i], magnitudes[i], of_rounded[i], work)


def check_ids(case, at, ids, scores):
    """The best blocks, best first; other blocks than by float64 only where scores are equal but for rounding."""
    assert ids.shape == (case.q_len[-1], case.kv_heads, at.select_block_count)
    for (start, stop), blocks, offset in zip(
        zip([0, *case.q_len[:-1]], case.q_len, strict=True), reference.lengths(at.sel_len), case.offsets, strict=True
    ):
        early = min(start + reference.early_rows(offset, at), stop)
        assert torch.equal(ids[start:early], torch.arange(at.select_block_count, dtype=torch.int32).expand_as(ids[start:early]))
        own_scores = scores[early:stop, :, :blocks]
        position = torch.arange(early - start, stop - start) + offset
        best = reference.choose(own_scores, position, at)
        chosen = ids[early:stop]
        assert (chosen.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a block is chosen twice"
        if not chosen.numel():
            continue
        assert chosen.min() >= 0 and chosen.max() < blocks
        ranked = reference.force(own_scores, reference.forced_blocks(position, blocks, at))
        a, b = (ranked.gather(-1, x.long()) for x in (chosen, best))
        differ = (chosen != best) & ((a - b).abs() > 1e-4 * b.abs() + 1e-30)
        forced = chosen != best
        assert not (forced & (a == torch.inf)).any(), "forced blocks come first, by id"
        assert not differ.any(), f"{differ.sum()} blocks are chosen in place of better ones"


def check_gated_sum(case, generator, grad):
    shape = grad.shape
    gate_type = case.dtype if case.seed % 2 else torch.float32
    gate = (3 * torch.randn((*shape[:2], 3), generator=generator)).to(gate_type)
    branches = [tensor(generator, case, *shape) for _ in range(3)]
    exact = gate.double(), *(x.double() for x in branches)
    magnitude = reference.gated_sum(exact[0], *(x.abs() for x in exact[1:]))
    close("gated_sum", cpu.gated_sum(gate, *branches), reference.gated_sum(*exact), magnitude)
    found = cpu.gated_sum_backward(grad, gate, *branches)
    wanted = reference.gated_sum_backward(grad.double(), *exact)
    # In float32 an almost open gate's 1 - sigmoid is off by the rounding of 1.
    of_gate = torch.stack([(grad.double() * x).abs().sum(dim=-1) for x in exact[1:]], dim=-1)
    magnitudes = of_gate, *(grad.double().abs() for _ in branches)
    for i, of in enumerate(("gate", "compress", "select", "window")):
        close(f"gated_sum grad_{of}", found[i], wanted[i], magnitudes[i])


def check_whole(case, generator, operands):
    """To the bit what the operators give one after another, in gradients too."""
    grad, query, key, value = operands
    at = case.compressed()
    pooled = [tensor(generator, case, at.cmp_len[-1], case.kv_heads, dim) for dim in case.dims]
    newest = [x.clone() for x in (key, value)] if case.seed % 3 else [key, value]  # keys of its own, or those of the blocks
    gate = (3 * torch.randn((*grad.shape[:2], 3), generator=generator)).to(case.dtype if case.seed % 2 else torch.float32)
    compress, ids, *statistics = cpu.compress_attention(query, *pooled, None, None, *at)
    selected = Selected(case.scale, case.sizes[2], True, False, case.q_len, case.kv_len, case.offsets)
    select = cpu.select_attention(query, key, value, ids, *selected)
    window = cpu.window_attention(query, *newest, *_window(case))
    branches = compress, select[0], window[0]
    operands = query, *pooled, key, value, *newest, gate
    settings = *at, case.window_size, case.kv_len
    found = cpu.sparse_attention(*operands, *settings)
    same("whole", found, (cpu.gated_sum(gate, *branches), ids, *branches, *statistics, *select[1:], *window[1:]))
    grad_gate, *grads = cpu.gated_sum_backward(grad, gate, *branches)
    by_window = cpu.window_attention_backward(grads[2], query, *newest, *window, *_window(case))
    by_select = cpu.select_attention_backward(grads[1], query, key, value, ids, *select, *selected)
    by_compress = cpu.compress_attention_backward(grads[0], query, *pooled, None, None, compress, *statistics, *at)
    grad_query = by_window[0] + by_select[0] + by_compress[0]
    gradients = grad_query, *by_compress[1:], *by_select[1:], *by_window[1:], grad_gate
    same("whole, gradients", cpu.sparse_attention_backward(grad, *operands, *found[1:], *settings), gradients)


def same(name, found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"{name}, result {i}"
        assert torch.equal(a, b), f"{name}, result {i}: {(a != b).sum()} of {a.numel()} differ"


def main(cases: int = 30, seed: int = 0, library: str | None = None) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    torch.set_num_threads(2)
    if library is not None:
        cpu.native.load(Path(library))
    rng = random.Random(seed)
    for number in range(cases):
        # Every type in turn: few cases see them all.
        case = draw(rng, dtype=TYPES[number % 3])
        try:
            check(case)
        except AssertionError as error:
            sys.exit(f"{cpu.native.isa()}: {case}: {error}")
    print(f"{cpu.native.isa()}: {cases} cases")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
