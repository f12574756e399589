import pytest

pytest.importorskip("megatron.core")

from mindspeed_nsa.patches import npu_host


@pytest.mark.skipif(npu_host.has_npu(), reason="this host has an NPU")
def test_what_it_cannot_do_is_said(monkeypatch):
    with pytest.raises(RuntimeError, match="this process sees none"):
        npu_host.install()
    monkeypatch.setattr(npu_host, "has_npu", lambda: True)
    with pytest.raises(RuntimeError, match="before Megatron-core is imported, and it is imported already"):
        npu_host.install()
