import pytest

from mindspeed_nsa.launch import hosts


def test_hosts_are_found(sources):
    assert (hosts.megatron_lm(), hosts.mindspeed()) == sources
    assert hosts.megatron_version() == (0, 12)


def test_options_of_both_are_known(sources):
    hosts.check_options(["use_flash_attn", "flash", "op_cal_tflops", "gemm_fusion"])
    with pytest.raises(ValueError, match=r"^megatron\.use_flash_atn: neither .*; did you mean use_flash_attn\?$"):
        hosts.check_options(["op_cal_tflops", "use_flash_atn"])
    with pytest.raises(ValueError, match=r"^megatron\.no: "):
        hosts.check_options(["no"])


@pytest.mark.parametrize("name", ["MEGATRON_LM_PATH", "MINDSPEED_PATH"])
def test_a_host_that_is_not_there(sources, monkeypatch, tmp_path, name):
    find = hosts.megatron_lm if name == "MEGATRON_LM_PATH" else hosts.mindspeed
    monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(ValueError, match=rf"^{name}: {tmp_path}: no Me?i?\w+.* there \(\w+"):
        find()
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=rf"{name}.*not set; it names a clone"):
        find()


def test_a_version_that_is_not_said(sources):
    (sources[0] / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\n")
    with pytest.raises(ValueError, match=r"package_info\.py: does not say the version"):
        hosts.megatron_version()
