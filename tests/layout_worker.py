"""One rank of runs whose losses and chosen blocks are compared over layouts: started by `layouts.run`, under torchrun."""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import wire

MESSAGES = wire.watch()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

from mindspeed_nsa import attention, selection, shared_groups  # noqa: E402
from mindspeed_nsa.patches import megatron_core  # noqa: E402
from mindspeed_nsa.pretrain.job import Job  # noqa: E402
from mindspeed_nsa.pretrain.model import SeededTransformerLayer  # noqa: E402
from mindspeed_nsa.pretrain.trainer import Trainer, run  # noqa: E402


def main(config: str, jobs: str) -> None:
    """Run the jobs that this rank has a part in, each in a process of its own: what one leaves behind meets no other."""
    fork = multiprocessing.get_context("fork")
    for job in json.loads(Path(jobs).read_text()):
        if int(os.environ["RANK"]) < job["ranks"]:
            process = fork.Process(target=_run, args=(config, job))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{job['folder']}: exit code {process.exitcode}")


def _run(config: str, job: dict[str, Any]) -> None:
    rank = os.environ["RANK"]
    # The ranks of each job find one another anew.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ |= {"WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    # Megatron's helper for saving: started as it does it, it would import torch again.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    records, steps = _record_ids(), _count_steps()
    _SPOIL[job["spoiled"]]()
    run(Job.from_file(config, job["overrides"]))
    torch.save(records, Path(job["folder"]) / f"rank{rank}.pt")
    wire.write(steps[0], Path(job["folder"]) / f"wire{rank}.json")


def _record_ids() -> list[dict[str, Any]]:
    """Note what every core chooses, where gradients are taken: once a layer and micro batch, recomputed or not."""
    records: list[dict[str, Any]] = []
    chosen: list[torch.Tensor] = []
    attend, of_part = megatron_core.NSACore._attend, attention.NativeSparseAttention._attend
    init = SeededTransformerLayer.__init__

    def number(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.self_attention.core_attention.layer_number = self.layer_number

    def note(self: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, ids = of_part(self, *inputs)
        chosen.append(selection.in_order(ids))
        return out, ids

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

    megatron_core.NSACore._attend, attention.NativeSparseAttention._attend = record, note
    SeededTransformerLayer.__init__ = number
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


def _spoil_scale() -> None:
    init = attention.NativeSparseAttention.__init__

    def wrong(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.scale *= 1.05

    attention.NativeSparseAttention.__init__ = wrong


def _spoil_heads() -> None:
    forward = attention.NativeSparseAttention.forward
    attention.NativeSparseAttention.forward = lambda self, query, *rest: forward(self, query.roll(1, dims=1), *rest)


def _spoil_scores() -> None:
    """Ranks that share a group do not sum their scores."""
    choose_together, all_reduce = shared_groups.choose_together, torch.distributed.all_reduce

    def wrong(*args):
        torch.distributed.all_reduce = lambda *_, **__: None
        try:
            return choose_together(*args)
        finally:
            torch.distributed.all_reduce = all_reduce

    shared_groups.choose_together = wrong


_SPOIL = {"nothing": lambda: None, "scale": _spoil_scale, "heads": _spoil_heads, "scores": _spoil_scores}


if __name__ == "__main__":
    main(*sys.argv[1:])
