"""What all ranks of a run must have in common, compared before they depend on it: a difference would hang or mislead."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed

from mindspeed_nsa.pretrain.job import DataSection, Job

# What a node may have its own way: places of files. That the data are the same is seen in the data.
_OWN = {"data_path", "valid_data_path", "data_cache_path", "tokenizer_model", "run_dir"}


def agree_on_job(job: Job) -> None:
    """Check that every rank was started with the same job. Every rank calls it, before any group is made of its sizes.

    Raises:
        ValueError: some rank has another setting; one line that names rank, key and both values.
    """
    sections = job.model_dump(mode="json").items()
    _agree({f"{section}.{key}": value for section, values in sections for key, value in values.items() if key not in _OWN})


def agree_on_data(data: DataSection) -> None:
    """Check that the data are the same on every rank. Every rank calls it, before datasets are built.

    Raises:
        ValueError: on some rank they differ; one line that names rank and key.
    """
    prefixes = {key: getattr(data, key) for key in ("data_path", "valid_data_path")}
    _agree({f"contents of data.{key}": _contents(prefix) for key, prefix in prefixes.items() if prefix})


def agree_on_order(datasets: Mapping[str, Any]) -> None:
    """Check that every rank reads the same samples in the same order. Every rank calls it once they are built.

    Args:
        datasets: Megatron's GPTDatasets, by the keys that name them in the job.

    Raises:
        ValueError: some rank's data or its order differ; one line that names rank and key.
    """
    _agree({f"order of {key}": _digest(dataset) for key, dataset in datasets.items() if dataset is not None})


def agree_on_checkpoint(folder: Path) -> None:
    """Check that every rank has found the same checkpoint. Every rank calls it, before any loads it.

    Args:
        folder: the checkpoint's; on disks of their own, nodes may have another latest.

    Raises:
        ValueError: some rank has another one; one line that names rank and checkpoint.
    """
    _agree({"checkpoint.load": folder.name})


def _agree(mine: dict[str, Any]) -> None:
    ranks: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, mine)
    if different := list(_differences(ranks)):
        raise ValueError(f"the ranks of a run need the same job and data: {'; '.join(different[:3])}")


def _differences(ranks: list[dict[str, Any]]) -> Iterable[str]:
    for rank, theirs in enumerate(ranks):
        for key in sorted(theirs.keys() | ranks[0].keys()):
            if theirs.get(key) != ranks[0].get(key):
                yield f"rank {rank} has {key} {theirs.get(key)!r}, rank 0 has {ranks[0].get(key)!r}"


def _contents(prefix: str) -> str:
    return hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()[:12]


def _digest(dataset: Any) -> str:
    """Of the order of samples, and of what they hold at both ends."""
    part = dataset.datasets[0] if hasattr(dataset, "datasets") else dataset
    digest = hashlib.sha256()
    for index in (part.document_index, part.sample_index, part.shuffle_index):
        digest.update(np.ascontiguousarray(index).tobytes())
    for sample in (0, len(dataset) - 1):
        digest.update(dataset[sample]["tokens"].numpy().tobytes())
    return digest.hexdigest()[:12]
