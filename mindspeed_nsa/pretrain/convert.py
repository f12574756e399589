"""Weights of a dense model as the checkpoint that an NSA job starts from."""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from mindspeed_nsa.patches.megatron_core import NSACore, NSASelfAttention
from mindspeed_nsa.pretrain import checkpoint
from mindspeed_nsa.pretrain.huggingface import HuggingFaceModel
from mindspeed_nsa.pretrain.job import Job, ParallelSection
from mindspeed_nsa.pretrain.model import build_models
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer, padded_vocabulary
from mindspeed_nsa.pretrain.trainer import ranks

# What an attention has beside a dense one's parameters, where its core is NSA's.
_ADDED = ("linear_branch_kv.", "linear_gate.", "core_attention.")

# Reads weights into a model, but for those named; returns what was dropped or padded, a line each.
_Reader = Callable[[GPTModel, Collection[str]], list[str]]


def convert(job: Job, load: Path, save: Path) -> list[str]:
    """Convert a dense model in this process alone. Nothing is written unless all of it fits.

    What NSA adds starts as the job draws it, except for the keys and values of the compress and window branches, which
    start as copies of the dense ones.

    Args:
        job: the job that is to start from the checkpoint.
        load: a checkpoint of a dense job, as in `checkpoint.load`, or a folder of a Hugging Face model.
        save: folder for the checkpoint.

    Returns:
        What was copied, what is new, what was dropped and where the checkpoint is, a line each.

    Raises:
        ValueError: there is nothing to convert, it is not of the job's model, or checkpoints are in its way.
    """
    if checkpoint.has_checkpoints(save):
        raise ValueError(f"--save: {save} holds checkpoints; name another folder")
    vocab_size = build_tokenizer(job.data.tokenizer_type, job.data.tokenizer_model).vocab_size
    read = _reader(job, load, vocab_size)
    alone = job.model_copy(update={"parallel": ParallelSection()})
    with ranks(alone):
        model = build_models(alone, padded_vocabulary(vocab_size, job.parallel.tensor_model_parallel_size))[0]
        added = _added_parameters(model)
        notes = read(model, added)
        copies = _copy_key_value(model)
        folder = checkpoint.save_weights(job, [model], save)
    copied = [parameter for name, parameter in model.named_parameters() if name not in added]
    return [
        f"copied: {len(copied)} parameters with {sum(parameter.numel() for parameter in copied):,} values",
        *_listed("copied again, keys and values of linear_qkv", copies),
        *_listed(f"new, drawn with seed {job.training.seed}", [name for name in added if name not in copies]),
        *notes,
        f"saved {folder}; checkpoint.load={save} starts from it",
    ]


def _reader(job: Job, load: Path, vocab_size: int) -> _Reader:
    """Check what is to be converted against the job."""
    if (load / "config.json").is_file():
        source = HuggingFaceModel(load)
        source.check(job, vocab_size)
        return source.load_into
    folder = checkpoint.find(str(load))
    if checkpoint.stored_job(folder)["nsa"]["enabled"]:
        raise ValueError(f"--load: {folder} is of an NSA job already; expected a dense one's")
    checkpoint.check_model(job, folder, ["model"])
    return functools.partial(_read_checkpoint, folder)


def _read_checkpoint(folder: Path, model: GPTModel, new: Collection[str]) -> list[str]:
    checkpoint.load_weights([model], folder, new)
    return [] if checkpoint.stored_job(folder).get("weights_only") else ["dropped: optimizer, schedule and random states"]


def _added_parameters(model: GPTModel) -> list[str]:
    """Names of the parameters that the dense model does not have."""
    return [
        f"{path}.{name}"
        for path, attention in model.named_modules()
        if isinstance(getattr(attention, "core_attention", None), NSACore)
        for name, _ in attention.named_parameters()
        if name.startswith(_ADDED)
    ]


@torch.no_grad()
def _copy_key_value(model: GPTModel) -> list[str]:
    """Copy the dense keys and values to the compress and window branches; the names of what they were copied to."""
    copies = []
    for path, attention in model.named_modules():
        if not isinstance(attention, NSASelfAttention) or attention.linear_branch_kv is None:
            continue
        for name, branches in attention.linear_branch_kv.named_parameters():
            # A group's rows of linear_qkv are queries, key, value; here they are a key and a value for each branch.
            dense = attention.linear_qkv.get_parameter(name).unflatten(0, (attention.split.kv_head_num, -1))
            key_value = dense[:, -(attention.qk_dim + attention.v_dim) :]
            branches.copy_(torch.cat([key_value, key_value], dim=1).flatten(0, 1))
            copies.append(f"{path}.linear_branch_kv.{name}")
    return copies


def _listed(what: str, names: Iterable[str]) -> list[str]:
    """One line that counts the parameters of a name over the layers; none without parameters."""
    counts = Counter(name.partition("self_attention.")[2] for name in names)
    return [f"{what}: {', '.join(f'{count} x {name}' for name, count in counts.items())}"] if counts else []
