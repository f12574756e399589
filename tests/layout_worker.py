"""One rank of a run whose losses and chosen blocks are compared over layouts: started by `layouts.run`, under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed

from mindspeed_nsa import attention, selection
from mindspeed_nsa.patches import megatron_core
from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.trainer import run


def main(config: str, out: str, spoiled: str, *overrides: str) -> None:
    chosen = _record_ids()
    heads = _record_heads()
    if spoiled != "nothing":
        {"scale": _spoil_scale, "heads": _spoil_heads, "scores": _spoil_scores}[spoiled]()
    run(Job.from_file(config, list(overrides)))
    rank = heads[0] if heads else (0, 0)
    torch.save({"ids": chosen, "first_kv_head": rank[0], "tp_rank": rank[1]}, Path(out) / f"rank{rank[1]}.pt")


def _record_ids() -> list[torch.Tensor]:
    chosen, in_order = [], selection.in_order

    def record(ids: torch.Tensor) -> torch.Tensor:
        chosen.append(in_order(ids))
        return chosen[-1]

    selection.in_order = record
    return chosen


def _record_heads() -> list[tuple[int, int]]:
    heads, init = [], megatron_core.NSACore.__init__

    def record(self, *args, **kwargs):
        init(self, *args, **kwargs)
        heads.append((self.split.first_kv_head, megatron_core.parallel_state.get_tensor_model_parallel_rank()))

    megatron_core.NSACore.__init__ = record
    return heads


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
    choose_together, all_reduce = selection.choose_together, torch.distributed.all_reduce

    def wrong(*args):
        torch.distributed.all_reduce = lambda *_, **__: None
        try:
            return choose_together(*args)
        finally:
            torch.distributed.all_reduce = all_reduce

    selection.choose_together = wrong


if __name__ == "__main__":
    main(*sys.argv[1:])
