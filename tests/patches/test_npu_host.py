from typing import NamedTuple

import pytest

pytest.importorskip("megatron.core")

from mindspeed_nsa.patches import npu_host
from mindspeed_nsa.patches.npu_host import disagreement


@pytest.mark.skipif(npu_host.has_npu(), reason="this host has an NPU")
def test_what_it_cannot_do_is_said(monkeypatch):
    with pytest.raises(RuntimeError, match="this process sees none"):
        npu_host.install()
    monkeypatch.setattr(npu_host, "has_npu", lambda: True)
    with pytest.raises(RuntimeError, match="before Megatron-core is imported, and it is imported already"):
        npu_host.install()


class Plan(NamedTuple):
    name: str
    chooses: bool


A, B = Plan("A", True), Plan("B", False)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([A, A], ""),
        ([A, B, A, A], "plans (name, chooses): ranks 0, 2, 3: plan A, True; rank 1: plan B, False; all ranks need"),
        ([A, Plan("A", False)], "rank 0: plan A, True; rank 1: plan A, False"),
        ([A, "no plan: it fails", "no plan: it fails"], "no plan: it fails (ranks 1, 2)"),
        (["no plan", "another reason"], "no plan (rank 0); another reason (rank 1)"),
    ],
)
def test_ranks_that_differ_are_named(found, said):
    assert said in disagreement(found) and bool(said) == bool(disagreement(found))
