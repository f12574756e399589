"""One rank of runs whose losses and chosen blocks are compared over layouts: started by `layouts.run`, under torchrun."""

import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import wire

MESSAGES = wire.watch()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.strategies import base as saving  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

from mindspeed_nsa import attention, selection, shared_groups  # noqa: E402
from mindspeed_nsa.patches import megatron_core  # noqa: E402
from mindspeed_nsa.pretrain.job import Job  # noqa: E402
from mindspeed_nsa.pretrain.model import SeededTransformerLayer  # noqa: E402
from mindspeed_nsa.pretrain.trainer import Trainer, run  # noqa: E402


def main(config: str, jobs: str) -> None:
    rank = int(os.environ["RANK"])
    # The ranks of each job find one another anew.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    # Megatron's helper for saving: started as it does it, it would import torch again.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    records = _record_ids()
    steps = _count_steps()
    for job in json.loads(Path(jobs).read_text()):
        if rank >= job["ranks"]:
            continue
        os.environ |= {"WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        records.clear()
        steps.clear()
        megatron_core._group_of.cache_clear()
        # Megatron-core 0.12 forgets these neither when groups are destroyed nor when they are made anew without this rank.
        parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
        saving.async_calls = type(saving.async_calls)()  # it counts saves, of which ranks have done different numbers
        undo = _SPOIL[job["spoiled"]]()
        run(Job.from_file(config, job["overrides"]))
        undo()
        torch.save(records, Path(job["folder"]) / f"rank{rank}.pt")
        wire.write(steps[0], Path(job["folder"]) / f"wire{rank}.json")
        gc.collect()  # what still holds the groups that were destroyed, whose threads wake a hundred times a second


def _record_ids() -> list[dict[str, Any]]:
    """Note what every core chooses, where gradients are taken: once a layer and micro batch, recomputed or not."""
    records: list[dict[str, Any]] = []
    chosen: list[torch.Tensor] = []
    in_order, attend, init = selection.in_order, megatron_core.NSACore._attend, SeededTransformerLayer.__init__

    def number(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.self_attention.core_attention.layer_number = self.layer_number

    def note(ids: torch.Tensor) -> torch.Tensor:
        chosen.append(in_order(ids))
        return chosen[-1]

    def record(self: Any, *inputs: Any) -> torch.Tensor:
        chosen.clear()
        out = attend(self, *inputs)
        *_, ends, spans = inputs
        if not torch.is_grad_enabled():
            return out
        layer = self.layer_number
        seen = sum(record["layer"] == layer for record in records)
        records.append(
            {
                "layer": layer,
                "micro_batch": seen * parallel_state.get_data_parallel_world_size() + parallel_state.get_data_parallel_rank(),
                "first_group": self.split.first_kv_head + (self.run_split is not self.split) * self.run_split.first_kv_head,
                "groups": self.groups,
                "tokens": ends[-1],
                "spans": spans or [(0, ends[-1])],
                "ids": torch.cat(chosen),
            }
        )
        return out

    selection.in_order, megatron_core.NSACore._attend, SeededTransformerLayer.__init__ = note, record, number
    return records


def _count_steps() -> list[wire.Counter[wire.Message]]:
    """Note what this rank sends in each step."""
    steps: list[wire.Counter[wire.Message]] = []
    iterate = Trainer._iterate

    def count(self: Any, data: Any) -> Any:
        MESSAGES.clear()
        done = iterate(self, data)
        steps.append(MESSAGES.copy())
        return done

    Trainer._iterate = count
    return steps


def _spoil_nothing() -> Callable[[], None]:
    return lambda: None


def _spoil_scale() -> Callable[[], None]:
    init = attention.NativeSparseAttention.__init__

    def wrong(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.scale *= 1.05

    attention.NativeSparseAttention.__init__ = wrong
    return lambda: setattr(attention.NativeSparseAttention, "__init__", init)


def _spoil_heads() -> Callable[[], None]:
    forward = attention.NativeSparseAttention.forward
    attention.NativeSparseAttention.forward = lambda self, query, *rest: forward(self, query.roll(1, dims=1), *rest)
    return lambda: setattr(attention.NativeSparseAttention, "forward", forward)


def _spoil_scores() -> Callable[[], None]:
    """Ranks that share a group do not sum their scores."""
    choose_together, all_reduce = shared_groups.choose_together, torch.distributed.all_reduce

    def wrong(*args):
        torch.distributed.all_reduce = lambda *_, **__: None
        try:
            return choose_together(*args)
        finally:
            torch.distributed.all_reduce = all_reduce

    shared_groups.choose_together = wrong
    return lambda: setattr(shared_groups, "choose_together", choose_together)


_SPOIL = {"nothing": _spoil_nothing, "scale": _spoil_scale, "heads": _spoil_heads, "scores": _spoil_scores}


if __name__ == "__main__":
    main(*sys.argv[1:])
