"""Checkpoints: Megatron's distributed format, which any layout can load, with the job beside it as JSON.

A checkpoint is a folder `iter_0000020`, and `latest_checkpointed_iteration.txt` beside it names the latest. Nothing
that a file says is executed: tensors are loaded with `weights_only`, and the one pickle that torch reads without
it is first read by an unpickler that knows the classes of torch's metadata alone.

A run saves its whole state. What `mindspeed-nsa convert` saves is weights alone, and `weights_only` in its `job.json` says so.
"""

import contextlib
import enum
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mindspeed_nsa.pretrain.agreement import agree_on_checkpoint
from mindspeed_nsa.pretrain.job import Job

_LATEST = "latest_checkpointed_iteration.txt"
_REPLACED = ".replaced"
# What may differ between a checkpoint and the job that loads it, because no weight's meaning depends on it.
_FREE = {"seq_length", "max_position_embeddings", "init_method_std", "hidden_dropout", "backend", "strict"}
# Layers may differ in kind, so each is stored under its own number.
_MODEL_METADATA = {"non_homogeneous_layers": True}
# Whether a distributed optimizer stores whole tensors, as one that is not distributed does: from megatron-core 0.16 on.
_ONE_FORMAT = "fully_reshardable" in getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())
# Names of Adam's own copy of a weight.
_COPIES = ("optimizer.state.fp32_param", "optimizer.state.param")
_COPY = re.compile(r"optimizer\.state\.(?:fp32_)?param\.(.+)")
# Megatron-core before 0.16 numbers a rank's optimizers, of which split experts have their own.
_CHAINED = re.compile(r"chained_\d+\.")


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass
class State:
    """What a checkpoint holds of a run: the model without its wrappers, its optimizer and its parameter scheduler.

    `models` are this rank's runs of layers. Tensors are stored under the names of the whole model, whoever holds them.
    """

    models: list[Any]
    optimizer: Any
    scheduler: Any
    progress: Progress

    def sharded(self, *, with_random: bool = True) -> dict[str, Any]:
        """All of it but the optimizer, as Megatron's sharded state dict."""
        sharded = {
            "model": _sharded_weights(self.models),
            "scheduler": self.scheduler.state_dict(),
            "iteration": self.progress.iteration,
            "consumed_samples": self.progress.consumed_samples,
        }
        if with_random:
            ranks = torch.distributed.get_world_size()
            offset = (0, torch.distributed.get_rank(), ranks)
            sharded["random"] = ShardedTensor.from_rank_offsets("random", torch.cat(_random_states()), offset)
        return sharded

    def sharded_optimizer(self, job: Job, *, is_loading: bool = False) -> dict[Any, Any]:
        """The optimizer's as Megatron's sharded state dict, in the format that any layout can load."""
        weights = _sharded_weights(self.models)
        settings: dict[str, Any] = {}
        if _ONE_FORMAT:
            settings = {"metadata": {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}}
        elif job.parallel.use_distributed_optimizer:
            settings = {"sharding_type": "fully_sharded_model_space"}
        sharded = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, **settings)
        for value in nested_values(sharded):
            if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                value.key = _CHAINED.sub("", value.key)
        return sharded


def find(path: str) -> Path:
    """The checkpoint folder that `checkpoint.load` names: itself, or the latest in it.

    Raises:
        ValueError: there is no checkpoint.
    """
    folder = Path(path)
    with contextlib.suppress(OSError, ValueError):
        folder = _folder(folder, int((folder / _LATEST).read_text()))
    for place in (folder, _replaced(folder)):
        if _is_whole(place):
            return place
    raise ValueError(f"checkpoint.load: {path}: no checkpoint there (neither {_LATEST} nor a whole iter_ folder)")


def check(job: Job) -> None:
    """Check, without loading any, that the job can load what it names and may save where it says.

    Raises:
        ValueError: no checkpoint, one of another model, or one in the way of those to be saved.
    """
    if job.checkpoint.load:
        folder = find(job.checkpoint.load)
        stored = stored_job(folder)
        check_model(job, folder, ["model", "nsa"] if _has_weights_only(stored) else list(_sections(job)))
    save, load = job.checkpoint.save, job.checkpoint.load
    ours = save and load and Path(save).resolve() in (Path(load).resolve(), Path(load).resolve().parent)
    if save and not ours and has_checkpoints(save):
        raise ValueError(
            f"checkpoint.save: {save} holds the checkpoints of a run; go on from it with checkpoint.load={save} or "
            "name another folder"
        )


def check_model(job: Job, folder: Path, sections: list[str]) -> None:
    """Check that a checkpoint was saved by a job that says the same in these sections.

    Raises:
        ValueError: it was not.
    """
    stored, wanted = stored_job(folder), _sections(job)
    differences = [
        f"{section}.{key} {stored.get(section, {}).get(key)!r}, not {value!r}"
        for section in sections
        for key, value in wanted[section].items()
        if key not in _FREE and stored.get(section, {}).get(key) != value
    ]
    if differences:
        raise ValueError(f"checkpoint.load: {folder} is of another model: it has {'; '.join(differences[:3])}")


def has_checkpoints(folder: str | Path) -> bool:
    """Whether checkpoints were saved in a folder."""
    return (Path(folder) / _LATEST).exists()


def save(job: Job, state: State) -> Path:
    """Save a checkpoint. Every rank calls it; the folder appears whole or not at all.

    Returns:
        The checkpoint's folder.
    """
    assert job.checkpoint.save
    description = {**_sections(job), "layout": _layout(job)}
    sharded = {**state.sharded(), "optimizer": state.sharded_optimizer(job)}
    return _write(Path(job.checkpoint.save), state.progress.iteration, sharded, description)


def save_weights(job: Job, models: list[Any], root: Path) -> Path:
    """Save a model's weights as a checkpoint of iteration 0 that any layout of the job loads. Every rank calls it.

    Returns:
        The checkpoint's folder.
    """
    return _write(root, 0, {"model": _sharded_weights(models)}, {**_sections(job), "weights_only": True})


def _write(root: Path, iteration: int, sharded: dict[str, Any], description: dict[str, Any]) -> Path:
    # Unlike the name that a killed run wrote to: a process that it left may still be writing.
    names = [_unused_name(root, iteration)]
    torch.distributed.broadcast_object_list(names)
    unfinished, first = root / names[0], torch.distributed.get_rank() == 0
    if first:
        for left in root.glob(".iter_*"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded, str(unfinished))
    if first:
        (unfinished / "job.json").write_text(json.dumps(description), encoding="utf-8")
        _publish(unfinished, root, iteration)
    torch.distributed.barrier()
    return _folder(root, iteration)


def _publish(unfinished: Path, root: Path, iteration: int) -> None:
    """Give a finished checkpoint its place. Whenever it is killed, `find` finds a whole one."""
    folder = _folder(root, iteration)
    if folder.exists():  # a run that went on from an earlier checkpoint comes here again
        shutil.rmtree(_replaced(folder), ignore_errors=True)
        os.replace(folder, _replaced(folder))
    os.replace(unfinished, folder)
    named = root / f".{_LATEST}"
    named.write_text(f"{iteration}\n")
    os.replace(named, root / _LATEST)
    for left in root.glob(f"iter_*{_REPLACED}"):
        shutil.rmtree(left, ignore_errors=True)


def _folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _replaced(folder: Path) -> Path:
    """Where a checkpoint lies while another takes its place."""
    return folder.with_name(folder.name + _REPLACED)


def _unused_name(root: Path, iteration: int) -> str:
    return f".{_folder(root, iteration).name}.{uuid.uuid4().hex[:8]}"


def _is_whole(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() and (folder / "job.json").is_file()


def load(job: Job, state: State) -> str:
    """Load the checkpoint that `checkpoint.load` names into a state. Every rank calls it.

    Returns:
        A line that says what was loaded.

    Raises:
        ValueError: the checkpoint is of another model, its metadata is not what torch writes, or some rank finds another one.
    """
    assert job.checkpoint.load
    folder = find(job.checkpoint.load)
    agree_on_checkpoint(folder)
    stored = stored_job(folder)
    if _has_weights_only(stored):
        load_weights(state.models, folder)
        state.optimizer.reload_model_params()  # its own copies of the weights, where it has some
        return f"loaded {folder} (weights alone, as converted: optimizer, schedule and data start anew)"
    _check_weights(state.models, folder)
    same_layout = stored["layout"] == _layout(job)
    loaded = _read(state.sharded(with_random=same_layout), folder)
    for run, model in enumerate(state.models):
        model.load_state_dict(loaded["model"][str(run)])
    _load_optimizer(job, state, folder, step=loaded["iteration"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.progress.iteration, state.progress.consumed_samples = loaded["iteration"], loaded["consumed_samples"]
    if same_layout:
        _set_random_states(loaded["random"])
    note = "" if same_layout else ", saved on another layout or device: random states start anew"
    return f"loaded {folder} (iteration {state.progress.iteration}{note})"


def load_weights(models: list[Any], folder: Path, new: Collection[str] = ()) -> None:
    """Load a checkpoint's weights into a model. Every rank calls it.

    Args:
        models: this rank's runs of layers, without their wrappers.
        folder: the checkpoint's.
        new: names of weights that the checkpoint does not have; they stay as they are.

    Raises:
        ValueError: the checkpoint is of another model, or its metadata is not what torch writes.
    """
    _check_weights(models, folder, new)
    # Beside weights there are extra states, which hold nothing without Transformer Engine.
    wanted = {
        run: {
            name: value
            for name, value in weights.items()
            if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and name not in new
        }
        for run, weights in _sharded_weights(models).items()
    }
    loaded = _read({"model": wanted}, folder)["model"]
    for run, model in enumerate(models):
        model.load_state_dict(loaded[str(run)], strict=False)


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        with _weights_only():
            return dist_checkpointing.load(wanted, str(folder))
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint.load: {folder}: {str(error).splitlines()[0]}") from None


def _sharded_weights(models: list[Any]) -> dict[str, dict[str, Any]]:
    """By run of layers: a checkpoint's parts are merged by name, which lists of several lengths cannot be."""
    # Copies: Megatron notes this run's process groups in what it is handed.
    sharded = {}
    for run, model in enumerate(models):
        with _current_run(run) if len(models) > 1 else contextlib.nullcontext():
            sharded[str(run)] = model.sharded_state_dict(metadata=dict(_MODEL_METADATA))
    return sharded


@contextlib.contextmanager
def _current_run(run: int) -> Iterator[None]:
    """Tell parallel_state which run is meant: Megatron-core before 0.13 numbers the layers of each from there."""
    before = parallel_state.get_virtual_pipeline_model_parallel_rank()
    parallel_state.set_virtual_pipeline_model_parallel_rank(run)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_rank(before)


def _load_optimizer(job: Job, state: State, folder: Path, step: int) -> None:
    """Load Adam's moments, and its own copies of the weights, whichever kind of optimizer saved them.

    Tensors alone are loaded. What Megatron stores beside them is of the first rank's groups of parameters, and another rank
    or another kind of optimizer has others: what holds of a group, the job says. An iteration is one `step` of Adam.
    """
    if job.parallel.use_distributed_optimizer:
        _start_adam(state.optimizer)
    wanted, own = extract_sharded_base(state.sharded_optimizer(job, is_loading=True))
    stored = _stored_shapes(folder).keys()
    for tensor in nested_values(wanted):
        tensor.key = _stored_name(tensor.key, stored)
    dict_list_map_inplace(lambda value: value.unwrap() if isinstance(value, LocalNonpersistentObject) else value, own)
    merge(own, _read({"tensors": wanted}, folder)["tensors"])
    _set_step(own, step)
    state.optimizer.load_state_dict(own)
    for adam in _torch_adams(state.optimizer):
        for moments in adam.state.values():  # a distributed optimizer loads one tensor into all of them
            moments["step"] = moments["step"].clone()


def _stored_name(name: str, stored: Collection[str]) -> str:
    """The name of an optimizer's tensor in a checkpoint.

    Adam's own copy of a weight goes by two names; in float32 it has none without a distributed optimizer, and the weight
    is its like.
    """
    if name in stored or not (copy := _COPY.fullmatch(name)):
        return name
    names = [f"{kind}.{copy[1]}" for kind in _COPIES]
    return next((other for other in names if other in stored), copy[1])


def _set_step(state: dict[Any, Any], step: int) -> None:
    """Write how often Adam has stepped wherever an optimizer's state says it."""
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                group["step"] = step
        elif key == "state":
            value["common_step"] = torch.tensor(float(step))
        elif isinstance(value, dict):
            _set_step(value, step)


def _start_adam(optimizer: Any) -> None:
    """Give torch's Adam, which has none before its first step, the state that a distributed optimizer loads into."""
    for adam in _torch_adams(optimizer):
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _torch_adams(optimizer: Any) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))]


def _sections(job: Job) -> dict[str, dict[str, Any]]:
    """What a checkpoint and a job that loads it must have in common: the model, and what the optimizer keeps."""
    sections = {
        "model": job.model.model_dump(mode="json"),
        "nsa": job.nsa.model_dump(mode="json") if job.nsa.enabled else {"enabled": False},
        "training": {"bf16": job.training.bf16},
    }
    if not _ONE_FORMAT:
        sections["parallel"] = {"use_distributed_optimizer": job.parallel.use_distributed_optimizer}
    return sections


def _layout(job: Job) -> list[Any]:
    """What random states depend on: the ranks and their kind of device."""
    parallel = job.parallel
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(torch.cuda.current_device()).type
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size)
    return [ranks, *sizes, job.pipeline_runs, device]


def stored_job(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of the job that saved it.

    Raises:
        ValueError: it is not to be read.
    """
    try:
        return json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint.load: {folder / 'job.json'}: {error}") from None


def _has_weights_only(stored: dict[str, Any]) -> bool:
    return stored.get("weights_only", False)


def _check_weights(models: list[Any], folder: Path, new: Collection[str] = ()) -> None:
    """Compare names and shapes of the whole model but for what is new, over all ranks, with what is stored."""
    sharded = _sharded_weights(models)
    apply_factories(sharded)
    mine = {value.key: tuple(value.global_shape) for value in nested_values(sharded) if isinstance(value, ShardedTensor)}
    gathered: list[dict[str, tuple[int, ...]]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, mine)
    wanted = {key: shape for part in gathered for key, shape in part.items() if key not in new}
    found = {key: shape for key, shape in _stored_shapes(folder).items() if not key.startswith(("optimizer.", "random"))}
    differences = [f"it lacks {key}" for key in sorted(wanted.keys() - found.keys())]
    differences += [f"it has {key}" for key in sorted(found.keys() - wanted.keys())]
    differences += [
        f"{key} has shape {list(found[key])}, not {list(wanted[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if wanted[key] != found[key]
    ]
    if differences:
        raise ValueError(f"checkpoint.load: {folder} is of another model: {'; '.join(differences[:3])}")


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a checkpoint, by name."""
    try:
        with (folder / ".metadata").open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint.load: {folder / '.metadata'}: {error}") from None
    return {key: tuple(value.size) for key, value in metadata.state_dict_metadata.items() if hasattr(value, "size")}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of torch's distributed checkpoints and refuses anything else that a pickle can ask for."""

    NAMES: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.planner": {
            "BytesIOWriteData",
            "SavePlan",
            "TensorWriteData",
            "WriteItem",
            "WriteItemType",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in self.NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"refused to load {module}.{name}, which has no place in a checkpoint")
        return super().find_class(module, name)

    @staticmethod
    def _enum_member(kind: Any, name: str) -> enum.Enum:
        """A member of an enum, which Python 3.11.0 to 3.11.3 write as getattr(kind, name). Nothing else is taken."""
        if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
            raise pickle.UnpicklingError(f"refused to take {name!r} from {kind!r}, which has no place in a checkpoint")
        return kind[name]


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make every torch.load weights_only, whatever its caller asks for, as some of Megatron's and torch's do not."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _random_states() -> list[torch.Tensor]:
    """Flat states of this rank's random generators, in a fixed order."""
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return [torch.get_rng_state(), torch.cuda.get_rng_state(), *(tracked[name] for name in sorted(tracked))]


def _set_random_states(states: torch.Tensor) -> None:
    # Copies: a generator reads its state from the start of the storage, whatever the view.
    cpu, device, *tracked = (part.clone() for part in states.split([len(state) for state in _random_states()]))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(dict(zip(sorted(tracker.get_states()), tracked, strict=True)))
    torch.cuda.set_rng_state(device)
    torch.set_rng_state(cpu)
