import sysconfig
from pathlib import Path

import pytest

from mindspeed_nsa.pretrain.prepare import prepare
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def real_text(tmp_path_factory) -> Path:
    """A dataset of a few hundred thousand bytes of the standard library, without the ending `.bin`."""
    prefix = tmp_path_factory.mktemp("data") / "python"
    sources = Path(sysconfig.get_path("stdlib")) / "email"
    prepare([sources], prefix, build_tokenizer("ByteTokenizer", None), suffixes=[".py"], held_out=0)
    return prefix.with_name("python_train")
