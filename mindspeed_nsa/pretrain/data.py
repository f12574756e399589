"""Megatron's indexed datasets as batches: checked before use, in one order on every layout, resumed exactly."""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.prepare import Summary
from mindspeed_nsa.pretrain.tokenizer import Tokenizer

# The layout of an .idx file: magic, version, code of the token type, counts of sequences and of document ends.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Bytes in an .idx file per sequence (int32 length, int64 offset) and per document end (int64).
_SEQUENCE_BYTES, _DOCUMENT_BYTES = 12, 8


def check_dataset(prefix: str) -> int:
    """Check that `<prefix>.idx` and `<prefix>.bin` are whole, by their sizes, and count their tokens.

    Raises:
        ValueError: a file is missing, is no dataset, or has not the bytes that it should.
    """
    index, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, binary):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; `mindspeed-nsa prepare` writes datasets")
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"{index}: truncated: expected at least {_HEADER.size} bytes, found {len(header)}")
        magic, version, code, sequences, documents = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or code not in _TOKEN_TYPES:
            raise ValueError(f"{index}: not the index of a Megatron dataset")
        _check_size(index, _HEADER.size + sequences * _SEQUENCE_BYTES + documents * _DOCUMENT_BYTES)
        tokens = int(np.fromfile(stream, dtype=np.int32, count=sequences).sum(dtype=np.int64))
    _check_size(binary, tokens * np.dtype(_TOKEN_TYPES[code]).itemsize)
    return tokens


def summary_of(prefix: str) -> Summary | None:
    """The summary that `prepare` left beside a dataset, None for a dataset that something else wrote.

    Args:
        prefix: the dataset, `<prepared prefix>_train` or `<prepared prefix>_valid`.
    """
    path = Path(f"{prefix.removesuffix('_train').removesuffix('_valid')}.json")
    return Summary.load(path) if path.is_file() else None


def build_datasets(job: Job, tokenizer: Tokenizer, train_samples: int, valid_samples: int) -> tuple[Dataset, Dataset | None]:
    """Build Megatron's GPTDataset for training and evaluation. Every rank calls it and gets the same.

    Training goes over the data in as many shuffled epochs as its samples take; evaluation never repeats any.

    Args:
        job: its `data` section, `model.seq_length` and `training.seed`.
        tokenizer: the one the data was prepared with.
        train_samples: sequences that the run trains on, from its start.
        valid_samples: sequences in one evaluation; 0 builds no dataset for it.

    Returns:
        The two datasets, of at least that many samples, the second None if `valid_samples` is 0.

    Raises:
        ValueError: a file is missing or truncated, was prepared with another tokenizer, or holds too few tokens.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    data, length = job.data, job.model.seq_length
    prefixes = [data.data_path]
    _check_tokens("data_path", data.data_path, length, samples=1, tokenizer=tokenizer)
    if valid_samples:
        assert data.valid_data_path is not None, "a job with evaluation has held-out data"
        prefixes.append(data.valid_data_path)
        _check_tokens("valid_data_path", data.valid_data_path, length, samples=valid_samples, tokenizer=tokenizer)
    config = GPTDatasetConfig(
        random_seed=job.training.seed,
        sequence_length=length,
        blend_per_split=[([prefix], None) for prefix in prefixes] + [None] * (3 - len(prefixes)),
        path_to_cache=str(_cache(prefixes, data.data_cache_path)),
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [train_samples, valid_samples, 0], lambda: True, config)
    train, valid, _ = builder.build()
    return train, valid


def batches(
    dataset: Dataset,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Micro batches of one data-parallel rank, in the dataset's order, from a given sample on.

    The ranks share each run of `micro_batch_size * data_parallel_size` samples. What follows `consumed_samples`
    is the same whether it was reached in this process or before a restart.

    Args:
        dataset: what `build_datasets` gave.
        consumed_samples: samples that all ranks together have had before.
        micro_batch_size: sequences in a micro batch.
        data_parallel_rank: this rank among those that see different samples.
        data_parallel_size: how many of those there are.
        num_workers: processes that read ahead; 0 reads in this one.

    Yields:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
        `[micro_batch_size, seq_length]`.

    Raises:
        ValueError: more samples are asked for than the dataset has.
    """
    total = len(dataset)  # type: ignore[arg-type]
    stride = micro_batch_size * data_parallel_size
    first = consumed_samples + data_parallel_rank * micro_batch_size
    # A stride that not all ranks can fill is given to none: the others would wait for the one that stopped.
    steps = max(0, total - consumed_samples) // stride
    yield from DataLoader(
        dataset,
        batch_sampler=(list(range(start, start + micro_batch_size)) for start in range(first, first + steps * stride, stride)),
        num_workers=num_workers,
        # A generator of its own: the loader would draw its seed from the global one, which dropout uses.
        generator=torch.Generator(),
    )
    raise ValueError(
        f"data: all {total} samples are used up: {stride} more were asked for after {consumed_samples + steps * stride}"
    )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        state = "truncated" if found < expected else "damaged"
        raise ValueError(f"{path}: {state}: expected {expected} bytes, found {found}")


def _check_tokens(key: str, prefix: str, seq_length: int, *, samples: int, tokenizer: Tokenizer) -> None:
    tokens = check_dataset(prefix)
    # A sample's labels take one token more than the sample.
    if tokens < samples * seq_length + 1:
        raise ValueError(
            f"data.{key}: {prefix} holds {tokens} tokens, {samples} sequences of seq_length {seq_length} need "
            f"{samples * seq_length + 1}"
        )
    summary = summary_of(prefix)
    if summary and summary.tokenizer != tokenizer.unique_identifiers:
        raise ValueError(
            f"data.{key}: {prefix} was prepared with tokenizer {summary.tokenizer}, the job's is {tokenizer.unique_identifiers}"
        )


def _cache(prefixes: list[str], folder: str | None) -> Path:
    """Where Megatron keeps its shuffled indices: by content, because it names them by path alone."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        digest.update(Path(f"{prefix}.idx").read_bytes())
    return Path(folder or Path(prefixes[0]).parent / "cache") / digest.hexdigest()[:16]
