"""Jobs that can run on so many ranks; of those that cannot, the nearest that can."""

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mindspeed_nsa.config import Section
from mindspeed_nsa.pretrain.job import Job, ModelSection, ParallelSection, TrainingSection, read_content

# What a plan is of: the trainer here on megatron-core 0.16, MindSpeed on 0.12.
_VERSIONS = {"builtin": (0, 16), "mindspeed": (0, 12)}
# The keys of a layout that have nearest values.
_SECTIONS: dict[str, type[Section]] = {"model": ModelSection, "parallel": ParallelSection, "training": TrainingSection}
_KEYS = ("seq_length", "num_layers", "global_batch_size", "micro_batch_size", *ParallelSection.model_fields)
_FARTHEST = 1024


def read(config: Path, overrides: Iterable[str], world_size: int, trainer: str) -> Job:
    """Read a job file for so many ranks.

    Args:
        config: the job file.
        overrides: `section.key=value` each.
        world_size: the ranks.
        trainer: `builtin`, this project's, or `mindspeed`.

    Raises:
        ValueError: it cannot run; one line that names the file, the key, what is allowed, and the nearest values that can.
    """
    content = read_content(config, overrides)
    try:
        return _check(content, world_size, trainer)
    except ValueError as error:
        near = ", ".join(_nearest(content, str(error), world_size, trainer))
        raise ValueError(f"{config}: {error}{f'; the nearest that can: {near}' if near else ''}") from None


def _check(content: dict[str, Any], world_size: int, trainer: str) -> Job:
    job = Job(**content)
    if trainer == "mindspeed":
        job.check_mindspeed()
    else:
        job = job.model_copy(update={"megatron": {}})  # which the trainer here does not read
    job.check_layout(world_size, _VERSIONS[trainer])
    return job


def _nearest(content: dict[str, Any], error: str, world_size: int, trainer: str) -> Iterator[str]:
    """For each key that an error names, the next values below and above with which the job can run."""
    for section, kind in _SECTIONS.items():
        values = content.get(section) or {}
        for key in kind.model_fields if isinstance(values, dict) else ():
            given = values.get(key, kind.model_fields[key].default)
            # `context_parallel_size`, or in words `a context-parallel rank`
            words = key.removesuffix("_parallel_size").removesuffix("_model") + "-parallel"
            if key not in _KEYS or not re.search(rf"\b({key}|{words})\b", error) or type(given) is not int:
                continue
            found = [_next(content, section, key, step, world_size, trainer) for step in (-1, 1)]
            near = " or ".join(str(value) for value in found if value is not None)
            if near:
                yield f"{section}.{key} {near}"


def _next(content: dict[str, Any], section: str, key: str, step: int, world_size: int, trainer: str) -> int | None:
    """The next value of a key, in steps of -1 or 1, with which the job can run."""
    changed = copy.deepcopy(content)
    values = changed[section] = changed.get(section) or {}
    given = values.get(key, _SECTIONS[section].model_fields[key].default)
    for value in range(given + step, max(given + step * _FARTHEST, 0) if step < 0 else given + _FARTHEST, step):
        values[key] = value
        try:
            _check(changed, world_size, trainer)
        except ValueError:
            continue
        return value
    return None
