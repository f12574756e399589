"""The emulated CANN as it is built, and how a session over it fails; `tests/on_device/test_instrument.py` has the rest."""

import os
import subprocess
import sys

import pytest

from . import build
from .signatures import SIGNATURES

FOLDER = build.torch_npu_path()
REASON = build.why_not(FOLDER)
ENTRIES = frozenset(entry for name in SIGNATURES for entry in (name, f"{name}GetWorkspaceSize"))
KNOWN = build.Wheel("9.9.9", frozenset(["aclInit"]), frozenset(["libascendcl.so"]), ENTRIES | build._defined())

SWALLOWED = """
import pytest, torch, torch_npu

def test_swallows_a_trap():
    query, key, value = (torch.zeros(1024, 1, d, dtype=torch.bfloat16).npu() for d in (192, 192, 128))
    ids = torch.full((1024, 1, 16), 16, dtype=torch.int32).npu()
    with pytest.raises(RuntimeError):
        torch_npu.npu_nsa_select_attention(
            query, key, value, ids, 1.0, 1, 64, 16, actual_seq_qlen=[1024], actual_seq_kvlen=[1024]
        )
"""

RANKS = """
import os, torch, torch.distributed as dist, torch_npu
from tests.emulated_cann import device

rank = int(os.environ["RANK"])
torch.npu.set_device(rank)
dist.init_process_group("hccl")
here = dict(device=f"npu:{rank}")
with device.record() as log:
    total = torch.full((4,), rank + 1.0, **here)
    dist.all_reduce(total)
    half = torch.empty(2, **here)
    dist.reduce_scatter_tensor(half, torch.arange(4.0, **here))
    whole = torch.empty(4, **here)
    dist.all_gather_into_tensor(whole, half)
    other = torch.empty(1, **here)
    sends = [dist.P2POp(dist.isend, half[:1], 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    [work.wait() for work in dist.batch_isend_irecv(sends)]
assert log.counts()["collective"] == 5, log.table()
assert (total.tolist(), whole.tolist(), other.item()) == ([3.0] * 4, [0.0, 2.0, 4.0, 6.0], [4.0, 0.0][rank])
dist.destroy_process_group()
"""


def test_a_wheel_that_needs_no_more_passes():
    build.check(KNOWN)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"symbols": frozenset(["_ZN3ge5GraphC1Ev"])}, "C[+][+] functions _ZN3ge5GraphC1Ev"),
        ({"mentions": KNOWN.mentions - {"aclnnNsaCompressGrad"}}, "another operator than aclnnNsaCompressGrad:"),
        ({"mentions": KNOWN.mentions - {"aclrtMalloc"}}, "no longer knows aclrtMalloc:"),
        ({"libraries": frozenset(["libother.so"])}, "libascendcl.so"),
    ],
)
def test_a_wheel_that_needs_more_is_told_what(change, named):
    with pytest.raises(build.Unsupported, match=f"torch_npu 9.9.9 needs .*{named}.* extend tests/emulated_cann/build.py"):
        build.check(KNOWN._replace(**change))


def test_a_folder_without_torch_npu_is_named(tmp_path):
    assert str(tmp_path) in str(build.why_not(tmp_path))


def test_generated_entries_pack_every_argument_in_its_c_type():
    source = build.operators_source({"aclnnNsaCompress": SIGNATURES["aclnnNsaCompress"]})
    assert (
        "aclnnNsaCompressGetWorkspaceSize(void * input, void * weight, void * actual_seq_len, const char * layout, int64_t"
        in source
    )
    assert "{.p = layout}, {.i = compress_block_size}" in source


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_swallowed_trap_fails_the_session(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.on_device.conftest import *")
    (tmp_path / "test_swallowed.py").write_text(SWALLOWED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | build.environment(FOLDER), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "1 error" in done.stdout
    assert "aclnnNsaSelectedAttention: " in done.stdout


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_ranks_talk_over_the_emulated_hccl(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = os.environ | build.environment(FOLDER) | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.emulated_cann", "-m", "ranks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
