"""Real text for tests: sources of the standard library, cut into documents of many lengths."""

import itertools
import sysconfig
from pathlib import Path

from mindspeed_nsa.pretrain.prepare import prepare
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer


def prepare_text(folder: Path, lengths: tuple[int, ...], held_out: float) -> Path:
    """Datasets of the `email` package, in documents of `lengths` characters in turn: their prefix."""
    sources = sorted((Path(sysconfig.get_path("stdlib")) / "email").glob("*.py"))
    whole = "".join(source.read_text(encoding="utf-8") for source in sources)
    documents = folder / "documents"
    documents.mkdir()
    start = 0
    for number, length in enumerate(itertools.cycle(lengths)):
        if start >= len(whole):
            break
        (documents / f"{number:04d}.py").write_text(whole[start : start + length], encoding="utf-8")
        start += length
    prefix = folder / "python"
    prepare([documents], prefix, build_tokenizer("ByteTokenizer", None), suffixes=[".py"], held_out=held_out)
    return prefix
