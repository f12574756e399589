"""The plan of a job on so many nodes, and a sweep of plans."""

import itertools
from pathlib import Path
from typing import NamedTuple

from mindspeed_nsa.memory import Estimate, Parameters, estimate_stage, stage_layers, stage_parameters
from mindspeed_nsa.plan import nearest
from mindspeed_nsa.plan.bounds import Bound, Hardware, TokenFlops, bound, hardware, token_flops
from mindspeed_nsa.plan.wire import Message, step_messages
from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer, padded_vocabulary


class Rank(NamedTuple):
    """What the ranks of a pipeline stage hold, send and take.

    Attributes:
        stage: of the pipeline, from 0.
        layers: counted from 0.
        parameters: that it holds.
        memory: bytes.
        messages: of a step.
        bound: of the time of a step.
    """

    stage: int
    layers: list[int]
    parameters: Parameters
    memory: Estimate
    messages: list[Message]
    bound: Bound


class Plan(NamedTuple):
    """A job on so many ranks.

    Attributes:
        job: the job.
        nodes: that it runs on.
        world_size: its ranks.
        rows: of the embedding.
        flops: of a token.
        ranks: one of each pipeline stage.
    """

    job: Job
    nodes: int
    world_size: int
    rows: int
    flops: TokenFlops
    ranks: list[Rank]

    @property
    def fullest(self) -> Rank:
        """The one that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def step_seconds(self) -> float:
        """What a step takes at least."""
        return max(rank.bound.least for rank in self.ranks)


class Refusal(NamedTuple):
    """A cell of a sweep that cannot run, and why; `length` None: the file's."""

    nodes: int
    length: int | None
    reason: str


def make(job: Job, nodes: int, world_size: int, rows: int, chip: Hardware) -> Plan:
    """Plan a job that `nearest.read` has checked for `world_size`."""
    flops = token_flops(job, rows)
    ranks = []
    for stage in range(job.parallel.pipeline_model_parallel_size):
        memory = estimate_stage(job, world_size, rows, stage)
        messages = step_messages(job, world_size, rows, stage)
        limit = bound(job, world_size, flops, memory, messages, chip)
        held = stage_parameters(job, rows, stage)
        ranks.append(Rank(stage, stage_layers(job, stage), held, memory, messages, limit))
    return Plan(job, nodes, world_size, rows, flops, ranks)


def sweep(
    config: Path,
    overrides: list[str],
    nodes: list[int],
    lengths: list[int] | None,
    ranks_per_node: int,
    trainer: str,
    vocab_size: int | None,
) -> list[Plan | Refusal]:
    """Plan a job on each number of nodes, for each length of its sequences.

    Args:
        config: the job file.
        overrides: `section.key=value` each.
        nodes: numbers of nodes.
        lengths: tokens of a sequence; None: the file's.
        ranks_per_node: dies of a node.
        trainer: `builtin` or `mindspeed`.
        vocab_size: of the tokenizer; None: it is asked.

    Raises:
        ValueError: the file cannot be read, or no cell can run: then one line on the first.
    """
    cells: list[Plan | Refusal] = []
    chip = hardware()
    of_file: list[int | None] = [None]
    for count, length in itertools.product(nodes, lengths or of_file):
        changed = overrides if length is None else [*overrides, f"model.seq_length={length}"]
        try:
            job = nearest.read(config, changed, count * ranks_per_node, trainer)
        except ValueError as error:
            cells.append(Refusal(count, length, str(error)))
            continue
        rows = padded_vocabulary(_vocabulary(job, vocab_size), job.parallel.tensor_model_parallel_size)
        cells.append(make(job, count, count * ranks_per_node, rows, chip))
    if all(isinstance(cell, Refusal) for cell in cells):
        raise ValueError(cells[0].reason)  # type: ignore[union-attr]
    return cells


def _vocabulary(job: Job, given: int | None) -> int:
    data = job.data
    if given is not None:
        return given
    if data.tokenizer_type == "HuggingFaceTokenizer" and not Path(data.tokenizer_model or "").is_file():
        raise ValueError(
            f"data.tokenizer_model: {data.tokenizer_model}: no such file; --vocab-size says how many tokens it has"
        )
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model).vocab_size
