"""Text files to the indexed datasets that Megatron trains on."""

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from mindspeed_nsa.config import Section, explain
from mindspeed_nsa.pretrain.tokenizer import Tokenizer


class Summary(Section):
    """What `prepare` wrote, kept as `<prefix>.json` beside the data.

    Args:
        tokenizer: the tokenizer's `unique_identifiers`.
        train_documents: documents, one a file, in `<prefix>_train`.
        train_tokens: tokens in `<prefix>_train`, one end of document for each document included.
        valid_documents: documents in `<prefix>_valid`.
        valid_tokens: tokens in `<prefix>_valid`.
        train_counts: how often each token id occurs in `<prefix>_train`, [vocab_size].
        held_out_files: names of the files in `<prefix>_valid`, in its order.
        not_text: names of the files left out because they are not UTF-8.
    """

    tokenizer: dict[str, str]
    train_documents: int
    train_tokens: int
    valid_documents: int
    valid_tokens: int
    train_counts: list[int]
    held_out_files: list[str]
    not_text: list[str]

    @classmethod
    def load(cls, path: Path) -> "Summary":
        """Read `<prefix>.json`.

        Raises:
            ValueError: the file cannot be read or is no summary.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        except ValidationError as error:
            raise ValueError(f"{path}: {explain(error, cls)}") from None


def prepare(inputs: list[Path], output_prefix: Path, tokenizer: Tokenizer, *, suffixes: list[str], held_out: float) -> Summary:
    """Write text files as `<prefix>_train`, `<prefix>_valid` (.bin and .idx) and `<prefix>.json`.

    A file is a document and ends with the tokenizer's end of document; empty files are left out. Which files are
    held out depends on nothing but their names, relative to the folder that holds the input.

    Args:
        inputs: files, taken whatever their suffix, and folders, searched to the bottom.
        output_prefix: folder and first part of the name of every file written.
        tokenizer: see `build_tokenizer`.
        suffixes: what names of files found in folders must end with, such as `.txt`.
        held_out: share of the files to hold out for evaluation, in [0, 1); at least one file unless it is 0.

    Returns:
        What was written, as kept in `<prefix>.json`.

    Raises:
        ValueError: an input is missing or reached twice, no text is found, or nothing would be left to train on.
            Nothing is written then.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: {held_out} is not in [0, 1)")
    files = _find(inputs, suffixes)
    texts = {name: path for name, path in files.items() if _is_text(path)}
    valid = _choose(texts, held_out)
    train = sorted(set(texts) - set(valid))
    if not train:
        raise ValueError(f"{inputs[0]}: {len(texts)} files of text with {held_out} held out leave none to train on")

    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written aside and moved last: a failure on the way leaves what was there before.
    with tempfile.TemporaryDirectory(dir=output_prefix.parent) as folder:
        aside = Path(folder) / output_prefix.name
        train_counts = _write(Path(f"{aside}_train"), (texts[name] for name in train), tokenizer)
        valid_tokens = 0
        if valid:
            valid_tokens = int(_write(Path(f"{aside}_valid"), (texts[name] for name in valid), tokenizer).sum())
        summary = Summary(
            tokenizer=tokenizer.unique_identifiers,
            train_documents=len(train),
            train_tokens=int(train_counts.sum()),
            valid_documents=len(valid),
            valid_tokens=valid_tokens,
            train_counts=train_counts.tolist(),
            held_out_files=valid,
            not_text=sorted(name for name, path in files.items() if name not in texts and path.stat().st_size),
        )
        Path(f"{aside}.json").write_text(summary.model_dump_json(), encoding="utf-8")
        # A held-out dataset of an earlier preparation may hold what is now trained on.
        for suffix in (".bin", ".idx"):
            Path(f"{output_prefix}_valid{suffix}").unlink(missing_ok=True)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, output_prefix.parent / path.name)
    return summary


def python_sources() -> list[Path]:
    """The standard library of the running Python: its modules and packages, without tests and installed packages.

    Raises:
        ValueError: this Python comes without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test"}
    # A link, as Debian has one, is to a file that is there by its own name.
    entries = [path for path in folder.glob("*") if (path.suffix == ".py" or path.is_dir()) and not path.is_symlink()]
    sources = [path for path in sorted(entries) if path.name not in left_out]
    if not any(path.is_file() for path in sources):
        raise ValueError(f"{folder}: this Python has no sources of its standard library here")
    return sources


def _find(inputs: list[Path], suffixes: list[str]) -> dict[str, Path]:
    """Every file by its name relative to the folder that holds the input it was found in."""
    files: dict[str, Path] = {}
    seen: set[Path] = set()
    for given in inputs:
        if not given.exists():
            raise ValueError(f"{given}: no such file or folder")
        root = given.resolve()
        found: Iterable[Path] = [root]
        if root.is_dir():
            found = (path for path in root.rglob("*") if path.is_file() and path.name.endswith(tuple(suffixes)))
        for path in found:
            name = path.relative_to(root.parent).as_posix()
            # Two names for one text could put it on both sides of the split.
            if name in files or path.resolve() in seen:
                raise ValueError(f"{given}: {name} is reached twice; give every file once and no two by the same name")
            files[name] = path
            seen.add(path.resolve())
    if not files:
        raise ValueError(f"{', '.join(map(str, inputs))}: no files with a name that ends with {' or '.join(suffixes)}")
    return files


def _is_text(path: Path) -> bool:
    """Whether a file is UTF-8 and not empty."""
    try:
        return bool(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False


def _choose(names: Iterable[str], held_out: float) -> list[str]:
    """The share of names with the smallest hashes, sorted: a new file moves few others across the split."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest())
    return sorted(ranked[: max(1, round(held_out * len(ranked)))]) if held_out else []


def _write(prefix: Path, paths: Iterable[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Write one dataset and return how often each id occurs, [vocab_size] int64."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for path in paths:
        # Bytes first: reading as text would turn every kind of line end into \n.
        ids = torch.tensor([*tokenizer.tokenize(path.read_bytes().decode("utf-8")), tokenizer.eod])
        counts += np.bincount(ids.numpy(), minlength=tokenizer.vocab_size)
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return counts
