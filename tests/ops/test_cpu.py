"""The native CPU kernels: `cpu_sweep` holds them to the reference; here are also bits, threads, forks, memory and refusals."""

import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_nsa import NativeSparseAttention, NSAConfig, ops
from mindspeed_nsa.ops import backends, library, reference
from mindspeed_nsa.ops.reference import Compressed, Selected, Window

pytest.importorskip("mindspeed_nsa.ops.cpu", reason="the native kernels are not built", exc_type=ImportError)
import cpu_sweep

from mindspeed_nsa.ops import cpu

HALVES_AND_FLOAT = [torch.bfloat16, torch.float16, torch.float32]
TUNED = {"dims": (192, 128), "sizes": (32, 16, 64, 3), "lengths": [200], "offsets": [0], "extra": [0], "kv_heads": 1}
SWEEP = Path(cpu_sweep.__file__)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- against the reference


@settings(max_examples=40, deadline=None, derandomize="CI" in os.environ, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_any_call(rng):
    cpu_sweep.check(cpu_sweep.draw(rng))


@pytest.mark.parametrize("group", [1, 3, 16, 32])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_the_tuned_shapes(dtype, group):
    """192/128, on blocks of 64; on whole and on ragged tiles, with a length that the sweep's bound on work leaves out."""
    case = cpu_sweep.draw(random.Random(group), dtype=dtype, group=group, **TUNED)
    cpu_sweep.check(case)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx"])
def test_each_instruction_set(isa):
    """In a process of its own: the choice is made once."""
    if isa not in cpu.native.isas():
        pytest.skip(f"this build or processor has no {isa}")
    done = sweep({"NSA_CPU_ISA": isa}, "18", "3")
    assert (done.returncode, done.stdout) == (0, f"{isa}: 18 cases\n"), done.stdout + done.stderr


def test_an_instruction_set_that_is_not_there_is_an_error():
    done = sweep({"NSA_CPU_ISA": "mmx"}, "1")
    assert done.returncode == 1
    assert "ValueError: NSA_CPU_ISA is 'mmx'; this processor allows: generic" in done.stderr


def sweep(variables, *arguments):
    command = [sys.executable, str(SWEEP), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_sweep_that_is_off_by_one_rounding_too_many_fails(monkeypatch):
    """The instrument itself: a result of a coarser type, and a lost key, are noticed."""
    case = cpu_sweep.draw(random.Random(1), dtype=torch.float16, group=2, **TUNED)
    window = cpu.window_attention
    monkeypatch.setattr(cpu, "window_attention", lambda *a: (window(*a)[0].bfloat16().half(), *window(*a)[1:]))
    with pytest.raises(AssertionError, match="window attention"):
        cpu_sweep.check(case)
    narrower = lambda query, key, value, scale, size, *lists: window(query, key, value, scale, size - 1, *lists)  # noqa: E731
    monkeypatch.setattr(cpu, "window_attention", narrower)
    with pytest.raises(AssertionError, match="window"):
        cpu_sweep.check(case._replace(window_size=100))


# ---- all operators on one input


class Calls:
    """Every operator on one packed input, through the registered ones: results, and gradients of a fixed loss."""

    def __init__(self, dtype, ends, heads=16, kv_heads=1, dims=(192, 128), count=3):
        self.ends, self.count = ends, count
        shapes = (heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]), (heads, 3)
        self.tensors = [torch.randn(ends[-1], *shape).to(dtype) for shape in shapes]
        self.weights = [(torch.randn(32, kv_heads) / 32).to(dtype) for _ in range(2)]

    def results(self, tensors=None, rows=slice(None), backend="cpu"):
        tensors = [x.detach().requires_grad_() for x in tensors or self.tensors]
        weights = [x.detach().requires_grad_() for x in self.weights]
        query, key, value, gate = tensors
        offsets = [0] * len(self.ends)
        windows = [
            sum(reference.window_count(n, 32, 16) for n in reference.lengths(self.ends[: i + 1])) for i in range(len(self.ends))
        ]
        blocks = [sum(-(-n // 64) for n in reference.lengths(self.ends[: i + 1])) for i in range(len(self.ends))]
        pooled = [library.compress(x, w, 32, 16, self.ends, backend) for x, w in zip((key, value), weights, strict=True)]
        at = Compressed(0.07, 32, 16, 64, self.count, True, 1, 2, True, "ascend", self.ends, windows, blocks, offsets)
        compressed, ids, *statistics = library.compress_attention(query, *pooled, None, None, *at, backend)
        ids = ids.sort(dim=-1).values
        select = library.select_attention(
            query, key, value, ids, *Selected(0.07, 64, True, True, self.ends, self.ends, offsets), backend
        )
        window = library.window_attention(query, key, value, *Window(0.07, 100, self.ends, self.ends, offsets), backend)
        out = library.gated_sum(gate, compressed, select[0], window[0], backend)
        grad = torch.linspace(-1, 1, out[rows].numel(), dtype=torch.float32).view_as(out[rows]).to(out.dtype)
        gradients = torch.autograd.grad(out[rows], (*tensors, *weights), grad)
        return [out.detach(), ids, *gradients], [*(x.detach() for x in (compressed, *select, *window)), *statistics]


def same_bits(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_bits_depend_neither_on_threads_nor_on_the_run(dtype):
    calls = Calls(dtype, [1, 230, 700])
    first, statistics = calls.results()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        again, statistics_again = calls.results()
        same_bits(first, again)
        same_bits(statistics, statistics_again)


@pytest.mark.parametrize("fill", [1e30, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_after_a_token_reaches_it(dtype, fill):
    """To the bit, whatever finite values later tokens and other samples hold. In gradients too, where all results are finite.

    A later value of NaN or infinity reaches the rows that multiply it by 0, here as on the reference.
    """
    start, ends = 70, [70, 430, 500]
    calls = Calls(dtype, ends, heads=4)
    for edge in (0, 15, 30, 31, 32, 63, 64, 127, 200, 255, 256, 300):
        kept = slice(start, start + edge + 1)
        changed = [x.clone() for x in calls.tensors]
        for x in changed:
            x[: kept.start], x[kept.stop :] = fill, fill
        (out, ids, *gradients), _ = calls.results(rows=kept)
        (other, other_ids, *other_gradients), _ = calls.results(changed, rows=kept)
        assert torch.equal(out[kept], other[kept])
        assert torch.equal(ids[kept], other_ids[kept])
        if fill != 0.5:
            continue
        for a, b in zip(gradients[:4], other_gradients[:4], strict=True):
            assert torch.equal(a[kept], b[kept])
        for a in gradients[:4]:
            assert not a[: kept.start].any()
            assert not a[kept.stop :].any()
        same_bits(gradients[4:], other_gradients[4:])


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_equal_scores_go_to_the_lower_block(dtype):
    """Exact ties: keys that are all equal score all inner blocks alike; of zeros that underflow, the first come too."""
    tokens, count = 1300, 5
    query = torch.randn(tokens, 16, 192).to(dtype)
    at = Compressed(0.07, 32, 16, 64, count, True, 1, 2, True, "ascend", [tokens], [80], [21], [0])
    flat = torch.ones(80, 1, 192).to(dtype)
    peaked = torch.zeros(80, 1, 192).to(dtype)
    peaked[17] = 50 * query[-1, 0]
    for keys, queries in ((flat, query), (peaked, query[-1:, :1].expand_as(query).contiguous())):
        ids = cpu.compress_attention(queries, keys, keys, None, None, *at)[1]
        expected = reference.compress_attention(queries, keys, keys, None, None, *at)[1]
        if keys is peaked:
            assert torch.equal(ids, expected)
        scores = reference.block_scores(*(x.double() for x in (queries, keys)), *_statistics(queries, keys, at), 0, tokens, *at)
        cpu_sweep.check_ids(case_of(at, tokens), at, ids, scores)
        assert torch.equal(ids[:, :, :3].sort().values[320:], expected[:, :, :3].sort().values[320:])


@pytest.mark.parametrize("importance", ["ascend", "paper"])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_scores_where_logits_rise_with_every_window(dtype, importance):
    """What was summed relative to lower logits is scaled anew, the edges of blocks too that two tiles of windows share."""
    tokens, windows = 2300, 142
    query = torch.ones(tokens, 16, 32).to(dtype)
    key = (torch.arange(windows) / 32).to(dtype)[:, None, None].expand(-1, 1, 32).contiguous()
    at = Compressed(1.0, 32, 16, 64, 16, True, 1, 2, True, importance, [tokens], [windows], [36], [0])
    statistics = _statistics(query, key, at)
    expected = reference.block_scores(query.double(), key.double(), *statistics, 0, tokens, *at)
    found = cpu.block_scores(query, key, *(x.float() for x in statistics), 0, tokens, *at)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def _statistics(query, key, at):
    return reference.compress_attention(query.double(), key.double(), key.double(), None, None, *at)[2:]


def case_of(at, tokens):
    case = cpu_sweep.draw(random.Random(0), **TUNED)
    return case._replace(lengths=[tokens], kv_heads=1, group=16)


# ---- as a part of a program


def test_empty_inputs():
    empty = torch.empty(0, 2, 8)
    query, key = torch.randn(3, 4, 8), torch.empty(0, 2, 8)
    assert cpu.compress(empty, torch.ones(4, 2), 4, 2, [0]).shape == (0, 2, 8)
    grad_input, grad_weight = cpu.compress_backward(empty, torch.randn(3, 2, 8), torch.ones(4, 2), 4, 2, [3])
    assert not grad_input.any() and not grad_weight.any()
    at = Window(0.1, 4, [3], [0], [0])
    out, row_max, row_sum = cpu.window_attention(query, key, key, *at)
    assert not any(x.any() for x in (out, row_max, row_sum))
    grad_query, grad_key, _ = cpu.window_attention_backward(out, query, key, key, out, row_max, row_sum, *at)
    assert not grad_query.any() and grad_key.shape == (0, 2, 8)
    at = Compressed(0.1, 4, 2, 8, 2, True, 1, 1, True, "ascend", [3], [0], [1], [0])
    out, ids, *_ = cpu.compress_attention(query, key, key, None, None, *at)
    assert not out.any() and (ids == torch.tensor([0, 1])).all()
    none = torch.empty(0, 4, 8)
    assert cpu.window_attention(none, key, key, *Window(0.1, 4, [0], [0], [0]))[0].shape == (0, 4, 8)
    gate = torch.empty(0, 4, 3)
    assert cpu.gated_sum(gate, none, none, none).shape == (0, 4, 8)


def test_many_threads_at_once():
    """As autograd runs backward: from threads of its own, several at a time."""
    calls = Calls(torch.bfloat16, [1, 230], heads=4)
    expected, _ = calls.results()
    found = [None] * 4

    def run(i):
        found[i] = calls.results()[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found:
        same_bits(expected, results)


FORKED = """
import os, torch
from mindspeed_nsa.ops import cpu
torch.set_num_threads(2)
x = torch.randn(300, 4, 16)
at = (0.2, 50, [300], [300], [0])
before = cpu.window_attention(x, x, x, *at)
child = os.fork()
same = all(map(torch.equal, before, cpu.window_attention(x, x, x, *at)))
if child == 0:
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and same
"""


def test_after_fork():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


MEMORY = """
import sys, torch
from mindspeed_nsa import NativeSparseAttention, NSAConfig
from mindspeed_nsa.bench.measure import peak_bytes
torch.set_num_threads(2)
tokens = int(sys.argv[1])
nsa = NativeSparseAttention(NSAConfig(backend="cpu"), 16, 1, 64, 64).bfloat16()
def run(tokens):
    inputs = [torch.randn(tokens, *s).bfloat16().requires_grad_() for s in ((16, 64), (1, 64), (1, 64), (16, 3))]
    nsa(*inputs).float().pow(2).sum().backward()
run(1100)
print(peak_bytes(lambda: run(tokens)) // tokens)
"""


def test_memory_grows_with_tokens_alone():
    """Bytes a token, forward and backward, do not rise with the length."""

    def bytes_a_token(tokens):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(tokens)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert 0 < bytes_a_token(16384) < 1.3 * bytes_a_token(8192)


KEPT = """
import resource, sys, torch
from mindspeed_nsa.heap import prepare_heap
if sys.argv[1] == "kept":
    prepare_heap()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    torch.ones(int(sys.argv[2]) << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("mib", [64, 2100])  # above 2 GiB the C library has another limit
def test_freed_memory_is_kept(mib):
    """The same again and again: of pages that the process has, after twice, and of fresh ones where it was not asked to."""
    command = [sys.executable, "-c", KEPT]
    faults = {
        mode: int(subprocess.run([*command, mode, str(mib)], capture_output=True, text=True, check=True).stdout)
        for mode in ("kept", "given back")
    }
    assert 2 * faults["kept"] < faults["given back"]


HUGE = """
import sys, torch
from mindspeed_nsa.heap import prepare_heap
if sys.argv[1] == "prepared":
    prepare_heap()
tensor = torch.ones(64 << 18)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


def test_tensors_lie_in_huge_pages():
    pages = Path("/sys/kernel/mm/transparent_hugepage")
    if not pages.exists() or "[madvise]" not in (pages / "enabled").read_text():
        pytest.skip("huge pages are not the process's own choice on this machine")
    if int((pages / "hpage_pmd_size").read_text()) != 2 << 20:
        pytest.skip("huge pages are not of 2 MiB on this machine")
    kib = {
        mode: int(subprocess.run([sys.executable, "-c", HUGE, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("prepared", "as it is")
    }
    assert kib["as it is"] < 32 << 10 < kib["prepared"]


def test_copies_of_softmax_statistics_are_one_in_memory():
    query, key, value = torch.randn(70, 4, 32), torch.randn(70, 2, 32), torch.randn(70, 2, 32)
    for statistic in cpu.window_attention(query, key, value, *Window(0.2, 16, [70], [70], [0]))[1:]:
        assert statistic.shape == (70, 4, 8)
        assert statistic.untyped_storage().nbytes() == 70 * 4 * 4


def test_other_types_and_masks_run_on_the_reference_said_once(caplog):
    cpu.say_once.cache_clear()
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    at = Window(0.5, 3, [9], [9], [0])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = cpu.window_attention(x, x, x, *at)
            same_bits(found, reference.window_attention(x, x, x, *at))
            cpu.compress_attention(
                *(x.float(),) * 3, None, None, *Compressed(0.5, 4, 2, 4, 1, False, 0, 0, True, "ascend", [9], [9], [5], [0])
            )
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "NSA on the CPU: torch.float64 runs on the reference",
        "NSA on the CPU: compressed attention by masks runs on the reference",
    ]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_the_whole_where_scores_are_too_large_for_a_chunk(dtype, kv_heads):
    """So many blocks that the queries of a chunk choose in parts."""
    sizes = {"lengths": [50, 1500], "offsets": [0, 0], "extra": [0, 0], "group": 2, "kv_heads": kv_heads, "dims": (33, 17)}
    case = cpu_sweep.draw(random.Random(7), dtype=dtype, sizes=(3, 1, 5, 3), **sizes)
    cpu_sweep.check_whole(case, *cpu_sweep.operands_of(case))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_the_whole_of_a_long_sample(dtype):
    """Past 16,384 keys the attentions run one after another."""
    sizes = {"lengths": [90, 40], "offsets": [0, 16400], "extra": [0, 0], "group": 2, "kv_heads": 2, "dims": (48, 32)}
    case = cpu_sweep.draw(random.Random(7), dtype=dtype, sizes=(32, 16, 64, 16), **sizes)
    cpu_sweep.check_whole(case, *cpu_sweep.operands_of(case))


def test_the_whole_refuses_what_it_cannot_read():
    def run(**changed):
        shapes = {
            "query": (9, 4, 8),
            "ck": (2, 2, 8),
            "cv": (2, 2, 6),
            "sk": (9, 2, 8),
            "sv": (9, 2, 6),
            "wk": (9, 2, 8),
            "wv": (9, 2, 6),
        }
        tensors = [torch.zeros(changed.get(name, shape)) for name, shape in (shapes | {"gate": (9, 4, 3)}).items()]
        at = Compressed(0.5, 4, 4, 4, 2, changed.get("causal", True), 1, 1, True, "ascend", [9], [2], [3], [0])
        return cpu.sparse_attention(*(x.to(changed.get("dtype", x.dtype)) for x in tensors), *at, 5, [9])

    assert run()[0].shape == (9, 4, 6)
    for changed, words in (
        ({"dtype": torch.float64}, "sparse_attention has torch.float64; allowed: torch.float32, torch.float16, torch.bfloat16"),
        ({"causal": False}, "sparse_attention is causal by position"),
        ({"gate": (9, 4, 2)}, r"gate is \[9, 4, 2\]"),
        ({"wv": (9, 2, 5)}, r"window_value is \[9, 2, 5\] .* allowed: \[9, 2, 6\]"),
        ({"sk": (8, 2, 8)}, r"kv_len \[9\] must be prefix sums that rise to the 8 given|value is \[9, 2, 6\]"),
    ):
        with pytest.raises(ValueError, match=words):
            run(**changed)


def test_auto_on_the_cpu_is_native():
    assert backends.load("auto", "cpu") is cpu
    with ops.use_backend("cpu"):
        assert backends.load(backends.resolve("auto"), "cpu") is cpu


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": (9, 3, 8)}, r"4 query heads on 3 key/value heads"),
        ({"key": (9, 2, 7)}, r"key is \[9, 2, 7\] of torch.float32; allowed: \[9, 2, 8\]"),
        ({"value": (8, 2, 8)}, r"value is \[8, 2, 8\]"),
        ({"value": torch.bfloat16}, "value is .* of torch.bfloat16; allowed: .* of torch.float32"),
        ({"ids": (9, 1, 2)}, r"topk_indices is \[9, 1, 2\]; allowed: \[9, 2, k\]"),
        ({"ids": -1}, "topk_indices holds -1; allowed: 0 and above"),
        ({"ends": [8]}, r"q_len \[8\] must be prefix sums that rise to the 9 given"),
        ({"ends": [10, 9]}, r"q_len \[10, 9\]"),
        ({"offset": [0, 0]}, "2 offsets"),
        ({"query": "meta"}, "backend cpu takes tensors on cpu, not on meta"),
    ],
)
def test_what_would_be_read_outside_of_memory_is_refused(change, words):
    tensors = {"query": torch.zeros(9, 4, 8), "key": torch.zeros(9, 2, 8), "value": torch.zeros(9, 2, 8)}
    ids, ends, offset = torch.zeros(9, 2, 2, dtype=torch.int32), [9], [0]
    for name, wrong in change.items():
        if name == "ids":
            ids = torch.full((9, 2, 2), -1) if wrong == -1 else torch.zeros(wrong, dtype=torch.int32)
        elif name == "ends":
            ends = wrong
        elif name == "offset":
            offset = wrong
        elif isinstance(wrong, tuple):
            tensors[name] = torch.zeros(wrong)
        else:
            tensors[name] = tensors[name].to(wrong)
    with pytest.raises(ValueError, match=words):
        cpu.select_attention(*tensors.values(), ids, *Selected(0.5, 4, True, False, ends, [9], offset))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_block_is_the_reference_s(dtype):
    """The chip's sizes; blocks are compared where scores differ by more than rounding: nearly everywhere."""
    blocks = [NativeSparseAttention(NSAConfig(backend=name), 8, 1, 48, 32).to(dtype) for name in ("reference", "cpu")]
    blocks[1].load_state_dict(blocks[0].state_dict())
    shapes = (8, 48), (1, 48), (1, 32), (8, 3)
    tensors = [torch.randn(1500, *shape).to(dtype) for shape in shapes]
    (expected, wanted), (found, gradients) = (
        (out, torch.autograd.grad(out.float().square().sum(), (*leaves, *nsa.parameters())))
        for nsa in blocks
        for leaves in [[x.detach().requires_grad_() for x in tensors]]
        for out in [nsa(*leaves, [100, 1500])]
    )
    limit = 4 * torch.finfo(dtype).eps + 1e-5
    for a, b in zip((found, *gradients), (expected, *wanted), strict=True):
        apart = (a.float() - b.float()).abs() / b.float().abs().max()
        assert (apart > limit).float().mean() < 2e-3
