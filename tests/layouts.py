"""Run `configs/tiny.yaml` on many layouts and bring back what is compared: the losses, and the blocks that were chosen.

`python tests/layouts.py` runs those that the installed Megatron-core can do and prints the tables of docs/layouts.md and
docs/plan.md; with `--checkpoints` it saves on each, goes on from there on each other, and prints the table of that.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import megatron.core
import torch
import wire
from packaging.version import Version
from ports import free_ports

ROOT = Path(__file__).parent.parent
RANKS = 4
TOLERANCE, BF16_TOLERANCE = 5e-5, 2e-2
_STEP = 2  # micro batches of a step of configs/tiny.yaml


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]
    like: str = "one process"  # the layout whose losses and blocks it must have
    spoiled: str = "nothing"  # a mistake to make on purpose, see `layout_worker`
    needs_new: bool = False  # megatron-core 0.16
    tolerance: float = TOLERANCE  # of a loss

    def plus(self, *overrides: str) -> "Layout":
        return self._replace(overrides=self.overrides + overrides)


class Run(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    ids: dict[tuple[int, int], torch.Tensor]  # by layer and micro batch: [T, all groups, blocks]
    messages: list[wire.Counter[wire.Message]]  # of each rank in the first step


def _parallel(**sizes: object) -> tuple[str, ...]:
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "ep": "expert_model"}
    keys = {short: f"{name}_parallel_size" for short, name in names.items()}
    return tuple(f"parallel.{keys.get(key, key)}={str(value).lower()}" for key, value in sizes.items())


ULYSSES, GATHER = {"cp_comm_type": "a2a"}, {"cp_comm_type": "all_gather"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PACKED = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
# With this seed no token has a second and a third expert that are next to equal: for five steps their logits lie 7e-5 apart at
# least. With that of the others two are 3e-6 apart in the second step, and last bits decide where a layout sends a token.
EXPERTS = (
    "training.seed=5",
    "model.num_experts=4",
    "model.moe_ffn_hidden_size=64",
    "model.moe_shared_expert_intermediate_size=64",
)
SHORT = "model.seq_length=256"  # for what does not depend on blocks that are chosen
ONE_GROUP = ("model.num_query_groups=1",)
BF16 = ("training.bf16=true",)

LAYOUTS = {
    "one process": Layout(1, ()),
    "TP2": Layout(2, _parallel(tp=2)),
    "TP2+SP": Layout(2, _parallel(tp=2, sequence_parallel=True)),
    "TP4 over 2 groups": Layout(4, _parallel(tp=4), needs_new=True),
    "PP2": Layout(2, _parallel(pp=2)),
    "PP2 interleaved": Layout(2, _parallel(pp=2, num_layers_per_virtual_pipeline_stage=1)),
    "DP2 + distributed optimizer": Layout(2, _parallel(use_distributed_optimizer=True)),
    "recompute full": Layout(1, _parallel(**FULL)),
    "recompute selective": Layout(1, _parallel(recompute_granularity="selective")),
    "CP2 Ulysses": Layout(2, _parallel(cp=2, **ULYSSES)),
    "CP4 Ulysses": Layout(4, _parallel(cp=4, **ULYSSES)),
    "CP2 all-gather": Layout(2, _parallel(cp=2, **GATHER)),
    "CP4 all-gather": Layout(4, _parallel(cp=4, **GATHER)),
    "TP2 x PP2": Layout(4, _parallel(tp=2, pp=2)),
    "TP2+SP x CP2 Ulysses": Layout(4, _parallel(tp=2, cp=2, sequence_parallel=True, **ULYSSES)),
    "TP2 x CP2 all-gather": Layout(4, _parallel(tp=2, cp=2, **GATHER)),
    "TP2 x DP2": Layout(4, _parallel(tp=2)),
    "CP2 Ulysses x PP2": Layout(4, _parallel(cp=2, pp=2, **ULYSSES)),
    "TP2+SP, recompute full": Layout(2, _parallel(tp=2, sequence_parallel=True, **FULL)),
    "CP4 Ulysses, recompute selective": Layout(4, _parallel(cp=4, recompute_granularity="selective", **ULYSSES)),
    "CP2 all-gather x PP2": Layout(4, _parallel(cp=2, pp=2, **GATHER)),
    "packed": Layout(1, PACKED),
    "packed, CP2 Ulysses": Layout(2, PACKED + _parallel(cp=2, **ULYSSES), like="packed", needs_new=True),
    "packed, CP4 Ulysses": Layout(4, PACKED + _parallel(cp=4, **ULYSSES), like="packed", needs_new=True),
    "packed, CP2 all-gather": Layout(2, PACKED + _parallel(cp=2, **GATHER), like="packed", needs_new=True),
    "packed, CP4 all-gather": Layout(4, PACKED + _parallel(cp=4, **GATHER), like="packed", needs_new=True),
    "one group": Layout(1, ONE_GROUP),
    "TP4+SP over 1 group": Layout(4, ONE_GROUP + _parallel(tp=4, sequence_parallel=True), like="one group", needs_new=True),
    "TP2 x CP2 Ulysses over 1 group": Layout(4, ONE_GROUP + _parallel(tp=2, cp=2, **ULYSSES), like="one group", needs_new=True),
    "experts": Layout(1, EXPERTS),
    "EP2": Layout(2, EXPERTS + _parallel(ep=2), like="experts"),
    "EP2 x TP2+SP": Layout(
        4, EXPERTS + _parallel(ep=2, tp=2, sequence_parallel=True, expert_tensor_parallel_size=1), like="experts"
    ),
    "bf16": Layout(1, BF16, tolerance=BF16_TOLERANCE),
    "bf16, experts": Layout(1, EXPERTS + BF16, tolerance=BF16_TOLERANCE),
}
LAYOUTS |= {
    f"bf16, {name}": LAYOUTS[name].plus(*BF16)._replace(like=like, tolerance=BF16_TOLERANCE)
    for like, names in {
        "bf16": ("TP2+SP", "CP2 Ulysses", "CP2 all-gather", "PP2", "DP2 + distributed optimizer"),
        "bf16, experts": ("EP2",),
    }.items()
    for name in names
}

ROOTS = {layout.like for layout in LAYOUTS.values()}  # what the others are compared with
NEW = Version(megatron.core.__version__) >= Version("0.16")
LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if NEW or not layout.needs_new}
# Those that load one another's checkpoints: before 0.16 Megatron-core stores a distributed optimizer in a way of its own.
ALIKE = {name: layout for name, layout in LAYOUTS.items() if NEW or "distributed" not in name}

# Mistakes that the comparison has to feel.
SPOILED = {
    "a softmax scale wrong by 5 %": Layout(1, (), spoiled="scale"),
    "heads in a wrong order": Layout(1, (), spoiled="heads"),
}

# A plan is of one document a sequence. What bf16 sends is what float32 sends, in fewer bytes.
COUNTED = {
    name: layout.overrides
    for name, layout in LAYOUTS.items()
    if layout.ranks > 1 and not set(PACKED + BF16) & set(layout.overrides)
}


def run(layouts: dict[str, Layout], folder: Path, data: Path, iterations: int) -> dict[str, Run]:
    """Train on every layout, one after the other in the same processes, which torchrun starts once."""
    jobs = [
        {
            "folder": str(folder / str(number)),
            "ranks": layout.ranks,
            "spoiled": layout.spoiled,
            "port": port,
            "overrides": [
                f"data.data_path={data}",
                f"logging.run_dir={folder / str(number) / 'run'}",
                "logging.tensorboard=false",
                f"training.train_iters={iterations}",
                *layout.overrides,
            ],
        }
        for number, (layout, port) in enumerate(zip(layouts.values(), free_ports(len(layouts)), strict=True))
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [str(ROOT / "tests" / "layout_worker.py"), str(ROOT / "configs" / "tiny.yaml"), str(folder / "jobs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Not into a pipe: processes that write checkpoints outlive a rank that failed, and would keep it open.
    with (folder / "log").open("w") as log:
        seconds = 900 + 10 * iterations * len(jobs)
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=seconds, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-20000:]
    return {name: _read(Path(job["folder"])) for name, job in zip(layouts, jobs, strict=True)}


def with_checkpoints(layouts: dict[str, Layout], folder: Path, pairs: Iterable[tuple[str, str]]) -> dict[str, Layout]:
    """The layouts, which save after each step, and for each pair the second as it goes on from the first one's first step.

    It goes on for two steps: the loss of the one feels the weights, that of the other Adam's moments too. Layouts that others
    are compared with go as far.
    """
    places = {name: folder / re.sub(r"\W+", "-", name) for name in layouts}
    far = "training.train_iters=3"
    saving = {
        name: layout.plus(f"checkpoint.save={places[name]}", "checkpoint.save_interval=1", *[far] * (name in ROOTS))
        for name, layout in layouts.items()
    }
    loading = {
        f"{source} -> {name}": layouts[name].plus(f"checkpoint.load={places[source] / 'iter_0000001'}", far)
        for source, name in pairs
    }
    return saving | loading


def families(layouts: dict[str, Layout]) -> list[list[str]]:
    """Names of layouts by the one that they are compared with, which is the first: they can load one another's checkpoints."""
    like = {name: name if name in ROOTS else layout.like for name, layout in layouts.items()}
    return [[root, *(name for name in layouts if like[name] == root != name)] for root in dict.fromkeys(like.values())]


def worst(run: Run, like: Run) -> float:
    """The largest difference of any step's loss; the other may have gone on for longer."""
    return _apart(run.losses, like.losses[: len(run.losses)])


def worst_after_loading(run: Run, like: Run) -> float:
    """The same for a run that went on from what another saved after its first step."""
    return _apart(run.losses, like.losses[1:])


def _apart(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def same_ids(run: Run, like: Run) -> bool:
    """Whether the same blocks were chosen in the first step, on every layer, for every query of every micro batch."""
    return run.ids.keys() <= like.ids.keys() and not other_ids(run, like, _STEP)


def other_ids(run: Run, like: Run, micro_batches: int | None = None) -> float:
    """The share of queries, of the first micro batches or all, with other blocks.

    After the first step a few may differ: there Adam makes a whole step of the last bits of tiny gradients, so that weights
    differ, and scores that are next to equal change places.
    """
    rows = [
        (ids != like.ids[layer, number]).any(dim=-1).flatten()
        for (layer, number), ids in run.ids.items()
        if micro_batches is None or number < micro_batches
    ]
    return torch.cat(rows).float().mean().item()


def table(runs: dict[str, Run]) -> Iterable[str]:
    """The table of docs/layouts.md."""
    yield "| layout | ranks | as | largest difference of a loss | queries with other blocks: first step | all steps |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, layout in (LAYOUTS | SPOILED).items():
        if name in ROOTS:
            continue
        mine, like = runs[name], runs[layout.like]
        figures = worst(mine, like), other_ids(mine, like, _STEP), other_ids(mine, like)
        cells = [name, str(layout.ranks), layout.like, *(f"{figure:.1e}" if figure else "0" for figure in figures)]
        yield f"| {' | '.join(cells)} |"


def _read(folder: Path) -> Run:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return Run([row["loss"] for row in rows], [row["grad_norm"] for row in rows], _ids(folder), _messages(folder))


def _ids(folder: Path) -> dict[tuple[int, int], torch.Tensor]:
    """Put together what the ranks chose, each for its groups and tokens."""
    whole: dict[tuple[int, int], torch.Tensor] = {}
    for file in sorted(folder.glob("rank*.pt")):
        for record in torch.load(file, weights_only=True):
            shape = (record["tokens"], record["groups"], record["ids"].shape[-1])
            ids = whole.setdefault((record["layer"], record["micro_batch"]), torch.full(shape, -1, dtype=torch.int32))
            rows = torch.cat([torch.arange(*span) for span in record["spans"]])
            for group, own in enumerate(record["ids"].unbind(1), start=record["first_group"]):
                known = ids[rows, group]
                assert bool(((known == -1) | (known == own)).all()), "ranks of one group chose differently"
                ids[rows, group] = own
    assert all(bool((ids >= 0).all()) for ids in whole.values()), "some queries have no rank"
    return whole


def checkpoint_table(runs: dict[str, Run]) -> Iterable[str]:
    """The table of docs/layouts.md of runs that went on from one another's checkpoints, in all pairs of a family."""
    yield "| layout | loads each other's | is loaded by each other |"
    yield "| --- | --- | --- |"
    for family in families(ALIKE):
        apart = {
            (source, name): worst_after_loading(runs[f"{source} -> {name}"], runs[family[0]])
            for source, name in itertools.product(family, repeat=2)
        }
        for name in family:
            loads, is_loaded = (max(far for pair, far in apart.items() if pair[side] == name) for side in (1, 0))
            yield f"| {name} | {loads:.1e} | {is_loaded:.1e} |"


def _messages(folder: Path) -> list[wire.Counter[wire.Message]]:
    return [wire.read(folder / f"wire{rank}.json") for rank in range(len(list(folder.glob("wire*.json"))))]


def main() -> None:
    from texts import prepare_text

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_text(folder, (1, 3, 40, 700, 3000), held_out=0).with_name("python_train")
        if sys.argv[1:] == ["--checkpoints"]:
            layouts = {name: layout.plus(SHORT) for name, layout in ALIKE.items()}
            pairs = [pair for family in families(layouts) for pair in itertools.product(family, repeat=2)]
            print(*checkpoint_table(run(with_checkpoints(layouts, folder, pairs), folder, data, iterations=1)), sep="\n")
            return
        runs = run(LAYOUTS | SPOILED, folder, data, iterations=5)
    print(*table(runs), sep="\n", end="\n\n")
    print(*wire.table({name: runs[name].messages for name in COUNTED}, COUNTED), sep="\n")


if __name__ == "__main__":
    main()
