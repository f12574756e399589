"""What tests need that run Megatron-LM and MindSpeed: the two paths, what these import, and an emulated CANN."""

import importlib.util
import os

import pytest
from emulated_cann import build

_WHY_NOT = build.why_not(build.torch_npu_path())
_ABSENT = [name for name in ("six", "einops", "scipy", "regex", "transformers") if importlib.util.find_spec(name) is None]
marks = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (os.environ.get("MEGATRON_LM_PATH") and os.environ.get("MINDSPEED_PATH")),
        reason="needs MEGATRON_LM_PATH and MINDSPEED_PATH",
    ),
    pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)),
    pytest.mark.skipif(bool(_ABSENT), reason=f"Megatron-LM and MindSpeed need {', '.join(_ABSENT)}"),
]
