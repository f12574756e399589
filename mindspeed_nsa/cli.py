"""The `mindspeed-nsa` command."""

import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Native Sparse Attention for Megatron-core.")

# The class of every fault in the arguments; typer exports it under no name of its own.
_UsageError: Any = typer.BadParameter.__base__


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what a user got wrong is one line on stderr and exit code 2."""
    # Megatron-core says so several times on import; here it is no news.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except _UsageError as error:
        message = error.format_message()
    except (ValueError, OSError) as error:
        message = str(error)
    print(f"mindspeed-nsa: {message}", file=sys.stderr)
    sys.exit(2)


@app.command()
def prepare(
    inputs: Annotated[list[Path] | None, typer.Argument(help="Text files, and folders of them.")] = None,
    *,
    output_prefix: Annotated[Path, typer.Option(help="What is written is PREFIX_train and PREFIX_valid.")],
    python_sources: Annotated[bool, typer.Option("--python-sources", help="Take the standard library of this Python.")] = False,
    suffixes: Annotated[
        list[str] | None, typer.Option("--suffix", help="What to take from folders; may be repeated. [.txt and .md]")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the files held out for evaluation; 0 for none.")] = 0.05,
    tokenizer_type: Annotated[str, typer.Option(help="ByteTokenizer or HuggingFaceTokenizer.")] = "ByteTokenizer",
    tokenizer_model: Annotated[str | None, typer.Option(help="The tokenizer.json of a HuggingFaceTokenizer.")] = None,
) -> None:
    """Turn text into the datasets that Megatron trains on (.bin and .idx), one document a file."""
    from mindspeed_nsa.pretrain import prepare as preparing
    from mindspeed_nsa.pretrain.tokenizer import build_tokenizer

    sources = list(inputs or [])
    if python_sources:
        sources += preparing.python_sources()
        suffixes = [*(suffixes or []), ".py"]
    if not sources:
        raise ValueError("prepare: give text files or folders, or --python-sources")
    summary = preparing.prepare(
        sources,
        output_prefix,
        build_tokenizer(tokenizer_type, tokenizer_model),
        suffixes=suffixes or [".txt", ".md"],
        held_out=held_out,
    )
    print(f"{output_prefix}_train: {summary.train_documents} documents, {summary.train_tokens:,} tokens")
    if summary.valid_documents:
        print(f"{output_prefix}_valid: {summary.valid_documents} documents, {summary.valid_tokens:,} tokens")
    if summary.not_text:
        print(f"left out, not UTF-8: {len(summary.not_text)} files, the first is {summary.not_text[0]}")


@app.command()
def summary(run_dir: Annotated[Path, typer.Argument(help="The run's logging.run_dir.")]) -> None:
    """Say what a run has learned."""
    from mindspeed_nsa.pretrain.summary import describe

    print(describe(run_dir))


@app.command()
def plot(
    run_dirs: Annotated[list[Path], typer.Argument(help="The runs' logging.run_dir.")],
    output: Annotated[Path, typer.Option(help="The picture, a PNG.")],
) -> None:
    """Draw the loss of runs."""
    from mindspeed_nsa.pretrain.summary import plot as draw

    draw(run_dirs, output)
    print(output)


_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="In place of the file's.")]
_Trainer = Annotated[
    Literal["mindspeed", "builtin"],
    typer.Option(help="Megatron-LM's pretrain_gpt under MindSpeed, or this project's own."),
]


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="The folder for bench.md, bench.json and the pictures.")],
    length: Annotated[
        list[int] | None, typer.Option(min=1024, help="Tokens; may be repeated. [1024, doubled up to 65536]")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. [1, and 2]")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    budget: Annotated[float, typer.Option(help="Seconds for one call of another; longer ones are carried by T^2.")] = 20.0,
) -> None:
    """Time Native Sparse Attention on this CPU, against what else a person could run here."""
    import torch

    from mindspeed_nsa.bench import report, runner
    from mindspeed_nsa.ops import backends

    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in types:
        raise ValueError(f"bench: dtype is {dtype!r}; allowed: {', '.join(types)}")
    backends.load("cpu", "cpu")
    lengths = sorted(length or [1024 << i for i in range(7)])
    for result in runner.run(lengths, threads or [1, 2], types[dtype], budget, lambda text: print(text, file=sys.stderr)):
        files = report.write(result, output)
    print(*files, sep="\n")


@app.command()
def doctor(
    overrides: _Overrides = None,
    *,
    config: Annotated[Path | None, typer.Option(help="A job file, to say whether it can run here and on the chip.")] = None,
    trainer: _Trainer = "builtin",
) -> int:
    """Say what this machine has, and what to do where something is amiss; exit code 1 if it or the job cannot run."""
    from mindspeed_nsa.doctor import FAULT, draw, examine

    rows = examine(config, overrides or (), trainer)
    draw(rows)
    return int(rows[-1].status == FAULT)


@app.command()
def launch(
    overrides: _Overrides = None,
    *,
    config: Annotated[Path, typer.Option(help="The job file.")],
    trainer: _Trainer = "mindspeed",
    nproc_per_node: Annotated[int, typer.Option(envvar="NPUS_PER_NODE", min=1, help="Ranks a node.")] = 1,
    nnodes: Annotated[int | None, typer.Option(envvar="NNODES", min=1, help="Nodes; else of HOSTFILE, SLURM, or 1.")] = None,
    node_rank: Annotated[int | None, typer.Option(envvar="NODE_RANK", min=0, help="This node's number, from 0.")] = None,
    master_addr: Annotated[str | None, typer.Option(envvar="MASTER_ADDR", help="Name or address of node 0.")] = None,
    master_port: Annotated[int, typer.Option(envvar="MASTER_PORT", min=1, max=65535, help="A free port there.")] = 6000,
    hostfile: Annotated[Path | None, typer.Option(envvar="HOSTFILE", help="A file of hosts, one a line.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what each node would run, and start nothing.")] = False,
) -> int:
    """Start a job on this node by torchrun, once the doctor finds every node fit; run it on each node."""
    from mindspeed_nsa.launch.nodes import find_nodes
    from mindspeed_nsa.launch.run import Launch, run

    nodes = find_nodes(nnodes, node_rank, master_addr, master_port, hostfile, dry_run=dry_run)
    return run(Launch(config, overrides or [], trainer, nodes, nproc_per_node), dry_run=dry_run)


@app.command()
def plan(
    overrides: _Overrides = None,
    *,
    config: Annotated[Path, typer.Option(help="The job file.")],
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, such as 1,8,64.")] = "1",
    sequence_lengths: Annotated[str | None, typer.Option(help="Tokens, such as 8192,32768; else the file's.")] = None,
    ranks_per_node: Annotated[int, typer.Option(envvar="NPUS_PER_NODE", min=1, help="Dies of a node.")] = 16,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Tokens of the tokenizer; else it is asked.")] = None,
    trainer: _Trainer = "mindspeed",
    output: Annotated[Path | None, typer.Option(help="A folder for plan.md, plan.json and plan.png.")] = None,
) -> None:
    """Say what each rank of a job would hold, compute and send, on so many nodes; nothing is started."""
    from mindspeed_nsa.plan import report
    from mindspeed_nsa.plan.plan import sweep

    counts = _numbers("--nodes", nodes)
    lengths = _numbers("--sequence-lengths", sequence_lengths) if sequence_lengths else None
    cells = sweep(config, overrides or [], counts, lengths, ranks_per_node, trainer, vocab_size)
    print(report.markdown(cells), end="")
    for path in report.write(cells, output) if output else []:
        print(path)


def _numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{option}: {text!r}; allowed: numbers from 1 with commas between them, such as 1,8,64")
    return [int(number) for number in text.split(",")]


@app.command()
def convert(
    overrides: _Overrides = None,
    *,
    config: Annotated[Path, typer.Option(help="The job file of what is to start from the weights.")],
    load: Annotated[Path, typer.Option(help="A dense checkpoint, or a folder with a config.json and model*.safetensors.")],
    save: Annotated[Path, typer.Option(help="Folder for the checkpoint, for the job's checkpoint.load.")],
) -> None:
    """Turn a dense model's weights into a checkpoint that an NSA job starts from, on any layout."""
    from mindspeed_nsa.patches import npu_host
    from mindspeed_nsa.pretrain.job import Job

    job = Job.read(config, overrides or ())
    if npu_host.has_npu():
        npu_host.install()
    from mindspeed_nsa.pretrain.convert import convert as converting

    print("\n".join(converting(job, load, save)))


if __name__ == "__main__":
    main()
