import pytest


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Megatron-LM and MindSpeed as far as they are read: their options and the version. Stand-ins."""
    megatron, mindspeed = tmp_path / "Megatron-LM", tmp_path / "MindSpeed"
    files = {
        megatron / "megatron" / "training" / "arguments.py": "group.add_argument('--use-flash-attn', '--flash', help='--no')",
        megatron / "megatron" / "core" / "package_info.py": "MAJOR = 0\nMINOR = 12\nPATCH = 1\n",
        mindspeed / "mindspeed" / "megatron_adaptor.py": "",
        mindspeed / "mindspeed" / "arguments.py": "group.add_argument('--op-cal-tflops')",
        mindspeed / "mindspeed" / "features_manager" / "moe" / "gmm.py": "group.add_argument('--gemm-fusion', type=int)",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("MEGATRON_LM_PATH", str(megatron))
    monkeypatch.setenv("MINDSPEED_PATH", str(mindspeed))
    return megatron, mindspeed
